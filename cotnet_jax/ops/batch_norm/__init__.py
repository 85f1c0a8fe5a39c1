"""Batch normalisation of a training batch, with what comes before and after it."""

from cotnet_jax.ops.batch_norm.convolution import conv_batch_norm, conv_kernels_suit
from cotnet_jax.ops.batch_norm.covariance import covariance_batch_norm, covariance_suits
from cotnet_jax.ops.batch_norm.training import batch_norm

__all__ = [
    "batch_norm",
    "conv_batch_norm",
    "conv_kernels_suit",
    "covariance_batch_norm",
    "covariance_suits",
]
