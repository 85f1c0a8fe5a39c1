"""The Contextual Transformer block: CoT, and CoXt with two channel groups.

Li et al., "Contextual Transformer Networks for Visual Recognition", arXiv 2107.12292, section 3.2
and figure 2(b). The two contexts are fused as in the authors' code, by selective-kernel attention
(Li et al., "Selective Kernel Networks", arXiv 1903.06586, section 3.1). docs/cot_layer.md explains
each step, with drawings.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.checks import check_array
from cotnet_jax.layers.conv import Conv
from cotnet_jax.layers.conv_norm import conv_norm, norm_act
from cotnet_jax.layers.group_norm import WeightGroupNorm
from cotnet_jax.ops.dispatch import IMPLEMENTATIONS
from cotnet_jax.ops.local_aggregation.normalized import normalized_local_aggregation
from cotnet_jax.ops.local_aggregation.plain import local_aggregation

# One aggregation weight is shared by this many channels.
CHANNELS_PER_WEIGHT = 8


class CoTLayer(nn.Module):
    """Contextual Transformer block [N, H, W, C] -> [N, H, W, C], in place of a K x K convolution.

    Attention over the K x K neighbourhood of each pixel. Its weights are not products of queries
    and keys: a 1x1 convolution predicts them from the pixel and its context. ``|`` concatenates
    channels, and ``*`` is ``local_aggregation``, the sum of a pixel's neighbours with its weights::

        static  = ReLU(BN(conv_KxK(x)))                                   [N, H, W, C]
        values  = BN(conv_1x1(x))                                         [N, H, W, C]
        weights = conv_1x1(ReLU(BN(conv_1x1(x | static))))                [N, H, W, G, K*K, Cw]
        dynamic = SiLU(BN(WeightGroupNorm(weights) * values))             [N, H, W, C]
        share   = softmax(conv_1x1(ReLU(BN(conv_1x1(mean(static + dynamic))))))   [N, C] each
        y       = share_dynamic * dynamic + share_static * static

    ``mean`` is over H and W, and the softmax over the two contexts. Each of the G groups has
    Cw = C / 8 / G weight channels: in a group, channels c, c + Cw, ... c + 7 Cw share a weight.

    ``mutable=["intermediates"]`` returns ``aggregation_weights`` (normalised), ``static``,
    ``dynamic`` and ``dynamic_share`` [N, C] as well; ``cotnet_jax.cot_contexts`` collects them.

    Creating one raises ValueError where ``kernel_size`` is even or ``implementation`` is unknown.

    Attributes:
      kernel_size: K, odd.
      groups: G, channel groups of every step except ``static`` and ``share``: 1 in CoT, 2 in CoXt.
      key_groups: channel groups of the convolution of ``static``: 4 in CoT, 8 in CoXt.
      conv, norm, weight_norm: constructors of the convolutions, the batch normalisations and the
        normalisation of the weights, for example ``functools.partial(Conv, dtype=jnp.bfloat16)``.
      fused: let the aggregation normalise its weights and, in inference, apply the batch
        normalisation and SiLU after it, which saves memory traffic where a kernel does it.
      implementation: as in ``local_aggregation``.
    """

    kernel_size: int = 3
    groups: int = 1
    key_groups: int = 4
    conv: Callable[..., nn.Module] = Conv
    norm: Callable[..., nn.Module] = BatchNorm
    # No attribute of the class: nnx.bridge.ToNNX would take it for a method, and its submodule's
    # parameters for that method's.
    weight_norm: Callable[..., nn.Module] = dataclasses.field(
        default_factory=lambda: WeightGroupNorm
    )
    fused: bool = True
    implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            odd = max(self.kernel_size + 1, 1)
            raise ValueError(
                f"CoTLayer: kernel_size={self.kernel_size} has no middle for the pixel itself: "
                f"type an odd one such as kernel_size={odd}"
            )
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                "CoTLayer: implementation must be 'xla', 'triton' or None, not "
                f"{self.implementation!r}"
            )

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool = False) -> Float[Array, "N H W C"]:
        """Return the block's output; ``train`` normalises by, and records, batch statistics.

        Raises:
          ValueError: x has not four axes, or C is not a multiple of ``8 * groups`` and of
            ``key_groups``.
          TypeError: x is no array of floats.
        """
        self._check(x)
        channels = x.shape[-1]
        norm = functools.partial(self.norm, use_running_average=not train)

        value_conv = self.conv(channels, groups=self.groups, name="value_conv")
        values, x = conv_norm(value_conv, norm(name="value_bn"), x, reuses_x=True)
        key_conv = self.conv(channels, self.kernel_size, groups=self.key_groups, name="key_conv")
        static, _ = conv_norm(key_conv, norm(name="key_bn"), x, activation="relu")
        dynamic = self._dynamic(values, self._weights(x, static, norm), norm, train)

        self.sow("intermediates", "static", static)
        self.sow("intermediates", "dynamic", dynamic)
        return self._fuse(dynamic, static, norm)

    def _check(self, x):
        check_array(x, "x", "[N, H, W, C]", "type x.astype(jnp.float32)")
        channels = x.shape[-1]
        for divisor, name in (
            (self.groups * CHANNELS_PER_WEIGHT, f"groups * {CHANNELS_PER_WEIGHT}"),
            (self.key_groups, "key_groups"),
        ):
            if channels % divisor:
                raise ValueError(
                    f"CoTLayer: {channels} channels are not a multiple of {name} = {divisor} "
                    f"(input {x.shape})"
                )

    def _weights(self, x, static, norm):
        """Aggregation weights [N, H, W, G, K*K, Cw], before their normalisation."""
        *pixels, channels = x.shape
        more = static
        if self.groups > 1:
            by_group = (*pixels, self.groups, channels // self.groups)
            both = jnp.concatenate([x.reshape(by_group), static.reshape(by_group)], axis=-1)
            x, more = both.reshape(*pixels, 2 * channels), None
        conv = self.conv(channels // 2, groups=self.groups, name="weight_conv1")
        hidden, _ = conv_norm(conv, norm(name="weight_bn"), x, more=more, activation="relu")
        positions = self.kernel_size**2
        weight_channels = channels // CHANNELS_PER_WEIGHT
        weights = self.conv(
            positions * weight_channels, groups=self.groups, use_bias=True, name="weight_conv2"
        )(hidden)
        return weights.reshape(*pixels, self.groups, positions, weight_channels // self.groups)

    def _dynamic(self, values, weights, norm, train):
        """Dynamic context [N, H, W, C]: the aggregation, its batch normalisation and SiLU."""
        weight_norm, norm = self.weight_norm(name="weight_norm"), norm(name="bn")
        # Fused kernels never store the normalised weights.
        if not self.fused or self.is_mutable_collection("intermediates"):
            weights = weight_norm(weights)
            self.sow("intermediates", "aggregation_weights", weights)
            y = local_aggregation(values, weights, implementation=self.implementation)
            return norm_act(norm, y, activation="silu")
        aggregate = functools.partial(
            normalized_local_aggregation,
            values,
            weights,
            *weight_norm.scale_and_bias(weights.shape[3:]),
            epsilon=weight_norm.epsilon,
            implementation=self.implementation,
        )
        if train:
            return norm_act(norm, aggregate(), activation="silu")
        output_scale, output_shift = norm.scale_and_shift(values.shape[-1])
        return aggregate(output_scale=output_scale, output_shift=output_shift)

    def _fuse(self, dynamic, static, norm):
        """Mix the contexts in each channel by a softmax, predicted from their mean over pixels."""
        channels = static.shape[-1]
        pooled = (dynamic + static).mean((1, 2), keepdims=True)
        conv = self.conv(max(channels // 2, 32), use_bias=True, name="fusion_conv1")
        hidden, _ = conv_norm(conv, norm(name="fusion_bn"), pooled, activation="relu")
        logits = self.conv(2 * channels, use_bias=True, name="fusion_conv2")(hidden)
        logits = logits.reshape(*logits.shape[:3], channels, 2)
        share = nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
        share = share.astype(static.dtype)
        self.sow("intermediates", "dynamic_share", share[:, 0, 0, :, 0])
        return dynamic * share[..., 0] + static * share[..., 1]
