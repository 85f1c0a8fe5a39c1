"""The CoTNets: a stem, four stages of bottlenecks, and a classifier; or a backbone without it.

Li et al., "Contextual Transformer Networks for Visual Recognition", arXiv 2107.12292, section 3.3;
He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, for the ResNet that
they modify.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.layers import initializers, pooling
from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.layers.conv_norm import conv_norm
from cotnet_jax.layers.cot import CoTLayer
from cotnet_jax.layers.drop_path import DropPath
from cotnet_jax.layers.group_norm import WeightGroupNorm
from cotnet_jax.layers.split_attention import SplitAttention
from cotnet_jax.models.checks import check_attributes, check_images
from cotnet_jax.models.variants import VARIANTS, Variant, get_variant

# Output channels of a bottleneck, as a multiple of its planes.
EXPANSION = 4


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """What a stage's features [N, ceil(H / reduction), ceil(W / reduction), channels] are.

    Attributes:
      index: of the stage in ``out_indices``; 0 is the stem.
      channels: their number.
      reduction: pixels of the image along a side of one of the features' pixels.
      name: "stem", "stage1", ... "stage4", with which its parameters' names begin.
    """

    index: int
    channels: int
    reduction: int
    name: str


def key_groups_of(cardinality: int) -> int:
    """Return the groups of a CoT layer's key convolution."""
    return 4 if cardinality == 1 else 8


class Stem(nn.Module):
    """The first convolutions, which halve the resolution.

    Attributes:
      stem_width: as in ``Variant``.
      conv, norm: constructors of the convolutions and batch normalisations.
    """

    stem_width: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "N H W channels"], train: bool
    ) -> Float[Array, "N -(-H//2) -(-W//2) features"]:
        """[N, H, W, channels] -> [N, ceil(H / 2), ceil(W / 2), 64 or 2 * stem_width]."""
        norm = functools.partial(self.norm, use_running_average=not train)
        if self.stem_width:
            first = self.conv(self.stem_width, 3, strides=2, name="conv1")
            second = self.conv(self.stem_width, 3, name="conv2")
            x, _ = conv_norm(first, norm(name="bn1"), x, activation="relu")
            x, _ = conv_norm(second, norm(name="bn2"), x, activation="relu")
            last = self.conv(2 * self.stem_width, 3, name="conv3")
        else:
            last = self.conv(64, 7, strides=2, name="conv1")
        x, _ = conv_norm(last, norm(name="bn"), x, activation="relu")
        return x


class Bottleneck(nn.Module):
    """Residual bottleneck with a CoT layer, or split attention, in place of its 3x3 convolution.

    Attributes:
      width: channels of the spatial layer, that is of the CoT layer or split attention.
      features: output channels.
      strides, dilation: of the spatial layer; CoT layers are never dilated.
      split_attention: split attention in place of the CoT layer.
      cardinality, average_down, blur: as in ``Variant``.
      drop_path_rate: probability of dropping a sample's residual branch in training.
      conv, norm, cot: constructors of the layers, with the options that all blocks have in common.
      implementation: as in ``local_aggregation``, of poolings.
    """

    width: int
    features: int
    strides: int
    dilation: int
    split_attention: bool
    cardinality: int
    average_down: bool
    blur: bool
    drop_path_rate: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    cot: Callable[..., nn.Module]
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "N H W in"], train: bool
    ) -> Float[Array, "N -(-H//{self.strides}) -(-W//{self.strides}) {self.features}"]:
        """[N, H, W, in] -> [N, ceil(H / strides), ceil(W / strides), features]."""
        norm = functools.partial(self.norm, use_running_average=not train)
        y, x = conv_norm(
            *(self.conv(self.width, name="conv1"), norm(name="bn1"), x),
            activation="relu",
            reuses_x=True,
        )
        y = self._spatial(y, train)
        drop_path = DropPath(self.drop_path_rate, name="drop_path")
        y, _ = conv_norm(
            self.conv(self.features, name="conv3"),
            norm(scale_init=nn.initializers.zeros, name="bn3"),
            y,
            activation="relu",
            residual=self._shortcut(x, norm),
            branch_scale=drop_path.branch_scale(x, train),
        )
        return y

    def _spatial(self, y, train):
        """The spatial layer, and the pooling that gives it its strides."""
        if self.split_attention:
            # Without blur the convolution has the strides itself, and nothing is pooled.
            strides, pooled = (1, self.strides > 1) if self.blur else (self.strides, False)
            layer = SplitAttention(
                strides=strides,
                dilation=self.dilation,
                conv=self.conv,
                norm=self.norm,
                name="split_attention",
            )
        else:
            pooled = self.strides > 1
            layer = self.cot(
                groups=self.cardinality,
                key_groups=key_groups_of(self.cardinality),
                name="cot",
            )
        if pooled and not self.blur:
            y = pooling.average_pool_3x3(y, self.implementation)
        y = layer(y, train)
        return pooling.blur_pool(y, self.strides) if pooled and self.blur else y

    def _shortcut(self, x, norm):
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        strides = self.strides
        if self.average_down and strides > 1:
            x = pooling.average_pool_2x2(x, strides)
            strides = 1
        conv = self.conv(self.features, strides=strides, name="downsample_conv")
        x, _ = conv_norm(conv, norm(name="downsample_bn"), x)
        return x


