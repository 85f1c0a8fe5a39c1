"""What a file is to contain, and the description that it carries."""

import dataclasses
import math
from typing import Any

import jax

from cotnet_jax.export.errors import ExportError
from cotnet_jax.predictor import Predictor
from cotnet_jax.version import __version__

FORMAT = "cotnet_jax export 1"
INPUT = "images"


def require_positive(name: str, value: Any) -> None:
    """Raise an ExportError unless a value is None or an integer of 1 or more."""
    # True is an integer, too.
    if value is not None and (type(value) is not int or value < 1):
        raise ExportError(f"{name} must be an integer of 1 or more, or None, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to put into a file.

    Attributes:
      fold: fold batch normalisations into convolutions: see ``fold_batch_norm``.
      preprocess: take uint8 images [N, H, W, 3] of any size, and resize, crop and normalise them
        as ``Predictor.prepare`` and evaluation do. Otherwise take float32 images
        [N, size, size, 3] that are normalised already.
      batch_size: N; None takes any.
      logits: return the logits in place of the probabilities.

    Raises:
      ExportError: ``batch_size`` is neither None nor an integer of 1 or more.
    """

    fold: bool = False
    preprocess: bool = False
    batch_size: int | None = None
    logits: bool = False

    def __post_init__(self):
        require_positive("batch_size", self.batch_size)

    @property
    def output(self) -> str:
        """What the file returns, and the name of it."""
        return "logits" if self.logits else "probabilities"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How images become the network's input.

    Attributes:
      image_size: side of the network's input in pixels.
      crop, interpolation, mean, std: as in ``Variant``.
    """

    image_size: int
    crop: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def short_side(self) -> int:
        """The short side of an image after resizing, in pixels."""
        return math.floor(self.image_size / self.crop)


def preparation_of(predictor: Predictor) -> Preparation:
    """Return the evaluation settings of a predictor."""
    fields = {field.name for field in dataclasses.fields(Preparation)}
    return Preparation(**{name: predictor.settings[name] for name in fields})


def describe(predictor: Predictor, options: Options) -> dict[str, Any]:
    """Return the description that a file carries: values that JSON can hold.

    Its "input" has dtype, shape and layout of the images; a dimension that is not fixed is a name.

    Raises:
      ExportError: the network has no classifier.
    """
    if not predictor.names:
        raise ExportError("these weights have no classifier, so there are no probabilities")
    preparation = preparation_of(predictor)
    batch, size = options.batch_size or "batch", preparation.image_size
    if options.preprocess:
        images = {"dtype": "uint8", "shape": [batch, "height", "width", 3], "values": "0..255"}
    else:
        images = {"dtype": "float32", "shape": [batch, size, size, 3], "values": "normalised"}
    return {
        "format": FORMAT,
        "model": predictor.model_name,
        "weights": predictor.kind,
        "source": predictor.source,
        "input": {"name": INPUT, **images, "channels": "RGB"},
        "output": options.output,
        "class_names": list(predictor.names),
        "image_size": size,
        "crop": preparation.crop,
        "interpolation": preparation.interpolation,
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "preprocess": options.preprocess,
        "fold": options.fold,
        "versions": {"cotnet_jax": __version__, "jax": jax.__version__},
    }
