"""A network as a StableHLO program that needs nothing but JAX.

The file is a zip archive, not compressed: ``PROGRAM`` holds what ``jax.export`` serialises, with
the weights in it, and ``DESCRIPTION`` the description in JSON. A single file cannot lose its class
names, Python reads it without other packages, and so does any other language.
"""

import io
import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export
from jax.image import scale_and_translate

from cotnet_jax.data.normalize import normalize
from cotnet_jax.export.options import Options, Preparation, describe, preparation_of
from cotnet_jax.models.folding import fold_batch_norm
from cotnet_jax.predictor import Predictor

PROGRAM = "program.jax_export"
DESCRIPTION = "description.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_METHODS = {"bicubic": "cubic", "bilinear": "linear"}


def build(predictor: Predictor, options: Options) -> bytes:
    """Return the content of a file for a predictor."""
    description = describe(predictor, options)
    exported = jax_export.export(jax.jit(_make_function(predictor, options)), platforms=PLATFORMS)(
        _input(description["input"])
    )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(DESCRIPTION, json.dumps(description, indent=2, allow_nan=False))
        archive.writestr(PROGRAM, exported.serialize())
    return content.getvalue()


def _input(images: dict[str, Any]) -> jax.ShapeDtypeStruct:
    shape = jax_export.symbolic_shape(", ".join(map(str, images["shape"])))
    return jax.ShapeDtypeStruct(shape, images["dtype"])


def _make_function(predictor, options):
    """Return the function from images to probabilities or logits."""
    variables = predictor.variables
    if options.fold:
        variables = jax.tree.map(jnp.asarray, fold_batch_norm(variables))
    # Triton's kernels are not part of StableHLO.
    model = predictor.model.clone(implementation="xla")
    preparation = preparation_of(predictor)

    def apply(images):
        if options.preprocess:
            images = resize_and_crop(images, preparation)
            images = normalize(images, preparation.mean, preparation.std, model.dtype)
        logits = model.apply(variables, images)
        return logits if options.logits else jax.nn.softmax(logits)

    return apply


def resize_and_crop(images: jax.Array, preparation: Preparation) -> jax.Array:
    """Do what ``data.transforms.eval_transform`` does, to within one level of 255.

    Args:
      images: uint8 [N, H, W, 3]; H and W may be symbolic dimensions.

    Returns:
      [N, size, size, 3], whole float32 numbers from 0 to 255.
    """
    size = preparation.image_size
    sides = [jnp.asarray(side) for side in images.shape[1:3]]
    short = jnp.minimum(*sides)
    pixels = images.astype(jnp.float32)
    # First horizontally, then vertically, with rounding after each, as Pillow does.
    for axis in (2, 1):
        side = sides[axis - 1]
        resized = preparation.short_side * side // short
        first = jnp.round((resized - size) / 2)
        shape = (*pixels.shape[:axis], size, *pixels.shape[axis + 1 :])
        pixels = scale_and_translate(
            pixels,
            shape,
            (axis,),
            scale=(resized / side)[None],
            translation=-first[None],
            method=_METHODS[preparation.interpolation],
        )
        pixels = jnp.clip(jnp.floor(pixels + 0.5), 0, 255)
    return pixels
