"""The CoTNet backbone: stem, four stages of bottlenecks, classifier.

Li et al., "Contextual Transformer Networks for Visual Recognition", arXiv 2107.12292, section 3.3;
He et al., "Deep Residual Learning", arXiv 1512.03385, for the residual net around it.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotnet_jax.layers import initializers, pooling
from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.layers.cot import CoTLayer
from cotnet_jax.layers.drop_path import DropPath
from cotnet_jax.layers.group_norm import TapGroupNorm
from cotnet_jax.layers.split_attention import SplitAttention
from cotnet_jax.models.variants import VARIANTS, Variant, get_variant

EXPANSION = 4


class Stem(nn.Module):
    """First convolutions; ``stem_width`` as in Variant."""

    stem_width: int
    conv: type[nn.Module]
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, channels] -> [N, ceil(H / 2), ceil(W / 2), 64 or 2 * stem_width]."""
        norm = functools.partial(self.norm, use_running_average=not train)
        if self.stem_width:
            x = self.conv(self.stem_width, 3, strides=2, name="conv1")(x)
            x = nn.relu(norm(name="bn1")(x))
            x = self.conv(self.stem_width, 3, name="conv2")(x)
            x = nn.relu(norm(name="bn2")(x))
            x = self.conv(2 * self.stem_width, 3, name="conv3")(x)
        else:
            x = self.conv(64, 7, strides=2, name="conv1")(x)
        return nn.relu(norm(name="bn")(x))


class Bottleneck(nn.Module):
    """Residual block whose 3x3 convolution is a CoT layer or split attention.

    Attributes:
      width: channels of the spatial layer.
      features: channels of the result.
      strides, dilation: of the spatial layer; CoT layers are never dilated.
      split_attention: split attention in place of the CoT layer.
      cardinality, average_down, blur: as in Variant.
      drop_path_rate: probability to leave out a sample's branch in training.
      conv, norm, cot: the layers, with everything bound that does not differ between blocks.
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
    conv: type[nn.Module]
    norm: type[nn.Module]
    cot: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, in] -> [N, ceil(H / strides), ceil(W / strides), features]."""
        norm = functools.partial(self.norm, use_running_average=not train)
        y = nn.relu(norm(name="bn1")(self.conv(self.width, name="conv1")(x)))
        y = self._spatial(y, train)
        y = self.conv(self.features, name="conv3")(y)
        y = norm(scale_init=nn.initializers.zeros, name="bn3")(y)
        y = DropPath(self.drop_path_rate, name="drop_path")(y, train)
        return nn.relu(y + self._shortcut(x, norm))

    def _spatial(self, y, train):
        pooled = self.strides > 1
        if self.split_attention:
            # Without blur the convolution takes the stride itself, and nothing is pooled.
            layer = SplitAttention(
                strides=1 if self.blur else self.strides,
                dilation=self.dilation,
                conv=self.conv,
                norm=self.norm,
                name="split_attention",
            )
            pooled = pooled and self.blur
        else:
            layer = self.cot(
                groups=self.cardinality,
                key_groups=4 if self.cardinality == 1 else 8,
                name="cot",
            )
        if pooled and not self.blur:
            y = pooling.average_pool_3x3(y, self.strides)
        y = layer(y, train)
        return pooling.blur_pool(y, self.strides) if pooled and self.blur else y

    def _shortcut(self, x, norm):
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        strides = self.strides
        if self.average_down and strides > 1:
            x = pooling.average_pool_2x2(x, strides)
            strides = 1
        x = self.conv(self.features, strides=strides, name="downsample_conv")(x)
        return norm(name="downsample_bn")(x)


