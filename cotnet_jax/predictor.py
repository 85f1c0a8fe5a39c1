"""Classify or embed images: a network with its preprocessing and the names of its classes."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from cotnet_jax import files
from cotnet_jax.checkpoint.weight_values import check_weights
from cotnet_jax.data import class_names, file_names, imagenet, transforms
from cotnet_jax.data.normalize import normalize
from cotnet_jax.data.pixels import check_pixels, check_prepared
from cotnet_jax.data.transforms import IMAGE_SUFFIXES
from cotnet_jax.models.contexts import CoTContexts, cot_contexts
from cotnet_jax.models.cotnet import create_model
from cotnet_jax.models.grad_cam import grad_cam
from cotnet_jax.weights import Kind, Weights, read_weights

# The largest image that is decoded, as 16-bit RGBA without compression.
_MAX_BYTES = 8 * transforms.MAX_PIXELS
_NOT_FINITE = (
    "the network's {} are not finite: its weights are, but are so large that its sums overflow"
)
_NO_CLASSIFIER = (
    "these weights have no classifier, so they cannot classify images; embed() gives their features"
)


class PredictionError(ValueError):
    """What was computed of some images is not finite; the message says of which."""


class Predictor:
    """A network with its weights and the preprocessing of its evaluation; see ``load``.

    Attributes:
      model: the ``CoTNet``.
      model_name: one of ``list_models()``.
      variables: its {"params", "batch_stats"}, on the device.
      names: names of the classes, in the order of the logits; () without a classifier.
      settings: evaluation settings: image_size in pixels, crop, interpolation, mean, std.
      kind, source: of the weights, as in ``Weights``.
      notes: report of what was read, one line each.

    Args:
      weights: as ``read_weights`` returns them.
      names: names of the classes. None uses those stored with the weights, else ImageNet's for
        1,000 classes, else "class 0", "class 1", ...

    Raises:
      ValueError: the weights are not for RGB images, have another number of classes than there
        are names, or hold values that are no usable numbers.
    """

    def __init__(self, weights: Weights, names: Sequence[str] | None = None):
        if weights.input_channels != 3:
            raise ValueError(
                f"these weights are for images of {weights.input_channels} channels, not of 3"
            )
        if names is None:
            names = weights.class_names or _default_names(weights.num_classes)
        self.names = tuple(file_names.not_a_text(names, "names"))
        if len(self.names) != weights.num_classes:
            raise ValueError(
                f"{len(self.names)} names were given, but the weights have "
                f"{weights.num_classes} classes"
            )
        check_weights(weights.variables)
        self.settings = weights.settings
        self.kind = weights.kind
        self.source = weights.source
        self.notes = weights.notes
        self.model_name = weights.model
        self.model = create_model(
            weights.model, num_classes=weights.num_classes, **weights.attributes
        )
        self.variables = jax.device_put(weights.variables)
        self._classify = jax.jit(self._probabilities)
        self._embed = jax.jit(self._features)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        kind: Kind | None = None,
        model: str | None = None,
        names: Sequence[str] | None = None,
    ) -> "Predictor":
        """Load whatever ``cotnet_jax.load`` takes.

        Args:
          path, kind, model: as in ``cotnet_jax.load``.
          names: names of the classes, as in ``Predictor``.

        Raises:
          FileNotFoundError: ``path`` does not exist.
          ValueError: the weights cannot be read or used; the message says why.
        """
        return cls(read_weights(path, kind, model), names)

    def prepare(self, image: str | os.PathLike | bytes | np.ndarray) -> np.ndarray:
        """Decode, turn upright, resize and crop an image as in evaluation.

        Args:
          image: path of a file, bytes of a file, or decoded pixels, uint8 [H, W, 3], RGB. The EXIF
            orientation of files is applied.

        Returns:
          uint8 [size, size, 3], RGB.

        Raises:
          OSError, transforms.DecodeError, MemoryError: the image cannot be read, or is too large.
          ValueError, TypeError: it is another object, or its pixels have another dtype or shape;
            the message says what to type.
        """
        if isinstance(image, (str, os.PathLike)):
            image = _read_file(image)
        if isinstance(image, bytes):
            image = transforms.decode(image, exif_orientation=True)
        image = check_pixels(image)
        return transforms.eval_transform(
            image,
            self.settings["image_size"],
            crop=self.settings["crop"],
            interpolation=self.settings["interpolation"],
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities [N, classes], float32, of prepared images [N, size, size, 3].

        Args:
          images: values 0..255 of any dtype, as ``prepare`` returns them.

        Raises:
          ValueError: there is no classifier, the images have another shape or scale, or an image
            has a value that is not finite.
          PredictionError: probabilities are not finite, as the network's sums overflow.
        """
        self._require_classifier()
        return self._compute(self._classify, images, "probabilities")

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Return the pooled features [N, channels], float32, of prepared images [N, size, size, 3].

        They are what the classifier takes; weights without one have them too. Arguments and errors
        are those of a call.
        """
        return self._compute(self._embed, images, "features")

    def classify(self, images: np.ndarray, top: int = 5) -> list[list[dict[str, Any]]]:
        """Return the likeliest classes of prepared images, [N, size, size, 3].

        Returns:
          For each image its ``top`` likeliest classes, the likeliest first:
          {"class": index of the logit, "name", "probability"}.
        """
        return [self._top(row, top) for row in self(images)]

    def look_inside(self, images: np.ndarray) -> dict[str, CoTContexts]:
        """Return the contexts of each CoT layer, by its path, for prepared images.

        See ``cot_contexts`` for the arrays.
        """
        images = check_prepared(images)
        return cot_contexts(self.model, self.variables, self._normalize(images))[1]

    def grad_cam(
        self, images: np.ndarray, layer: str, classes: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return where a layer's output speaks for a class, [N, h, w], for prepared images.

        Args:
          images: [N, size, size, 3], as ``prepare`` returns them.
          layer: a key of ``look_inside``, or the path of another layer, as in
            ``cotnet_jax.grad_cam``.
          classes: index of the class for each image; None takes its likeliest one.

        Raises:
          ValueError: as ``cotnet_jax.grad_cam``.
        """
        index = None if classes is None else np.asarray(classes)
        images = check_prepared(images)
        maps = grad_cam(self.model, self.variables, self._normalize(images), layer, index)
        return np.asarray(maps)

    def _compute(self, function, images, what):
        rows = np.asarray(function(self.variables, check_prepared(images)))
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if wrong.size:
            raise PredictionError(f"images {wrong.tolist()}: {_NOT_FINITE.format(what)}")
        return rows

    def _require_classifier(self):
        if not self.names:
            raise ValueError(_NO_CLASSIFIER)

    def _probabilities(self, variables, images):
        logits: Any = self.model.apply(variables, self._normalize(images))
        return jax.nn.softmax(logits)

    def _features(self, variables, images):
        return self.model.clone(num_classes=0).apply(variables, self._normalize(images))

    def _normalize(self, images):
        return normalize(
            jnp.asarray(images), self.settings["mean"], self.settings["std"], self.model.dtype
        )

    def _top(self, probabilities, count):
        likeliest = np.argsort(-probabilities, kind="stable")[:count]
        return [
            {"class": int(i), "name": self.names[i], "probability": float(probabilities[i])}
            for i in likeliest
        ]

    def predict_files(
        self, paths: Sequence, top: int = 5, batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Read and classify image files, in order.

        Args:
          paths: the files.
          top: how many classes to return of each image.
          batch_size: images classified together.

        Yields:
          {"path", "top": [{"class", "name", "probability"}, ...]}, the likeliest first, or
          {"path", "error"} for a file that cannot be read, or whose probabilities are not finite.

        Raises:
          ValueError: there is no classifier.
        """
        self._require_classifier()
        for path, row in self._of_files(self._classify, paths, batch_size, "probabilities"):
            result = {"error": row} if isinstance(row, str) else {"top": self._top(row, top)}
            yield {"path": str(path), **result}

    def embed_files(self, paths: Sequence, batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Read image files, in order, and compute their pooled features.

        Args:
          paths: the files.
          batch_size: images embedded together.

        Yields:
          {"path", "embedding": float32 [channels]}, or {"path", "error"} for a file that cannot be
          read, or whose features are not finite.
        """
        for path, row in self._of_files(self._embed, paths, batch_size, "features"):
            yield {"path": str(path), "error" if isinstance(row, str) else "embedding": row}

    def _of_files(
        self, function: Callable, paths: Sequence, batch_size: int, what: str
    ) -> Iterator[tuple[Any, np.ndarray | str]]:
        """Yield each file with its row of what a function computes, or with what is wrong."""
        batch_size = min(batch_size, len(paths))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            # Decode the next batch while this one is computed.
            batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size or 1)]
            ahead = self._start(pool, batches[0]) if batches else []
            for index, batch in enumerate(batches):
                prepared = [future.result() for future in ahead]
                if index + 1 < len(batches):
                    ahead = self._start(pool, batches[index + 1])
                rows = self._of_batch(function, prepared, batch_size, what)
                yield from zip(batch, rows, strict=True)

    def _start(self, pool, paths):
        return [pool.submit(self._try, path) for path in paths]

    def _try(self, path):
        try:
            return self.prepare(path)
        except MemoryError:
            return "not enough memory for this image"
        except (OSError, ValueError) as error:
            return str(error)

    def _of_batch(self, function, prepared, batch_size, what):
        """Return the row of each image, or what is wrong with it."""
        size = self.settings["image_size"]
        # Pad the last batch, so that one shape is compiled.
        images = np.zeros((batch_size, size, size, 3), np.uint8)
        for row, image in enumerate(prepared):
            if not isinstance(image, str):
                images[row] = image
        computed = np.asarray(function(self.variables, images))
        for index, row in enumerate(computed[: len(prepared)]):
            if isinstance(prepared[index], str):
                yield prepared[index]
            else:
                yield row if np.isfinite(row).all() else _NOT_FINITE.format(what)


