"""The layers of CoTNets, for use in other networks too."""

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.layers.cot import CoTLayer
from cotnet_jax.layers.drop_path import DropPath
from cotnet_jax.layers.group_norm import WeightGroupNorm
from cotnet_jax.layers.split_attention import SplitAttention
from cotnet_jax.ops.local_aggregation.normalized import normalized_local_aggregation
from cotnet_jax.ops.local_aggregation.plain import local_aggregation

__all__ = [
    "BatchNorm",
    "CoTLayer",
    "Conv",
    "DropPath",
    "SplitAttention",
    "WeightGroupNorm",
    "local_aggregation",
    "normalized_local_aggregation",
]
