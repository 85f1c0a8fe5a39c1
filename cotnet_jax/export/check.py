"""Comparison of an exported file with the model that it was made from."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.data.normalize import normalize
from cotnet_jax.export.errors import ExportError
from cotnet_jax.export.formats import Format
from cotnet_jax.export.options import Options, preparation_of
from cotnet_jax.export.runtimes import FAST_COMPILATION, open_file
from cotnet_jax.predictor import Predictor

# Of the probabilities, in the relative L2 norm.
TOLERANCE = 1e-4
# Where images are resized, too: a few pixels differ from Pillow's by one level of 255.
TOLERANCE_RESIZED = 1e-2


class Comparison(NamedTuple):
    """How far a file's probabilities of random images are from the model's.

    Attributes:
      shape: of the images that the file was given.
      resized: whether it had to resize them.
      largest: the largest difference of a probability.
      relative: the L2 norm of the difference, relative to that of the model's probabilities.
    """

    shape: tuple[int, ...]
    resized: bool
    largest: float
    relative: float

    def __str__(self) -> str:
        count, height, width = self.shape[:3]
        return (
            f"{count} random image{'s'[: count > 1]} of {height} x {width}"
            f"{', resized' if self.resized else ''}: probabilities within {self.largest:.1e} of "
            f"the model's (relative {self.relative:.1e})"
        )


def compare(
    path: str | os.PathLike, format: Format, predictor: Predictor, options: Options
) -> Iterator[Comparison]:
    """Run a file on random images, and yield comparisons with what the model gives.

    Raises:
      ExportError: a difference is above its tolerance.
    """
    inputs = list(_random_images(predictor, options))
    prepared = [np.stack([predictor.prepare(image) for image in batch]) for batch in inputs]
    expected = iter(_probabilities(predictor, np.concatenate(prepared)))
    run = open_file(path, format)
    preparation = preparation_of(predictor)
    for batch, pixels in zip(inputs, prepared, strict=True):
        if not options.preprocess:
            mean, std = preparation.mean, preparation.std
            batch = np.asarray(normalize(jnp.asarray(pixels), mean, std, np.float32))
        result = run(batch)
        if options.logits:
            result = jax.nn.softmax(result)
        reference = np.stack([next(expected) for _ in batch])
        difference = np.asarray(result, np.float64) - reference
        comparison = Comparison(
            shape=batch.shape,
            resized=options.preprocess and min(batch.shape[1:3]) != preparation.short_side,
            largest=float(np.max(np.abs(difference))),
            relative=float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        )
        # A NaN is never within its tolerance.
        if not comparison.relative <= (TOLERANCE_RESIZED if comparison.resized else TOLERANCE):
            raise ExportError(
                f"the file does not compute what the model does, so nothing was written: "
                f"{comparison}"
            )
        yield comparison


def _random_images(predictor, options):
    """Yield two batches of uint8 images: with preprocessing, only the second must be resized."""
    random = np.random.default_rng(0)
    preparation = preparation_of(predictor)
    short, size = preparation.short_side, preparation.image_size
    shapes = [(size, size), (size, size)]
    if options.preprocess:
        shapes = [(short, short + short // 3), (short + short // 2, short + short // 4)]
    for count, shape in zip((1, 3), shapes, strict=True):
        yield random.integers(0, 256, (options.batch_size or count, *shape, 3), dtype=np.uint8)


def _probabilities(predictor, pixels):
    preparation = preparation_of(predictor)

    def apply(variables, pixels):
        images = normalize(pixels, preparation.mean, preparation.std, predictor.model.dtype)
        return jax.nn.softmax(predictor.model.apply(variables, images))

    apply = jax.jit(apply, compiler_options=FAST_COMPILATION)
    return np.asarray(apply(predictor.variables, pixels), np.float64)
