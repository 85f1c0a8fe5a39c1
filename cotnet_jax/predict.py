"""Says what is on pictures.

    python -m cotnet_jax.predict --weights=cotnet50 cat.jpg dog.jpg holidays/

``--weights`` takes a folder of convert_torch_weights.py, the workdir of a training run, or a file
of PyTorch. Pictures are prepared exactly as in evaluation: the short side resized, the centre
cropped, with the model's own size and filter.
"""

import concurrent.futures
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from cotnet_jax.data import class_names, transforms
from cotnet_jax.data.mixing import normalize
from cotnet_jax.models import create_model
from cotnet_jax.weights import Weights, read_weights

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "A folder of convert_torch_weights.py, the workdir of a training run, or a .pth.tar, .pth or "
    ".safetensors file.",
)
_WHICH = flags.DEFINE_enum(
    "which", None, ["ema", "raw"], "Which weights; the moving averages (EMA) where there are."
)
_MODEL = flags.DEFINE_string("model", None, "Name of the model, if a PyTorch file fits several.")
_TOP = flags.DEFINE_integer("top", 5, "Classes told of each picture.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Pictures at a time.", lower_bound=1)
_CLASSES = flags.DEFINE_string("classes", None, "File with the name of a class on each line.")
_JSON = flags.DEFINE_bool("json", False, "A JSON object on a line for each picture.")


class Predictor:
    """A network with its weights and its evaluation's preprocessing.

    Args:
      weights: of ``read_weights``.
      names: of the classes; None takes those that come with the weights, ImageNet's for 1,000
        classes, or "class 0", "class 1", ...

    Raises:
      ValueError: the weights have no classifier, take other than RGB pictures, or have another
        number of classes than names.
    """

    def __init__(self, weights: Weights, names: Sequence[str] | None = None):
        self.settings = weights.settings
        if not weights.num_classes:
            raise ValueError("these weights have no classifier, so they cannot name anything")
        if weights.input_channels != 3:
            raise ValueError(
                f"these weights take pictures of {weights.input_channels} channels, not of 3"
            )
        self.names = tuple(names or weights.class_names or _default_names(weights.num_classes))
        if len(self.names) != weights.num_classes:
            raise ValueError(
                f"{len(self.names)} names of classes, but the weights have {weights.num_classes}"
            )
        self._net = create_model(
            weights.model, num_classes=weights.num_classes, **weights.attributes
        )
        self._variables = jax.device_put(weights.variables)
        self._apply = jax.jit(self._probabilities)

    def prepare(self, path) -> np.ndarray:
        """A file's picture as evaluation sees it: uint8 [size, size, 3], RGB.

        Raises:
          OSError, transforms.DecodeError: it cannot be read.
        """
        return transforms.eval_transform(
            transforms.decode(pathlib.Path(path).read_bytes()),
            self.settings["image_size"],
            crop=self.settings["crop"],
            interpolation=self.settings["interpolation"],
        )

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Prepared pictures [N, size, size, 3] of values 0..255 -> probabilities [N, classes]."""
        return np.asarray(self._apply(self._variables, pictures))

    def _probabilities(self, variables, pictures):
        mean, std = self.settings["mean"], self.settings["std"]
        logits = self._net.apply(variables, normalize(pictures, mean, std, self._net.dtype))
        return jax.nn.softmax(logits)

    def predict_files(
        self, paths: Sequence, top: int = 5, batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Reads and classifies picture files, in order.

        Yields:
          {"path", "top": [{"class", "name", "probability"}, ...]}, the likeliest first, or
          {"path", "error"} for a file that cannot be read.
        """
        batch_size = min(batch_size, len(paths))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            # A batch is decoded while the one before it is classified.
            batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
            ahead = self._start(pool, batches[0]) if batches else None
            for index, batch in enumerate(batches):
                prepared = [future.result() for future in ahead]
                if index + 1 < len(batches):
                    ahead = self._start(pool, batches[index + 1])
                yield from self._classify(batch, prepared, top, batch_size)

    def _start(self, pool, paths):
        return [pool.submit(self._try, path) for path in paths]

    def _try(self, path):
        try:
            return self.prepare(path)
        except (OSError, transforms.DecodeError) as error:
            return str(error)

    def _classify(self, paths, prepared, top, batch_size):
        size = self.settings["image_size"]
        # Always as many, so that it is compiled once.
        pictures = np.zeros((batch_size, size, size, 3), np.uint8)
        for row, picture in enumerate(prepared):
            if not isinstance(picture, str):
                pictures[row] = picture
        probabilities = self(pictures)
        for path, picture, row in zip(paths, prepared, probabilities, strict=False):
            if isinstance(picture, str):
                yield {"path": str(path), "error": picture}
                continue
            likeliest = np.argsort(-row, kind="stable")[:top]
            yield {
                "path": str(path),
                "top": [
                    {"class": int(i), "name": self.names[i], "probability": float(row[i])}
                    for i in likeliest
                ],
            }


def find_pictures(paths: Iterable) -> list[pathlib.Path]:
    """Files as they are, and for folders the picture files anywhere in them, sorted.

    Raises:
      ValueError: lists all that do not exist and all folders without a picture.
    """
    found, problems = [], []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                problems.append(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            problems.append(f"{path}: no such file or folder")
    if problems:
        raise ValueError(
            "\n  ".join([f"{len(problems)} of the pictures are not there:", *problems])
        )
    return found


def _default_names(count):
    if count == class_names.IMAGENET_CLASSES:
        return class_names.imagenet_names()
    return tuple(f"class {index}" for index in range(count))


def _text(result: Mapping[str, Any]) -> str:
    lines = [result["path"]]
    lines += [f"  {100 * c['probability']:6.2f} %  {c['name']}" for c in result["top"]]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if not _WEIGHTS.value:
        raise app.UsageError("say whose weights: --weights=PATH")
    if len(arguments) < 2:
        raise app.UsageError("give pictures or folders of pictures")
    try:
        paths = find_pictures(arguments[1:])
        names = class_names.read_names(_CLASSES.value) if _CLASSES.value else None
        predictor = Predictor(read_weights(_WEIGHTS.value, _WHICH.value, _MODEL.value), names)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    results = predictor.predict_files(paths, _TOP.value, _BATCH_SIZE.value)
    few = len(paths) <= _BATCH_SIZE.value
    errors = []
    for result in tqdm(results, total=len(paths), unit="picture", disable=few):
        if "error" in result:
            errors.append(f"{result['path']}: {result['error']}")
        if _JSON.value:
            tqdm.write(json.dumps(result))
        elif "top" in result:
            tqdm.write(_text(result))
    if errors:
        sys.exit(f"error: {len(errors)} of {len(paths)} not read:\n  " + "\n  ".join(errors))


if __name__ == "__main__":
    app.run(main)
