"""The order of images, the threads that make them, and the batches that come out.

A training step's batch depends on config.seed and on the step's number alone: not on threads,
worker processes or hosts, nor on where the run was interrupted. Going on after step s is asking
for the stream that starts at step s.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import logging

from cotnet_jax.data import randaugment, transforms
from cotnet_jax.data.sources import Source, open_source
from cotnet_jax.data.workers import StartTogether, end_with_main_process, read_with_workers

Batch = dict[str, np.ndarray]
# Further entries of an example: name -> function of the source's element, or of None for padding.
ExampleFields = Mapping[str, Callable[[Mapping[str, Any] | None], np.ndarray]]

# An undecodable image is replaced by the next one; so many in a row mean that all are.
_REPLACEMENTS = 32
# Most images that a thread makes at a time.
_PART = 16


class UndecodableError(RuntimeError):
    """More images than config.data.max_undecodable cannot be decoded."""


def steps_per_epoch(config: ml_collections.ConfigDict, source: Source | None = None) -> int:
    """Full batches in one pass over the training split; the rest of the pass is left out.

    Args:
      config: the whole configuration.
      source: the opened training split, where the caller has it.

    Raises:
      ValueError: the split has fewer images than a batch.
    """
    source = source or open_source(config.data, config.data.train_split)
    steps = len(source) // config.batch_size
    if steps == 0:
        raise ValueError(
            f"config.batch_size = {config.batch_size} is more than the {len(source)} images of "
            f"{config.data.name!r} {config.data.train_split!r}; use a smaller one"
        )
    return steps


def train_batches(
    config: ml_collections.ConfigDict,
    *,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
) -> Iterator[Batch]:
    """An endless stream of training batches, from step start_step on.

    Every epoch has its own order, of which the first steps_per_epoch(config) batches are used.
    Process p reads rows p*b .. (p+1)*b of each global batch, b = batch_size / process_count, so
    the global batch is the same for any number of processes.

    Args:
      config: the whole configuration.
      start_step: number of the first step to make a batch for, counted from 0 over all epochs.
      process_index, process_count: which process asks, of how many.
      source: the opened training split, where the caller has it.

    Returns:
      An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b]}; close() ends its threads.

    Raises:
      ValueError: batch_size is not a multiple of process_count, or exceeds the split.
      UndecodableError: while iterating, above the share config.data.max_undecodable.
    """
    rows = _local_batch("config.batch_size", config.batch_size, process_count)
    source = source or open_source(config.data, config.data.train_split)
    epoch_size = steps_per_epoch(config, source) * config.batch_size
    # Independent of each other and of those of neighbouring seeds.
    order_seed, augment_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
    images = order[:epoch_size].repeat().random_map(TrainExample(source, config), seed=augment_seed)
    local = _Rows(images, start_step, rows, process_index, config.batch_size)
    return _checked(_batches(local, rows, config.data), config.data, len(source))


def eval_batches(
    config: ml_collections.ConfigDict,
    *,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
    example_fields: ExampleFields | None = None,
    repeat: bool = False,
) -> Iterator[Batch]:
    """One pass over the evaluation split, every image once over all processes.

    All processes get the same number of batches; what is missing at the end is filled with
    images of zeros whose mask is 0. An image that cannot be decoded is black, with mask 1.

    Args:
      config: the whole configuration.
      process_index, process_count: which process asks, of how many.
      source: the opened evaluation split, where the caller has it.
      example_fields: further entries of every example: {name: function of the source's element,
        or of None for padding}. The functions run in the threads and workers that read images.
      repeat: pass after pass without end, each of ``steps_per_pass`` batches, from the same
        threads and workers, which between two passes have made the next one's beginning and wait.

    Returns:
      An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": float32 [b]} with
      b = config.eval.batch_size / process_count, and [b, ...] for each of ``example_fields``;
      close() ends its threads and workers.

    Raises:
      ValueError: config.eval.batch_size is not a multiple of process_count.
      UndecodableError: while iterating, above the share config.data.max_undecodable.
    """
    size = config.eval.batch_size
    rows = _local_batch("config.eval.batch_size", size, process_count)
    source = source or open_source(config.data, config.data.eval_split)
    steps = steps_per_pass(config, source)
    images = grain.MapDataset.range(steps * size).map(EvalExample(source, config, example_fields))
    local = _Rows(images.repeat() if repeat else images, 0, rows, process_index, size)
    if not repeat:
        local = local[: steps * rows]
    return _checked(_batches(local, rows, config.data), config.data, len(source))


def steps_per_pass(config: ml_collections.ConfigDict, source: Source) -> int:
    """Batches in one pass over the evaluation split."""
    return -(-len(source) // config.eval.batch_size)


def available_cores() -> int:
    """Cores that this process may use, which containers and schedulers limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TrainExample:
    """Reads, decodes and augments the training image of an index."""

    def __init__(self, source: Source, config: ml_collections.ConfigDict):
        self._source = source
        self._size = config.data.image_size
        self._interpolation = config.data.interpolation
        self._mean, self._std = tuple(config.data.mean), tuple(config.data.std)
        # Plain values, read once: attribute access on a ConfigDict costs more than a flip.
        self._augment = dict(config.augment)
        self._randaugment = randaugment.parse(config.augment.randaugment)

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        for replacement in range(_REPLACEMENTS):
            element = self._source[(index + replacement) % len(self._source)]
            try:
                image = _decoded(element["image"])
            except transforms.DecodeError as error:
                last_error = error
                continue
            if isinstance(element["image"], bytes):
                image = self.augment(image, rng)
            return _example(image, element["label"], undecodable=index if replacement else -1)
        raise UndecodableError(
            f"none of the {_REPLACEMENTS} images from index {index} on can be decoded: {last_error}"
        )

    def augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop, flip, RandAugment or colour jitter, erasing: uint8 [H, W, 3] -> [S, S, 3]."""
        settings = self._augment
        image = transforms.random_resized_crop(
            image,
            self._size,
            rng,
            scale=settings["scale"],
            ratio=settings["ratio"],
            interpolation=self._interpolation,
        )
        image = transforms.random_flip(image, rng, settings["flip"])
        if self._randaugment:
            image = self._randaugment(image, rng)
        else:
            image = randaugment.color_jitter(image, rng, settings["color_jitter"])
        image = np.asarray(image)
        if settings["erasing_probability"] > 0:
            image = randaugment.random_erasing(
                image,
                rng,
                probability=settings["erasing_probability"],
                mode=settings["erasing_mode"],
                area=settings["erasing_area"],
                ratio=settings["erasing_ratio"],
                mean=self._mean,
                std=self._std,
            )
        return image


class EvalExample:
    """Reads, decodes and crops the evaluation image of an index; zeros past the end."""

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

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        blank = np.zeros((self._size, self._size, 3), np.uint8)
        if index >= len(self._source):
            return _example(blank, 0, mask=np.float32(0), **self._extra(None))
        element = self._source[index]
        try:
            image, undecodable = _decoded(element["image"]), -1
        except transforms.DecodeError:
            image, undecodable = blank, index
        else:
            if isinstance(element["image"], bytes):
                image = transforms.eval_transform(
                    image, self._size, crop=self._crop, interpolation=self._interpolation
                )
        extra = self._extra(element)
        return _example(image, element["label"], undecodable, mask=np.float32(1), **extra)

    def _extra(self, element: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        return {name: field(element) for name, field in self._fields.items()}


class _Rows(grain.MapDataset):
    """One process's rows of every global batch, from a given step on."""

    def __init__(self, parent, start_step: int, rows: int, process_index: int, batch_size: int):
        super().__init__(parent)
        self._first = start_step * batch_size + process_index * rows
        self._rows, self._batch_size = rows, batch_size

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        return self._parent[self._first + step * self._batch_size + row]