class CoTNet(nn.Module):
    """An image classifier; make one with ``create_model``.

    With ``mutable=["intermediates"]`` it gives ``stem_features`` and ``stage1_features`` to
    ``stage4_features``, each [N, h, w, channels], for use as a backbone.

    Attributes:
      variant: entry of the table of models.
      num_classes: length of the logits; 0 gives the pooled features [N, channels] instead.
      dtype: of the activations; logits are in at least float32.
      param_dtype: of parameters and running statistics.
      drop_rate: dropout before the classifier, in training.
      drop_path_rate: drop path of the last block, in training; earlier ones rise to it from 0.
      output_stride: 8, 16 or 32, input pixels to a pixel of the last stage. Below 32 the last
        stages keep their size, and their split-attention convolutions are dilated instead.
      bn_axis_name: mesh axis over which batch statistics are shared; None keeps them local.
      freeze_batch_norm: training normalises by the running statistics, as inference does, and
        leaves them as they are; scales and biases are trained.
      fused, implementation: as in ``CoTLayer``, to turn the fused kernel off and to choose the
        aggregation's form.
    """

    variant: Variant
    num_classes: int = 1000
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    output_stride: int = 32
    bn_axis_name: str | None = None
    freeze_batch_norm: bool = False
    fused: bool = True
    implementation: str | None = None

    @property
    def default_cfg(self) -> dict:
        """What the published weights were evaluated with, and their accuracy in percent."""
        v = self.variant
        return {
            "input_size": (v.input_size, v.input_size, 3),
            "crop": v.crop,
            "interpolation": v.interpolation,
            "mean": v.mean,
            "std": v.std,
            "top1": v.top1,
            "top5": v.top5,
        }

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies normalised images [N, H, W, channels], of any size -> [N, num_classes].

        Training takes the random stream "dropout" where a drop rate is not 0, and updates the
        collection "batch_stats" unless that is frozen.
        """
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(f"images must be [N, H, W, channels], none of them 0: {images.shape}")
        bound = functools.partial(functools.partial, dtype=self.dtype, param_dtype=self.param_dtype)
        conv = bound(Conv)
        norm = bound(BatchNorm, axis_name=self.bn_axis_name, frozen=self.freeze_batch_norm)
        cot = functools.partial(
            CoTLayer,
            conv=conv,
            norm=norm,
            weight_norm=bound(TapGroupNorm),
            fused=self.fused,
            implementation=self.implementation,
        )
        x = Stem(self.variant.stem_width, conv, norm, name="stem")(images, train)
        self.sow("intermediates", "stem_features", x)
        if not self.variant.stem_width:
            x = pooling.max_pool_3x3(x, 2)
        for stage, blocks in enumerate(self._blocks()):
            for index, block in enumerate(blocks):
                name = f"stage{stage + 1}_block{index}"
                x = Bottleneck(**block, conv=conv, norm=norm, cot=cot, name=name)(x, train)
            self.sow("intermediates", f"stage{stage + 1}_features", x)
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

    def _blocks(self):
        """Per stage, the attributes of its bottlenecks."""
        v = self.variant
        last = max(sum(v.blocks) - 1, 1)
        reached = 2 if v.stem_width else 4
        dilation = 1
        stages = []
        for stage, count in enumerate(v.blocks):
            width = v.planes[stage] * v.base_width // 64 * v.cardinality
            strides = v.strides[stage]
            first_dilation = dilation
            if reached * strides > self.output_stride:
                dilation *= strides
                strides = 1
            reached *= strides
            done = sum(v.blocks[:stage])
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
                        "drop_path_rate": self.drop_path_rate * (done + index) / last,
                    }
                    for index in range(count)
                ]
            )
        return stages


def list_models() -> list[str]:
    """Names that ``create_model`` takes."""
    return list(VARIANTS)


def create_model(name: str, **attributes) -> CoTNet:
    """Makes a model of the table, without weights.

    Args:
      name: one of ``list_models()``.
      **attributes: of ``CoTNet``: num_classes, dtype, drop_rate, drop_path_rate, output_stride, ...

    Raises:
      ValueError: unknown name (with the nearest ones), or an attribute out of its range.
    """
    model = CoTNet(get_variant(name), **attributes)
    problems = [
        f"{field} must be {wanted}, not {getattr(model, field)!r}"
        for field, wanted, good in (
            ("num_classes", "0 or more", model.num_classes >= 0),
            ("output_stride", "8, 16 or 32", model.output_stride in (8, 16, 32)),
            ("drop_rate", "in [0, 1)", 0 <= model.drop_rate < 1),
            ("drop_path_rate", "in [0, 1)", 0 <= model.drop_path_rate < 1),
        )
        if not good
    ]
    if problems:
        raise ValueError(f"create_model({name!r}): {'; '.join(problems)}")
    return model
