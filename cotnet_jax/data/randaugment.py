"""RandAugment, colour jitter and random erasing, as in the training of the published models.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
space", arXiv 1909.13719, with the sixteen operations, the increasing magnitudes and the random
probabilities of the published recipe. Images are RGB. All randomness comes from the generator
passed in.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from cotnet_jax.data import imagenet

# ImageNet's mean colour, (124, 116, 104), fills what a geometric operation leaves uncovered.
FILL = tuple(round(255 * mean) for mean in imagenet.MEAN)
MAX_MAGNITUDE = 15.0
# The probability of each operation is itself drawn from this range, anew for every image.
PROBABILITY_RANGE = (0.2, 0.8)
_LEVELS = 10.0


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment with the settings of a string such as 'rand-m15-mstd0.5-n2'.

    Attributes:
      magnitude: mean magnitude, 0 to 15.
      magnitude_std: standard deviation of the magnitude.
      num_ops: operations drawn per image.
    """

    magnitude: float
    magnitude_std: float = 0.0
    num_ops: int = 2

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augment one RGB image; the image passed in is not changed."""
        for call in self.draw(rng, image.height, image.width):
            image = call(image)
        return image

    def draw(self, rng: np.random.Generator, height: int, width: int) -> list["Call"]:
        """Draw the operations for one image of this size, without those that are skipped."""
        calls = []
        for index in rng.integers(0, len(OP_NAMES), self.num_ops):
            if rng.random() >= rng.uniform(*PROBABILITY_RANGE):
                continue
            magnitude = self.magnitude
            if self.magnitude_std > 0:
                magnitude = rng.normal(magnitude, self.magnitude_std)
            magnitude = min(max(magnitude, 0.0), MAX_MAGNITUDE)
            name, sign, center = OP_NAMES[index], 1, (0.0, 0.0)
            if name in SIGNED:
                sign = -1 if rng.random() < 0.5 else 1
            elif name == "Cutout":
                center = (rng.uniform(0, width), rng.uniform(0, height))
            calls.append(Call(name, magnitude, sign, center))
        return calls


@dataclasses.dataclass(frozen=True)
class Call:
    """One operation with all its random parameters drawn.

    Attributes:
      name: one of OP_NAMES.
      magnitude: 0 to 15.
      sign: 1 or -1; used by Rotate, Shear and Translate.
      center_xy: centre of Cutout's square in pixels.
    """

    name: str
    magnitude: float
    sign: int = 1
    center_xy: tuple[float, float] = (0.0, 0.0)

    @property
    def value(self) -> float:
        """What the magnitude means to the operation, with the sign; as ``operation_value``."""
        return self.sign * operation_value(self.name, self.magnitude)

    def __call__(self, image: Image.Image) -> Image.Image:
        return _OPS[self.name](image, self)


def parse(text: str) -> RandAugment | None:
    """Parse a RandAugment string; return None for "".

    The parts are 'rand', then in any order mFLOAT (magnitude 0..15, required), mstdFLOAT (its
    standard deviation, default 0) and nINT (operations per image, default 2), joined by '-'.

    Raises:
      ValueError: the string is wrong; the message names every wrong part and gives an example.
    """
    if not text:
        return None
    head, *parts = text.split("-")
    problems: list[str] = []
    found: dict[str, float] = {}
    if head != "rand":
        problems.append(f"it starts with {head!r} instead of 'rand'")
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n)(\d+(?:\.\d+)?)", part)
        if not match:
            problems.append(f"{part!r} is none of mFLOAT, mstdFLOAT, nINT")
        elif match[1] in found:
            problems.append(f"{match[1]!r} is given twice")
        elif match[1] == "n" and "." in match[2]:
            problems.append(f"{part!r} is not a whole number of operations")
        else:
            found[match[1]] = float(match[2])
    if "m" not in found and not any(part.startswith("m") for part in parts):
        problems.append("the magnitude (m0 to m15) is missing")
    if found.get("m", 0) > MAX_MAGNITUDE:
        problems.append(f"magnitude {found['m']:g} is above {MAX_MAGNITUDE:g}")
    if found.get("n", 1) < 1:
        problems.append("n is less than 1; switch RandAugment off with ''")
    if problems or "m" not in found:
        raise ValueError(
            f"config.augment.randaugment = {text!r}: {'; '.join(problems)}; "
            "write it like 'rand-m15-mstd0.5-n2'"
        )
    return RandAugment(found["m"], found.get("mstd", 0.0), int(found.get("n", 2)))


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Scale brightness, contrast and saturation, in random order, by random factors.

    The published recipe uses it where RandAugment is off.

    Args:
      image: RGB.
      rng: source of all randomness.
      strength: factors are uniform in max(0, 1 - strength) .. 1 + strength; 0 changes nothing.

    Returns:
      RGB image of the same size.
    """
    if strength <= 0:
        return image
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in rng.permutation(len(enhancers)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = enhancers[index](image).enhance(factor)
    return image


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: float,
    mode: str,
    area: Sequence[float],
    ratio: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """Replace a random rectangle by the mean colour or by noise.

    Source: Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896. It works on the
    uint8 image, before mixing: "const" erases with what normalises to zero, "pixel" with what
    normalises to standard normal noise, up to rounding and clipping at 0 and 255.

    Args:
      image: uint8 [H, W, 3].
      rng: source of all randomness.
      probability: of erasing anything.
      mode: "const" or "pixel".
      area: smallest and largest share of the image's area.
      ratio: smallest and largest height / width, drawn log-uniformly.
      mean, std: per channel, on the 0..1 scale.

    Returns:
      uint8 [H, W, 3]; the input is not changed.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in ("const", "pixel"):
        raise ValueError(f"config.augment.erasing_mode is {mode!r}; use 'const' or 'pixel'")
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        target = rng.uniform(area[0], area[1]) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < h < height and 0 < w < width:
            break
    else:
        return image
    top = int(rng.integers(0, height - h, endpoint=True))
    left = int(rng.integers(0, width - w, endpoint=True))
    noise = rng.standard_normal((h, w, 3)) if mode == "pixel" else np.zeros((h, w, 3))
    colour = 255 * (np.asarray(mean) + np.asarray(std) * noise)
    out = image.copy()
    out[top : top + h, left : left + w] = np.clip(np.rint(colour), 0, 255)
    return out


@functools.cache
def _posterize_table(bits: int) -> list[int]:
    # Not ImageOps.posterize: Pillow 13 refuses 0 bits, which magnitudes under 2.5 give (black).
    keep = 0xFF & ~(0xFF >> bits)
    return [value & keep for value in range(256)] * 3


@functools.cache
def _solarize_table(threshold: int) -> list[int]:
    return [value if value < threshold else 255 - value for value in range(256)] * 3


@functools.cache
def _solarize_add_table(amount: int) -> list[int]:
    return [min(255, value + amount) if value < 128 else value for value in range(256)] * 3


def operation_value(name: str, magnitude: float) -> float:
    """Return what a magnitude means to an operation, without its random sign.

    Args:
      name: one of OP_NAMES.
      magnitude: 0 to 15.

    Returns:
      Rotate: degrees; ShearX, ShearY: pixels of shift for each pixel of distance; TranslateX,
      TranslateY: pixels; Posterize: bits that are kept; Solarize: the threshold; SolarizeAdd: what
      is added; Color, Contrast, Brightness, Sharpness: the factor; Cutout: half of the square's
      side in pixels; others: 0.
    """
    return _VALUES[name](magnitude / _LEVELS) if name in _VALUES else 0.0


def _rotate(image: Image.Image, call: Call) -> Image.Image:
    return image.rotate(call.value, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _affine(image: Image.Image, data: Sequence[float]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        data,
        resample=Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )


def _enhance(kind: type, image: Image.Image, call: Call) -> Image.Image:
    return kind(image).enhance(call.value)


def _cutout(image: Image.Image, call: Call) -> Image.Image:
    half = int(call.value)
    width, height = image.size
    x0, y0 = (int(max(0.0, center - half)) for center in call.center_xy)
    x1, y1 = min(width, x0 + 2 * half), min(height, y0 + 2 * half)
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x0, y0, x1, y1), fill=FILL)
    return image


def _factor(level: float) -> float:
    return 1.8 * level + 0.1


_VALUES: dict[str, Callable[[float], float]] = {
    "Rotate": lambda level: 30.0 * level,
    "Posterize": lambda level: int(4 * level),
    "Solarize": lambda level: int(256 * level),
    "SolarizeAdd": lambda level: int(110 * level),
    "Color": _factor,
    "Contrast": _factor,
    "Brightness": _factor,
    "Sharpness": _factor,
    "ShearX": lambda level: 0.3 * level,
    "ShearY": lambda level: 0.3 * level,
    "TranslateX": lambda level: 100.0 * level,
    "TranslateY": lambda level: 100.0 * level,
    "Cutout": lambda level: int(40 * level),
}
_OPS: dict[str, Callable[[Image.Image, Call], Image.Image]] = {
    "AutoContrast": lambda image, call: ImageOps.autocontrast(image),
    "Equalize": lambda image, call: ImageOps.equalize(image),
    "Invert": lambda image, call: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": lambda image, call: image.point(_posterize_table(int(call.value))),
    "Solarize": lambda image, call: image.point(_solarize_table(int(call.value))),
    "SolarizeAdd": lambda image, call: image.point(_solarize_add_table(int(call.value))),
    "Color": functools.partial(_enhance, ImageEnhance.Color),
    "Contrast": functools.partial(_enhance, ImageEnhance.Contrast),
    "Brightness": functools.partial(_enhance, ImageEnhance.Brightness),
    "Sharpness": functools.partial(_enhance, ImageEnhance.Sharpness),
    "ShearX": lambda image, call: _affine(image, (1, call.value, 0, 0, 1, 0)),
    "ShearY": lambda image, call: _affine(image, (1, 0, 0, call.value, 1, 0)),
    "TranslateX": lambda image, call: _affine(image, (1, 0, call.value, 0, 1, 0)),
    "TranslateY": lambda image, call: _affine(image, (1, 0, 0, 0, 1, call.value)),
    "Cutout": _cutout,
}
OP_NAMES = tuple(_OPS)
# Operations whose values have a random sign.
SIGNED = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})
