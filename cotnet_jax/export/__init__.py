"""Files that hold a network with its weights, for other programs: StableHLO and ONNX."""

from etils import epy

# The command looks at its options before JAX is imported.
with epy.lazy_api_imports(globals()):
    from cotnet_jax.export.errors import ExportError
    from cotnet_jax.export.formats import to_onnx, to_stablehlo
    from cotnet_jax.export.options import Options
    from cotnet_jax.export.write import export_file

__all__ = ["ExportError", "Options", "export_file", "to_onnx", "to_stablehlo"]
