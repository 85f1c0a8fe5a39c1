"""CoTNet, Contextual Transformer Networks, in JAX."""

import importlib

from cotnet_jax.layers import CoTLayer, local_aggregation
from cotnet_jax.models.contexts import cot_contexts
from cotnet_jax.models.cotnet import create_model, list_models
from cotnet_jax.weights.name_map import from_torch_state_dict, to_torch_state_dict

# Orbax, which only reading weights needs, takes seconds to import.
_IMPORTED_WHEN_USED = {"Predictor": "cotnet_jax.predictor", "load": "cotnet_jax.weights.load"}


def __getattr__(name):
    if name in _IMPORTED_WHEN_USED:
        return getattr(importlib.import_module(_IMPORTED_WHEN_USED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CoTLayer",
    "Predictor",
    "cot_contexts",
    "create_model",
    "from_torch_state_dict",
    "list_models",
    "load",
    "local_aggregation",
    "to_torch_state_dict",
]
