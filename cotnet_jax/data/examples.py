"""From an index to one example: read, decode, and augment or crop the image.

An example is {"image": uint8 [S, S, 3], "label": int32, "undecodable": int64}. The last is the
index if its image cannot be decoded and another image or black was put in its place, else -1.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from cotnet_jax.data import randaugment, scaled_decoding, transforms
from cotnet_jax.data.labels import check_label
from cotnet_jax.data.sources import Source
from cotnet_jax.data.undecodable import UndecodableError

# A training image that cannot be decoded is replaced by the next one that can, at most this far on.
_MAX_REPLACEMENTS = 32

Example = dict[str, np.ndarray | np.generic]
# Further entries of an example: name -> function of the source's element, or of None for padding.
ExampleFields = Mapping[str, Callable[[Mapping[str, Any] | None], np.ndarray]]


class TrainExample:
    """Make the augmented training example of an index.

    Args:
      source: the training split.
      config: the whole configuration; config.data and config.augment are read.
    """

    def __init__(self, source: Source, config: ml_collections.ConfigDict):
        self._source = source
        self._split = config.data.train_split
        self._crop: Callable[..., Image.Image] = functools.partial(
            scaled_decoding.random_resized_crop,
            size=config.data.image_size,
            scaled=config.data.scaled_decoding,
            scale=config.augment.scale,
            ratio=config.augment.ratio,
            interpolation=config.data.interpolation,
            **_decoding(source, config.data),
        )
        self._mean, self._std = tuple(config.data.mean), tuple(config.data.std)
        # Plain values, read once: attribute access on a ConfigDict costs more than a flip.
        self._settings = dict(config.augment)
        recipe = randaugment.parse(config.augment.randaugment)
        self._randaugment = recipe if config.augment.randaugment_on == "host" else None
        # As published, only where RandAugment is off.
        self._color_jitter = 0.0 if recipe else config.augment.color_jitter

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """Return the example of an index; ``rng`` is the source of all randomness.

        Raises:
          UndecodableError: this image and all the images that could replace it are undecodable.
          LabelError: the label is not that of a class.
        """
        last_error: Exception | None = None
        for offset in range(_MAX_REPLACEMENTS):
            record = (index + offset) % len(self._source)
            try:
                element = self._source[record]
                image = element["image"]
                if isinstance(image, bytes):
                    image = self.augment(image, rng)
            except (transforms.DecodeError, MemoryError) as error:
                last_error = error
                continue
            label = check_label(element["label"], self._source, self._split, record)
            return _example(image, label, undecodable=index if offset else -1)
        raise UndecodableError(
            f"none of the {_MAX_REPLACEMENTS} images from index {index} on can be decoded: "
            f"{last_error}"
        )

    def augment(self, image: bytes, rng: np.random.Generator) -> np.ndarray:
        """Decode, crop, flip, apply RandAugment, unless the device does, or colour jitter; erase.

        Args:
          image: the compressed image.
          rng: source of all randomness.

        Returns:
          uint8 [S, S, 3].

        Raises:
          DecodeError: the image cannot be decoded.
        """
        settings = self._settings
        pil_image = self._crop(image, rng=rng)
        pil_image = transforms.random_flip(pil_image, rng, settings["flip"])
        if self._randaugment:
            pil_image = self._randaugment(pil_image, rng)
        pil_image = randaugment.color_jitter(pil_image, rng, self._color_jitter)
        augmented = np.asarray(pil_image)
        if settings["erasing_probability"] > 0:
            augmented = randaugment.random_erasing(
                augmented,
                rng,
                probability=settings["erasing_probability"],
                mode=settings["erasing_mode"],
                area=settings["erasing_area"],
                ratio=settings["erasing_ratio"],
                mean=self._mean,
                std=self._std,
            )
        return augmented


class EvalExample:
    """Make the evaluation example of an index, with "mask": float32.

    The mask is 1, or 0 for indices past the end of the split, whose images are black. An image
    that cannot be decoded is black with mask 1; if its whole record cannot be read, its label is 0.

    Args:
      source: the evaluation split.
      config: the whole configuration; config.data is read.
      example_fields: further entries of every example.
    """

    def __init__(
        self,
        source: Source,
        config: ml_collections.ConfigDict,
        example_fields: ExampleFields | None = None,
    ):
        self._source = source
        self._split = config.data.eval_split
        self._decode: Callable[[bytes], np.ndarray] = functools.partial(
            transforms.decode, **_decoding(source, config.data)
        )
        self._fields = example_fields or {}
        self._size = config.data.image_size
        self._crop = config.data.crop
        self._interpolation = config.data.interpolation

    def __call__(self, index: int) -> Example:
        """Return the example of an index.

        Raises:
          LabelError: the label is not that of a class.
        """
        image = np.zeros((self._size, self._size, 3), np.uint8)
        label, undecodable, mask, element = 0, -1, 0, None
        if index < len(self._source):
            mask = 1
            try:
                element = self._source[index]
                label = check_label(element["label"], self._source, self._split, index)
                image = self._transform(element["image"])
            except (transforms.DecodeError, MemoryError):
                undecodable = index
        example = _example(image, label, undecodable) | {"mask": np.float32(mask)}
        return example | {name: field(element) for name, field in self._fields.items()}

    def _transform(self, image: bytes | np.ndarray) -> np.ndarray:
        if not isinstance(image, bytes):
            return image
        return transforms.eval_transform(
            self._decode(image),
            self._size,
            crop=self._crop,
            interpolation=self._interpolation,
        )


def file_name_of(element: Mapping[str, Any] | None) -> np.ndarray:
    """Return the file name of a source's element, one of ``ExampleFields``; "" for padding."""
    return np.asarray(element["file_name"] if element else "")


def _decoding(source: Source, data: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return ``transforms.decode``'s options: the limit and the EXIF orientation of config.data."""
    exif = data.exif_orientation
    if exif is None:
        exif = getattr(source, "exif_orientation", False)
    return {"max_pixels": data.max_pixels, "exif_orientation": exif}


def _example(image: np.ndarray, label: int, undecodable: int) -> Example:
    return {
        "image": image,
        "label": np.int32(label),
        "undecodable": np.int64(undecodable),
    }
