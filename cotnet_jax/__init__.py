"""CoTNet, Contextual Transformer Networks, in JAX."""

from cotnet_jax.layers import CoTLayer, local_aggregation
from cotnet_jax.models import create_model, list_models
from cotnet_jax.torch_weights import from_torch_state_dict, to_torch_state_dict


def __getattr__(name):
    # Orbax, which only reading weights needs, takes seconds to import.
    if name == "load":
        from cotnet_jax.weights import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CoTLayer",
    "create_model",
    "from_torch_state_dict",
    "list_models",
    "load",
    "local_aggregation",
    "to_torch_state_dict",
]
