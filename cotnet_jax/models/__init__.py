"""The networks, their variants, and the contexts that their CoT layers compute."""

from cotnet_jax.models.cotnet import CoTNet, create_model, list_models

__all__ = ["CoTNet", "create_model", "list_models"]
