"""The models that exported files are checked and measured with: weights and images by formula."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from cotnet_jax.export.options import Preparation
from cotnet_jax.models.cotnet import list_models
from cotnet_jax.models.variants import get_variant
from cotnet_jax.predictor import Predictor
from cotnet_jax.tools import goldens
from cotnet_jax.weights.loading import Weights
from cotnet_jax.weights.name_map import from_torch_state_dict, torch_shapes

# Of the goldens.
SEED = 20210726


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A model, images for it, and what the PyTorch original gave for the first of them.

    Attributes:
      name: MODEL or, as a golden file, MODEL_HxW.
      predictor: with the weights of the goldens' formula.
      images: float32 [count, size, size, 3], normalised.
      logits: float64 [golden images, classes]; of no images where there is no golden.
    """

    name: str
    predictor: Predictor
    images: np.ndarray
    logits: np.ndarray


def published() -> list[str]:
    """Return the names of the variants of the authors; others are for tests and the demo."""
    return [name for name in list_models() if get_variant(name).gmacs]


def find(folder: Path) -> dict[str, Path | None]:
    """Return {name: golden file, or None} of every published variant, by ``folder``/forward."""
    files: dict[str, Path | None] = {
        path.stem: path for path in sorted((folder / "forward").glob("*.npz"))
    }
    with_goldens = {re.sub(r"_\d+x\d+$", "", name) for name in files}
    return files | {name: None for name in published() if name not in with_goldens}


def build(name: str, golden: Path | None, count: int) -> ExportedModel:
    """Return a model by its name and golden file, with ``count`` images."""
    model = goldens.model_of(golden) if golden else name
    variant = get_variant(model)
    size, logits = variant.input_size, np.zeros((0, 1000))
    if golden:
        with np.load(golden) as file:
            size, logits = int(file["input_shape"][2]), file["logits"]
    state_dict = goldens.state_dict(torch_shapes(model), SEED)
    settings = {
        field.name: getattr(variant, field.name, size) for field in dataclasses.fields(Preparation)
    }
    weights = Weights(
        model=model,
        variables=from_torch_state_dict(model, state_dict),
        kind="raw",
        settings=settings,
        attributes={},
        class_names=None,
        batches=0,
        source={},
        notes=(),
    )
    golden_images = goldens.images(SEED + 1, (len(logits), 3, size, size))
    more = goldens.images(SEED, (count - len(logits), 3, size, size))
    return ExportedModel(
        name, Predictor(weights), np.concatenate([golden_images, more]), logits[:count]
    )