def _batches(
    images: grain.MapDataset, rows: int, data: ml_collections.ConfigDict
) -> grain.IterDataset:
    # Threads and workers make a batch in parts, so that none waits for another's whole batch; the
    # parts are several images because Grain spends 0.2 ms a part on handing it over.
    part = max(size for size in range(1, _PART + 1) if rows % size == 0)
    workers = available_cores() if data.num_workers < 0 else data.num_workers
    parts_ahead = max(data.num_threads, data.prefetch * rows // (part * max(1, workers)))
    parts = images.batch(part, drop_remainder=True).to_iter_dataset(
        grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=parts_ahead)
    )
    if workers:
        # Worker w makes parts w, w + workers, ... and they are taken in turn: the same stream.
        parts = parts.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=parts_ahead),
            worker_init_fn=end_with_main_process,
        )
        parts = StartTogether(parts)
    batches = parts.batch(rows // part, drop_remainder=True, batch_fn=_join)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch)


def _join(parts: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _checked(
    batches: grain.IterDataset, data: ml_collections.ConfigDict, total: int
) -> Iterator[Batch]:
    """Counts the images that could not be decoded, each once, and stops at too many."""
    undecodable: set[int] = set()
    with contextlib.closing(read_with_workers(batches)) as read:
        for batch in read:
            indices = batch.pop("undecodable")
            for index in indices[indices >= 0].tolist():
                if index not in undecodable:
                    undecodable.add(index)
                    logging.warning(
                        "Image %d of %r cannot be decoded and is replaced (%d so far).",
                        index,
                        data.name,
                        len(undecodable),
                    )
            if len(undecodable) > data.max_undecodable * total:
                raise UndecodableError(
                    f"{len(undecodable)} of the {total} images of {data.name!r} cannot be "
                    f"decoded, more than config.data.max_undecodable = {data.max_undecodable:g} "
                    f"allows; the first are {sorted(undecodable)[:10]}"
                )
            yield batch


def _decoded(image: bytes | np.ndarray) -> np.ndarray:
    return transforms.decode(image) if isinstance(image, bytes) else image


def _example(image: np.ndarray, label: int, undecodable: int = -1, **extra) -> dict:
    return {
        "image": image,
        "label": np.int32(label),
        "undecodable": np.int64(undecodable),
        **extra,
    }


def _local_batch(name: str, batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"{name} = {batch_size} must be a positive multiple of the {process_count} processes"
        )
    return batch_size // process_count
