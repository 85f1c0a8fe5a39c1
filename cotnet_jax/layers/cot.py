"""The Contextual Transformer block, as CoT (one channel group) and CoXt (two).

Li et al., "Contextual Transformer Networks for Visual Recognition", arXiv 2107.12292, section 3.2
and figure 2(b). The fusion of the two contexts is that of the published code, a selective-kernel
attention (Li et al., "Selective Kernel Networks", arXiv 1903.06586, section 3.1).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.layers.group_norm import TapGroupNorm
from cotnet_jax.ops.local_aggregation.normalized import normalized_local_aggregation
from cotnet_jax.ops.local_aggregation.plain import local_aggregation

# Channels that share one aggregation weight.
SHARE = 8


class CoTLayer(nn.Module):
    """Replaces a K x K convolution [N, H, W, C] -> [N, H, W, C].

    A static context is convolved from the input; from input and context together every pixel
    learns K x K weights; the values around it, summed with them, are its dynamic context; an
    attention over channels joins both contexts.

    With ``mutable=["intermediates"]`` it gives, for a look inside: ``aggregation_weights``
    [N, H, W, G, K*K, C/8/G], ``static`` and ``dynamic`` [N, H, W, C], and ``dynamic_share``
    [N, C], how much of the result is the dynamic context; ``cotnet_jax.models.contexts``
    collects them.

    Attributes:
      kernel_size: K, odd, of the static context and of the aggregation.
      groups: channel groups G of every step but the static context: 1 is CoT, 2 is CoXt.
      key_groups: channel groups of the static context's convolution: 4 in CoT, 8 in CoXt.
      conv, norm, weight_norm: convolution, batch normalisation and the normalisation of the
        aggregation weights, to bind dtypes with ``functools.partial``.
      fused: normalise the aggregation weights while they are read, and in inference normalise and
        activate the result before it is written, where a kernel does so.
      implementation: as in ``local_aggregation``.
    """

    kernel_size: int = 3
    groups: int = 1
    key_groups: int = 4
    conv: type[nn.Module] = Conv
    norm: type[nn.Module] = BatchNorm
    weight_norm: type[nn.Module] = TapGroupNorm
    fused: bool = True
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] -> [N, H, W, C]; raises ValueError where C does not suit the groups."""
        self._check(x)
        channels = x.shape[-1]
        norm = functools.partial(self.norm, use_running_average=not train)

        static = self.conv(channels, self.kernel_size, groups=self.key_groups, name="key_conv")(x)
        static = nn.relu(norm(name="key_bn")(static))
        values = self.conv(channels, groups=self.groups, name="value_conv")(x)
        values = norm(name="value_bn")(values)
        dynamic = self._dynamic(values, self._weights(x, static, norm), norm, train)

        self.sow("intermediates", "static", static)
        self.sow("intermediates", "dynamic", dynamic)
        return self._fuse(dynamic, static, norm)

    def _check(self, x):
        channels = x.shape[-1]
        for divisor, what in (
            (self.groups * SHARE, f"groups * {SHARE}"),
            (self.key_groups, "key_groups"),
        ):
            if channels % divisor:
                raise ValueError(
                    f"CoTLayer: {channels} channels are not a multiple of {what} = {divisor} "
                    f"(input {x.shape})"
                )

    def _weights(self, x, static, norm):
        """Aggregation weights [N, H, W, G, K*K, C/8/G], before their normalisation."""
        *pixels, channels = x.shape
        by_group = (*pixels, self.groups, channels // self.groups)
        both = jnp.concatenate([x.reshape(by_group), static.reshape(by_group)], axis=-1)
        both = both.reshape(*pixels, 2 * channels)
        hidden = self.conv(channels // 2, groups=self.groups, name="weight_conv1")(both)
        hidden = nn.relu(norm(name="weight_bn")(hidden))
        taps = self.kernel_size**2
        weights = self.conv(
            taps * channels // SHARE, groups=self.groups, use_bias=True, name="weight_conv2"
        )(hidden)
        return weights.reshape(*pixels, self.groups, taps, channels // SHARE // self.groups)

    def _dynamic(self, values, weights, norm, train):
        """Dynamic context [N, H, W, C]: the aggregation, its batch normalisation and SiLU."""
        weight_norm, norm = self.weight_norm(name="weight_norm"), norm(name="bn")
        if not self.fused or self.is_mutable_collection("intermediates"):
            weights = weight_norm(weights)
            self.sow("intermediates", "aggregation_weights", weights)
            return nn.silu(
                norm(local_aggregation(values, weights, implementation=self.implementation))
            )
        aggregate = functools.partial(
            normalized_local_aggregation, values, implementation=self.implementation
        )
        if train:
            return nn.silu(norm(weight_norm(weights, aggregate)))
        multiplier, shift = norm(values, fold=True)
        aggregate = functools.partial(aggregate, output_scale=multiplier, output_shift=shift)
        return weight_norm(weights, aggregate)

    def _fuse(self, dynamic, static, norm):
        """Per channel, a softmax over the two contexts, from their mean over all pixels."""
        channels = static.shape[-1]
        pooled = (dynamic + static).mean((1, 2), keepdims=True)
        hidden = self.conv(max(channels // 2, 32), use_bias=True, name="fusion_conv1")(pooled)
        hidden = nn.relu(norm(name="fusion_bn")(hidden))
        logits = self.conv(2 * channels, use_bias=True, name="fusion_conv2")(hidden)
        logits = logits.reshape(*logits.shape[:3], channels, 2)
        share = nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
        share = share.astype(static.dtype)
        self.sow("intermediates", "dynamic_share", share[:, 0, 0, :, 0])
        return dynamic * share[..., 0] + static * share[..., 1]
