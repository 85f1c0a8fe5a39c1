"""Batch normalisation with the running statistics of the published models."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.ops.batch_norm import batch_norm, conv_batch_norm, covariance_batch_norm
from cotnet_jax.ops.batch_norm.plain import finish, normalize


def is_frozen(frozen: bool | frozenset[str], path: str) -> bool:
    """Return whether the module at a path is frozen by an attribute such as BatchNorm's."""
    return frozen if isinstance(frozen, bool) else path in frozen


class BatchNorm(nn.Module):
    """Normalise every channel over all other axes.

    Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167, algorithm 1. As in PyTorch, a batch
    is normalised by its biased variance, and the running variance is updated with the unbiased one.
    Statistics are computed and stored in at least float32.

    Parameters ``scale`` and ``bias`` [C]; collection "batch_stats": ``mean`` and ``var`` [C].

    Attributes:
      use_running_average: normalise by the running statistics, and do not update them.
      frozen: the same, whatever ``use_running_average`` is: for fine-tuning with fixed statistics.
        Scale and bias are still trained. A set of paths such as "stem/bn" freezes the modules at
        these paths.
      momentum: weight of the old running statistics in an update.
      epsilon: added to the variance.
      axis_name: mesh axis over which batch statistics are averaged; None keeps them per device.
      dtype: of the result.
      param_dtype: of scale, bias and running statistics.
      scale_init: initializer of the scale.
      implementation: as in ``local_aggregation``, of training.
    """

    use_running_average: bool = True
    frozen: bool | frozenset[str] = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scale_init: Callable = nn.initializers.ones
    implementation: str | None = None

    def __call__(
        self,
        x: Float[Array, "*batch C"],
        *,
        activation: str | None = None,
        residual: Float[Array, "*batch C"] | None = None,
        branch_scale: Float[Array, " N"] | None = None,
    ) -> Float[Array, "*batch C"]:
        """Normalise x, and update "batch_stats" unless the running statistics are used.

        Args:
          x: any floating dtype.
          activation: "relu", "silu" or None, of the result.
          residual: added before the activation.
          branch_scale: factor of each sample, beside a residual.

        Raises:
          ValueError: a batch to take statistics from has a single value in each channel.
        """
        scale, bias, running_mean, running_var = self._variables(x.shape[-1])
        after: dict[str, Any] = {
            "activation": activation,
            "residual": residual,
            "branch_scale": branch_scale,
        }
        if self.uses_running_statistics:
            multiplier = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = normalize(x, running_mean.value, multiplier, bias)
            return finish(y, **after).astype(self.dtype)
        count = self._count(x)
        y, mean, var = batch_norm(
            x, scale, bias, dtype=self.dtype, **after, **self._training_options()
        )
        self._update(running_mean, running_var, mean, var, count)
        return y

    def of_product(
        self,
        x: Float[Array, "N H W K"],
        kernel: Float[Array, "inputs C"],
        *,
        by_covariance: bool = False,
        **options: Any,
    ) -> tuple[Array, ...]:
        """As a call in training with ``x @ kernel``, followed by x where ``returns_x`` is set.

        Args:
          x: in the dtype of the result.
          kernel: rounded to that dtype where x is multiplied with it.
          by_covariance: normalise by ``covariance_batch_norm``, not by ``conv_batch_norm``.
          **options: further keyword arguments of that function.

        Raises:
          ValueError: as a call.
        """
        scale, bias, running_mean, running_var = self._variables(kernel.shape[1])
        count = self._count(x)
        function = covariance_batch_norm if by_covariance else conv_batch_norm
        y, mean, var, *rest = function(
            x, kernel, scale, bias, **options, **self._training_options()
        )
        self._update(running_mean, running_var, mean, var, count)
        return y, *rest

    def _training_options(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "axis_name": self.axis_name,
            "implementation": self.implementation,
        }

    def scale_and_shift(self, channels: int) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Return (multiplier, shift) such that the normalised x is ``x * multiplier + shift``.

        For kernels that apply the normalisation themselves; both are in ``param_dtype``.

        Raises:
          ValueError: the module normalises by the statistics of the batch.
        """
        if not self.uses_running_statistics:
            raise ValueError(
                "BatchNorm.scale_and_shift: running statistics only, not those of a batch; "
                "set use_running_average=True or frozen=True"
            )
        scale, bias, running_mean, running_var = self._variables(channels)
        multiplier = scale * lax.rsqrt(running_var.value + self.epsilon)
        return multiplier, bias - running_mean.value * multiplier

    @property
    def uses_running_statistics(self) -> bool:
        """Whether the running statistics normalise, and stay as they are."""
        return self.use_running_average or is_frozen(self.frozen, "/".join(self.path))

    @nn.compact
    def _variables(self, channels):
        shape = (channels,)
        return (
            self.param("scale", self.scale_init, shape, self.param_dtype),
            self.param("bias", nn.initializers.zeros, shape, self.param_dtype),
            self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype),
            self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype),
        )

    def _count(self, x):
        """Return the number of values that the statistics of a channel are taken from."""
        count = x.size // max(x.shape[-1], 1)
        if self.axis_name is not None:
            count *= lax.axis_size(self.axis_name)
        if count < 2:
            raise ValueError(
                f"BatchNorm {'/'.join(self.path)} has {count} value per channel in a training "
                f"batch of shape {x.shape}, and a variance needs two: give every device at least "
                "two images, or average the statistics over devices (sync_batch_norm)"
            )
        return count

    def _update(self, running_mean, running_var, mean, var, count):
        if not self.is_initializing():
            unbiased = var * (count / (count - 1))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
