"""Images that cannot be decoded: a few are reported, too many stop the run."""

import contextlib
from collections.abc import Generator

import ml_collections
import numpy as np
from absl import logging

Batch = dict[str, np.ndarray]


class UndecodableError(RuntimeError):
    """More images cannot be decoded than config.data.max_undecodable allows."""


def limit_undecodable(
    batches: Generator[Batch, None, None], data: ml_collections.ConfigDict, num_images: int
) -> Generator[Batch, None, None]:
    """Yield the batches without their entry "undecodable", after counting what it lists.

    Args:
      batches: their entry "undecodable", int64 [b], has the indices of images that cannot be
        decoded, and -1 for all others. Closed at the end.
      data: config.data; the fields name and max_undecodable are read.
      num_images: number of images in the split.

    Raises:
      UndecodableError: a larger share than max_undecodable cannot be decoded. However often an
        image comes, it is counted and logged once.
    """
    found: set[int] = set()
    with contextlib.closing(batches):
        for batch in batches:
            indices = batch.pop("undecodable")
            for index in indices[indices >= 0].tolist():
                if index not in found:
                    found.add(index)
                    logging.warning(
                        "Image %d of %r cannot be decoded and is replaced (%d so far).",
                        index,
                        data.name,
                        len(found),
                    )
            if len(found) > data.max_undecodable * num_images:
                raise UndecodableError(
                    f"{len(found)} of the {num_images} images of {data.name!r} cannot be "
                    f"decoded, more than config.data.max_undecodable = {data.max_undecodable:g} "
                    f"allows; the first are {sorted(found)[:10]}"
                )
            yield batch
