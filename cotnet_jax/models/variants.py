"""The table of models: what distinguishes them, and what is published about them."""

import dataclasses
import difflib

from cotnet_jax.data import imagenet


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model of the family.

    Attributes:
      blocks: bottlenecks of each stage.
      planes: width of each stage's bottlenecks at base width 64; a stage gives 4 times as many.
      strides: of each stage.
      cardinality, base_width: bottleneck width = planes * base_width // 64 * cardinality, and
        cardinality 2 makes CoXt layers of the CoT layers.
      stem_width: 0 for one 7x7 convolution and a max pool, else three 3x3 convolutions of
        ``stem_width`` and twice that, and no pool.
      average_down: shortcuts are averaged 2x2 before their 1x1 convolution.
      split_attention: stages 1 and 2 and every second block of stage 3 have split attention.
      blur: strided blocks are blurred after their spatial layer, not averaged before it.
      input_size, crop: side in pixels and share of the short side that evaluation crops.
      interpolation: filter of the evaluation's resize.
      parameters: with 1,000 classes.
      gmacs: 1e9 multiplications of convolutions and classifier at ``input_size``.
      top1, top5: published ImageNet accuracy in percent, where there is one.
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


# Published: Li et al., arXiv 2107.12292, table 4, and the table of the published checkpoints.
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
    # Ours, for the embedded digits and for tests: a CoT layer in every stage at 32x32.
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
    """The table's entry; an unknown name raises ValueError with the nearest names."""
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name.lower(), VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown model {name!r}: {hint}models are {', '.join(VARIANTS)}")
