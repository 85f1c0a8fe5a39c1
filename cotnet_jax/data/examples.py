"""From an index to one example: read, decode, and augment or crop the image.

An example is {"image": uint8 [S, S, 3], "label": int32, "undecodable": int64}. The last is the
index if its image cannot be decoded and another image or black was put in its place, else -1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from cotnet_jax.data import randaugment, transforms
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
        self._size = config.data.image_size
        self._interpolation = config.data.interpolation
        self._mean, self._std = tuple(config.data.mean), tuple(config.data.std)
        # Plain values, read once: attribute access on a ConfigDict costs more than a flip.
        self._settings = dict(config.augment)
        self._randaugment = randaugment.parse(config.augment.randaugment)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """Return the example of an index; ``rng`` is the source of all randomness.

        Raises:
          UndecodableError: this image and all the images that could replace it are undecodable.
        """
        last_error = None
        for offset in range(_MAX_REPLACEMENTS):
            element = self._source[(index + offset) % len(self._source)]
            image = element["image"]
            if isinstance(image, bytes):
                try:
                    decoded = transforms.decode(image)
                except transforms.DecodeError as error:
                    last_error = error
                    continue
                image = self.augment(decoded, rng)
            return _example(image, element["label"], undecodable=index if offset else -1)
        raise UndecodableError(
            f"none of the {_MAX_REPLACEMENTS} images from index {index} on can be decoded: "
            f"{last_error}"
        )

    def augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop, flip, apply RandAugment or colour jitter, and erase.

        Args:
          image: uint8 [H, W, 3].
          rng: source of all randomness.

        Returns:
          uint8 [S, S, 3].
        """
        settings = self._settings
        pil_image = transforms.random_resized_crop(
            image,
            self._size,
            rng,
            scale=settings["scale"],
            ratio=settings["ratio"],
            interpolation=self._interpolation,
        )
        pil_image = transforms.random_flip(pil_image, rng, settings["flip"])
        if self._randaugment:
            pil_image = self._randaugment(pil_image, rng)
        else:
            pil_image = randaugment.color_jitter(pil_image, rng, settings["color_jitter"])
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
    that cannot be decoded is black with mask 1.

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
        self._fields = example_fields or {}
        self._size = config.data.image_size
        self._crop = config.data.crop
        self._interpolation = config.data.interpolation

    def __call__(self, index: int) -> Example:
        """Return the example of an index."""
        image = np.zeros((self._size, self._size, 3), np.uint8)
        label, undecodable, mask, element = 0, -1, 0, None
        if index < len(self._source):
            element = self._source[index]
            label, mask = element["label"], 1
            try:
                image = self._transform(element["image"])
            except transforms.DecodeError:
                undecodable = index
        example = _example(image, label, undecodable) | {"mask": np.float32(mask)}
        return example | {name: field(element) for name, field in self._fields.items()}

    def _transform(self, image: bytes | np.ndarray) -> np.ndarray:
        if not isinstance(image, bytes):
            return image
        return transforms.eval_transform(
            transforms.decode(image),
            self._size,
            crop=self._crop,
            interpolation=self._interpolation,
        )


def _example(image: np.ndarray, label: int, undecodable: int) -> Example:
    return {
        "image": image,
        "label": np.int32(label),
        "undecodable": np.int64(undecodable),
    }
