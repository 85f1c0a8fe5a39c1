"""The networks, their variants, and a look at the contexts inside them."""

from cotnet_jax.models.cotnet import CoTNet, create_model, list_models

__all__ = ["CoTNet", "create_model", "list_models"]
