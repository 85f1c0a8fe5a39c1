"""CoTNet, Contextual Transformer Networks, in JAX."""

from cotnet_jax.layers import CoTLayer, local_aggregation
from cotnet_jax.models import create_model, list_models
from cotnet_jax.torch_weights import from_torch_state_dict, to_torch_state_dict

__all__ = [
    "CoTLayer",
    "create_model",
    "from_torch_state_dict",
    "list_models",
    "local_aggregation",
    "to_torch_state_dict",
]
