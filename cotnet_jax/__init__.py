"""CoTNet, Contextual Transformer Networks, in JAX."""

from etils import epy

# Each is imported when it is first used: JAX, Flax and Orbax take seconds, and `--help` none.
with epy.lazy_api_imports(globals()):
    from cotnet_jax import layers, models, weights
    from cotnet_jax.layers import CoTLayer, local_aggregation
    from cotnet_jax.models.contexts import cot_contexts
    from cotnet_jax.models.cotnet import create_model, list_models
    from cotnet_jax.predictor import Predictor
    from cotnet_jax.weights import from_torch_state_dict, load, to_torch_state_dict

__all__ = [
    "CoTLayer",
    "Predictor",
    "cot_contexts",
    "create_model",
    "from_torch_state_dict",
    "layers",
    "list_models",
    "load",
    "local_aggregation",
    "models",
    "to_torch_state_dict",
    "weights",
]
