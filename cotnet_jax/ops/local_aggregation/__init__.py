"""Local aggregation: every pixel sums its neighbours with weights of its own."""

from cotnet_jax.ops.local_aggregation.normalized import normalized_local_aggregation
from cotnet_jax.ops.local_aggregation.plain import local_aggregation

__all__ = ["local_aggregation", "normalized_local_aggregation"]
