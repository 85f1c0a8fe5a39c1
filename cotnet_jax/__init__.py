"""CoTNet, Contextual Transformer Networks, in JAX.

What most programs need::

    model = cotnet_jax.create_model("cotnet50", num_classes=10)     # names: list_models()
    model, variables = cotnet_jax.load("cotnet50.pth.tar")          # weights, or a training run
    predictor = cotnet_jax.Predictor.load("runs/mine")              # classifies images
    layer = cotnet_jax.CoTLayer(kernel_size=3)                      # for networks of your own

The commands, such as cotnet-train, are listed by ``python -m cotnet_jax``.
"""

from etils import epy as _epy

from cotnet_jax.version import __version__ as __version__

# Each is imported when it is first used: JAX, Flax and Orbax take seconds, and `--help` none.
with _epy.lazy_api_imports(globals()):
    from cotnet_jax import configs, export, layers, models, reports, weights
    from cotnet_jax.layers import CoTLayer, local_aggregation
    from cotnet_jax.models.contexts import cot_contexts
    from cotnet_jax.models.cotnet import create_model, list_models
    from cotnet_jax.models.folding import fold_batch_norm
    from cotnet_jax.models.grad_cam import grad_cam
    from cotnet_jax.predictor import Predictor
    from cotnet_jax.weights import (
        export_for_hub,
        from_torch_state_dict,
        load,
        push_to_hub,
        to_torch_state_dict,
    )

__all__ = [
    "CoTLayer",
    "Predictor",
    "__version__",
    "configs",
    "cot_contexts",
    "create_model",
    "export",
    "export_for_hub",
    "fold_batch_norm",
    "from_torch_state_dict",
    "grad_cam",
    "layers",
    "list_models",
    "load",
    "local_aggregation",
    "models",
    "push_to_hub",
    "reports",
    "to_torch_state_dict",
    "weights",
]
