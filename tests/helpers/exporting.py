"""A small trained-looking classifier to export."""

import numpy as np

from cotnet_jax.models.cotnet import create_model
from cotnet_jax.predictor import Predictor
from cotnet_jax.weights.loading import Weights
from helpers.random_variables import random_variables

SIZE = 40
NAMES = ("naïve", "déjà vu", *(f"class {index}" for index in range(2, 10)))


def small_predictor(**settings) -> Predictor:
    """Return cotnet_tiny with random weights, whose probabilities depend on the image."""
    variables = random_variables(create_model("cotnet_tiny", num_classes=10), SIZE)
    variables["params"]["head"]["kernel"] *= 20
    known = {
        "image_size": SIZE,
        "crop": 0.875,
        "interpolation": "bicubic",
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
    }
    weights = Weights(
        model="cotnet_tiny",
        variables=variables,
        kind="ema",
        settings=known | settings,
        attributes={},
        class_names=NAMES,
        batches=0,
        source={"file": "tiny"},
        notes=(),
    )
    return Predictor(weights)


def smooth_images(count: int, height: int, width: int) -> np.ndarray:
    """Return uint8 [count, height, width, 3] that look as coarse as photos do, all different."""
    random = np.random.default_rng(height * width)
    coarse = random.uniform(0, 255, (count, 5, 7, 3))
    rows, columns = (np.linspace(0, n - 1.01, size) for n, size in ((5, height), (7, width)))
    rows, columns = np.meshgrid(rows, columns, indexing="ij")
    y, x = rows.astype(int), columns.astype(int)
    fy, fx = (rows - y)[..., None], (columns - x)[..., None]
    blend = (
        coarse[:, y, x] * (1 - fy) * (1 - fx)
        + coarse[:, y, x + 1] * (1 - fy) * fx
        + coarse[:, y + 1, x] * fy * (1 - fx)
        + coarse[:, y + 1, x + 1] * fy * fx
    )
    noise = random.normal(0, 10, blend.shape)
    return np.clip(blend + noise, 0, 255).astype(np.uint8)
