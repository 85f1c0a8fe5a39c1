"""Weights of trained models: read, converted, published, and named as in PyTorch."""

from etils import epy

# Reading imports Orbax, which takes seconds; the names of the tensors do not need it.
with epy.lazy_api_imports(globals()):
    from cotnet_jax.weights.folder import WeightsError
    from cotnet_jax.weights.hub.card import Measurement
    from cotnet_jax.weights.hub.publish import export_for_hub, push_to_hub
    from cotnet_jax.weights.loading import Weights, load, read_weights
    from cotnet_jax.weights.name_map import from_torch_state_dict, to_torch_state_dict
    from cotnet_jax.weights.torch_files import Kind

__all__ = [
    "Kind",
    "Measurement",
    "Weights",
    "WeightsError",
    "export_for_hub",
    "from_torch_state_dict",
    "load",
    "push_to_hub",
    "read_weights",
    "to_torch_state_dict",
]
