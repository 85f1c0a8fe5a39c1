"""Pooling of 3x3 windows at every second pixel, with gradients that gather."""

from cotnet_jax.ops.pooling.windows import average_pool, max_pool

__all__ = ["average_pool", "max_pool"]
