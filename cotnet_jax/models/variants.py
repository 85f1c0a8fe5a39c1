"""The variants of CoTNet: what distinguishes them, and their published accuracies."""

import dataclasses
import difflib

from cotnet_jax.data import imagenet


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model of the family.

    Attributes:
      blocks: number of bottlenecks in each stage.
      planes: width of the bottlenecks of each stage at base width 64; a stage has 4 times as many
        output channels.
      strides: of each stage.
      cardinality, base_width: the width of a bottleneck is
        ``planes * base_width // 64 * cardinality``. With cardinality 2 it has a CoXt layer.
      stem_width: 0 for a 7x7 convolution and a max pool; otherwise three 3x3 convolutions, of
        ``stem_width``, ``stem_width`` and twice as many channels, and no pool.
      average_down: average-pool shortcuts 2x2 before their 1x1 convolution.
      split_attention: use split attention in stages 1 and 2 and in every second block of stage 3.
      blur: in strided blocks, blur-pool after the spatial layer instead of average-pooling before.
      input_size: side of the evaluation's images, in pixels.
      crop: side of the central crop relative to the image's shorter side.
      interpolation: of the evaluation's resize.
      mean, std: by which RGB values in 0..1 are normalised.
      parameters: their number, with 1,000 classes.
      gmacs: billions of multiply-accumulates of convolutions and classifier at ``input_size``.
      top1, top5: published ImageNet accuracy in percent; None if not published.
    """

    blocks: tuple[int, int, int, int]
    planes: tuple[int, int, int, int] = (64, 128, 256, 512)
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    cardinality: int = 1
    base_width: int = 64
    stem_width: int = 0
    average_down: bool = False
    split_attention: bool = False
    blur: bool = False
    input_size: int = 224
    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = imagenet.MEAN
    std: tuple[float, float, float] = imagenet.STD
    parameters: int = 0
    gmacs: float = 0.0
    top1: float | None = None
    top5: float | None = None


def _se_cotnetd(blocks, stem_width=64, blur=True, input_size=256, crop=0.888, **published):
    return Variant(
        blocks,
        strides=(2, 2, 2, 2),
        stem_width=stem_width,
        average_down=True,
        split_attention=True,
        blur=blur,
        input_size=input_size,
        crop=crop,
        **published,
    )


# Accuracies: Li et al., arXiv 2107.12292, table 4, and the README of the authors' code.
VARIANTS = {
    "cotnet50": Variant((3, 4, 6, 3), parameters=22_222_416, gmacs=3.23, top1=81.3, top5=95.6),
    "cotnext50_2x48d": Variant(
        (3, 4, 6, 3),
        cardinality=2,
        base_width=48,
        parameters=30_046_276,
        gmacs=4.24,
        top1=82.1,
        top5=95.9,
    ),
    "se_cotnetd_50": _se_cotnetd(
        (3, 4, 6, 3),
        stem_width=32,
        blur=False,
        input_size=224,
        crop=0.875,
        parameters=23_107_784,
        gmacs=4.05,
        top1=81.6,
        top5=95.8,
    ),
    "cotnet101": Variant((3, 4, 23, 3), parameters=38_272_048, gmacs=6.03, top1=82.8, top5=96.2),
    "cotnext101_2x48d": Variant(
        (3, 4, 23, 3),
        cardinality=2,
        base_width=48,
        parameters=53_346_068,
        gmacs=8.04,
        top1=83.2,
        top5=96.4,
    ),
    "se_cotnetd_101": _se_cotnetd(
        (3, 4, 23, 3),
        blur=False,
        input_size=224,
        crop=0.875,
        parameters=40_912_392,
        gmacs=8.43,
        top1=83.2,
        top5=96.5,
    ),
    "se_cotnetd_152": _se_cotnetd(
        (3, 8, 36, 3), parameters=55_783_688, gmacs=16.83, top1=84.0, top5=97.0
    ),
    "se_cotnetd_152_L": _se_cotnetd(
        (3, 8, 36, 3),
        input_size=320,
        crop=0.909,
        parameters=55_783_688,
        gmacs=26.29,
        top1=84.6,
        top5=97.1,
    ),
    "se_cotnetd_200": _se_cotnetd((3, 24, 36, 3), parameters=60_399_368, gmacs=21.39),
    "se_cotnetd_270": _se_cotnetd((4, 29, 53, 4), parameters=83_380_648, gmacs=27.54),
    # Not published: a small model for the digits and for tests, with a CoT layer in every stage.
    "cotnet_tiny": Variant(
        (1, 1, 1, 1),
        planes=(16, 32, 64, 128),
        stem_width=16,
        average_down=True,
        input_size=32,
        crop=1.0,
        parameters=972_930,
    ),
}


def get_variant(name: str) -> Variant:
    """Return the variant of a name, or raise ValueError with the names most like it."""
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name.lower(), VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown model {name!r}: {hint}models are {', '.join(VARIANTS)}")