def find_images(paths: Iterable) -> list[pathlib.Path]:
    """Return these files and, of folders, all image files below them, sorted.

    Links to folders are followed. What systems and programs leave in folders, links that lead
    nowhere and the like are left out, with a warning for each folder.

    Raises:
      ValueError: lists every path that does not exist and every folder without an image.
    """
    found, problems = [], []
    for path in map(pathlib.Path, file_names.not_a_text(paths, "paths")):
        # Looked up by its absolute path, reported as it was given.
        place = files.local(path)
        if place.is_dir():
            entries = list(file_names.walk(place))
            inside = sorted(path / entry.relative_to(place) for entry, why in entries if not why)
            # Other files are no surprise beside images.
            expected = ("", file_names.SUFFIX)
            left_out = [(str(entry), why) for entry, why in entries if why not in expected]
            if not inside:
                problems.append(f"{path}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
            for line in file_names.left_out_lines(path, left_out):
                logging.warning("%s", line)
            found += inside
        elif place.exists():
            found.append(path)
        elif place.is_symlink():
            problems.append(f"{path}: a link that leads nowhere, to {os.readlink(place)}")
        else:
            problems.append(f"{path}: no such file or folder")
    if problems:
        raise ValueError(
            "\n  ".join([f"{len(problems)} of the given paths have no image:", *problems])
        )
    return found


def _read_file(path: str | os.PathLike) -> bytes:
    path = files.local(path)
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise transforms.DecodeError(f"a file of {size:,} bytes, more than any image takes")
    return path.read_bytes()


def _default_names(count):
    if count == imagenet.NUM_CLASSES:
        return class_names.imagenet_names()
    return tuple(f"class {index}" for index in range(count))