class CoTNet(nn.Module):
    """An image classifier or a backbone; build one with ``create_model``.

    Parameters are in the collection "params", running statistics in "batch_stats". With
    ``mutable=["intermediates"]`` a classifier returns the stages' features as well:
    ``stem_features``, and ``stage1_features`` to ``stage4_features``, each [N, h, w, channels].

    Attributes:
      variant: the entry of ``VARIANTS`` to build.
      num_classes: number of logits; 0 returns the pooled features [N, channels] instead.
      features_only: build a backbone, which returns the features of the stages in ``out_indices``.
        Parameters have the names that they have in a classifier; stages after the last index, and
        the head, are not built.
      out_indices: 0 for the stem, 1 to 4 for the stages, in ascending order.
      in_channels: channels of the images; None takes those that the model is initialised with.
      dtype: of the activations. Pooled features and logits are in at least float32.
      param_dtype: of parameters and running statistics.
      drop_rate: dropout rate before the classifier, in training.
      drop_path_rate: drop-path rate of the last block, in training; it rises linearly from 0 in
        the first.
      output_stride: 8, 16 or 32, the total stride of the last stage. Below 32, the last stages
        keep their resolution and dilate their split-attention convolutions instead.
      bn_axis_name: mesh axis over which batch statistics are averaged; None keeps them per device.
      freeze_batch_norm: in training, too, normalise by the running statistics and do not update
        them; scales and biases are still trained. A set of paths such as "stem/bn" freezes these
        batch normalisations alone.
      fused, implementation: as in ``CoTLayer``.
    """

    variant: Variant
    num_classes: int = 1000
    features_only: bool = False
    out_indices: tuple[int, ...] = (1, 2, 3, 4)
    in_channels: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    output_stride: int = 32
    bn_axis_name: str | None = None
    freeze_batch_norm: bool | frozenset[str] = False
    fused: bool = True
    implementation: str | None = None

    @property
    def default_cfg(self) -> dict[str, Any]:
        """How the published weights were evaluated, and their accuracy in percent (or None).

        ``input_size`` is (H, W, channels); ``mean`` and ``std`` are those of RGB values in 0..1.
        """
        v = self.variant
        return {
            "input_size": (v.input_size, v.input_size, self.in_channels or 3),
            "crop": v.crop,
            "interpolation": v.interpolation,
            "mean": v.mean,
            "std": v.std,
            "top1": v.top1,
            "top5": v.top5,
        }

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """The features that a backbone returns; those of the stem and all stages of a classifier.

        Reductions are those of ``output_stride``.
        """
        v = self.variant
        reduction = 2
        every = [FeatureInfo(0, 2 * v.stem_width or 64, reduction, "stem")]
        if not v.stem_width:
            reduction *= 2
        for index, blocks in enumerate(self.bottlenecks(), start=1):
            reduction *= blocks[0]["strides"]
            every.append(FeatureInfo(index, blocks[0]["features"], reduction, f"stage{index}"))
        return tuple(
            info for info in every if not self.features_only or info.index in self.out_indices
        )

    @property
    def last_stage(self) -> int:
        """The last stage that is built, 1 to 4; 0 where only the stem is."""
        return max(self.out_indices) if self.features_only else len(self.variant.blocks)

    @nn.compact
    def __call__(
        self, images: Float[Array, "N H W channels"], train: bool = False
    ) -> Float[Array, "N classes"] | tuple[Float[Array, "N _ _ _"], ...]:
        """Return the logits of normalised images [N, H, W, channels], or a backbone's features.

        ``train`` normalises by batch statistics, which updates the collection "batch_stats", and
        draws from the RNG "dropout" where a drop rate is not 0.

        Returns:
          [N, num_classes]; with ``features_only`` a tuple with [N, h, w, channels] of each of
          ``out_indices``, in the model's dtype: see ``feature_info``.

        Raises:
          ValueError: ``images`` has not four axes, no pixels, another number of channels than the
            model, or its channels where the rows should be.
          TypeError: ``images`` is no array of floats.
        """
        check_images(images, self._known_channels())
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(Conv, **dtypes)
        norm = functools.partial(
            BatchNorm,
            axis_name=self.bn_axis_name,
            frozen=self.freeze_batch_norm,
            implementation=self.implementation,
            **dtypes,
        )
        cot = functools.partial(
            CoTLayer,
            conv=conv,
            norm=norm,
            weight_norm=functools.partial(WeightGroupNorm, **dtypes),
            fused=self.fused,
            implementation=self.implementation,
        )
        bottleneck = functools.partial(
            Bottleneck, conv=conv, norm=norm, cot=cot, implementation=self.implementation
        )
        x = Stem(self.variant.stem_width, conv, norm, name="stem")(images, train)
        self.sow("intermediates", "stem_features", x)
        features = [x]
        for stage, blocks in enumerate(self.bottlenecks()[: self.last_stage], start=1):
            if stage == 1 and not self.variant.stem_width:
                x = pooling.max_pool_3x3(x, self.implementation)
            for index, block in enumerate(blocks):
                name = f"stage{stage}_block{index}"
                x = bottleneck(**block, name=name)(x, train)
            self.sow("intermediates", f"stage{stage}_features", x)
            features.append(x)
        if self.features_only:
            return tuple(features[index] for index in self.out_indices)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
        if not self.num_classes:
            return x
        x = nn.Dropout(self.drop_rate, name="dropout")(x, deterministic=not train)
        uniform = initializers.uniform_fan_in(x.shape[-1])
        return nn.Dense(
            self.num_classes,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            kernel_init=uniform,
            bias_init=uniform,
            name="head",
        )(x)

    def _known_channels(self):
        """Return the channels that images must have; None before the model is initialised."""
        if self.in_channels is not None:
            return self.in_channels
        stem: Any = self.get_variable("params", "stem")
        return stem and stem["conv1"]["kernel"].shape[-2]

    def bottlenecks(self):
        """Return, for each stage, the attributes of its bottlenecks."""
        v = self.variant
        last_block = max(sum(v.blocks) - 1, 1)
        net_stride = 2 if v.stem_width else 4
        dilation = 1
        stages = []
        for stage, count in enumerate(v.blocks):
            width = v.planes[stage] * v.base_width // 64 * v.cardinality
            strides = v.strides[stage]
            first_dilation = dilation
            if net_stride * strides > self.output_stride:
                dilation *= strides
                strides = 1
            net_stride *= strides
            earlier_blocks = sum(v.blocks[:stage])
            stages.append(
                [
                    {
                        "width": width,
                        "features": v.planes[stage] * EXPANSION,
                        "strides": strides if index == 0 else 1,
                        "dilation": first_dilation if index == 0 else dilation,
                        "split_attention": v.split_attention
                        and (stage < 2 or (stage == 2 and index % 2 == 1)),
                        "cardinality": v.cardinality,
                        "average_down": v.average_down,
                        "blur": v.blur,
                        "drop_path_rate": self.drop_path_rate
                        * (earlier_blocks + index)
                        / last_block,
                    }
                    for index in range(count)
                ]
            )
        return stages


def list_models() -> list[str]:
    """Return the names that ``create_model`` accepts."""
    return list(VARIANTS)


def create_model(name: str, **attributes: Any) -> CoTNet:
    """Build a model by its name, without weights.

    Args:
      name: one of ``list_models()``.
      **attributes: of ``CoTNet``, such as num_classes, features_only, dtype, drop_path_rate.

    Raises:
      ValueError: the name is unknown (the message suggests similar ones), or attributes cannot be
        used (the message lists all of them).
      TypeError: ``CoTNet`` has no such attribute (the message names the nearest).
    """
    variant = get_variant(name)
    check_attributes(name, CoTNet, attributes)
    if "out_indices" in attributes:
        attributes["out_indices"] = tuple(attributes["out_indices"])
    return CoTNet(variant, **attributes)
