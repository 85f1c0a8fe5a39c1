"""Batches of images, made by threads and worker processes.

The batch of a training step depends on config.seed and the step's number alone: not on the number
of threads, worker processes or hosts, nor on interruptions. To resume after step s is to ask for
the stream that starts at step s.
"""

from collections.abc import Generator, Sequence

import grain
import ml_collections
import numpy as np

from cotnet_jax.data.examples import EvalExample, ExampleFields, TrainExample
from cotnet_jax.data.labels import BalancedOrder, read_labels
from cotnet_jax.data.parallelism import choose_parallelism
from cotnet_jax.data.sources import Source, open_source
from cotnet_jax.data.undecodable import Batch, limit_undecodable
from cotnet_jax.data.workers import StartTogether, exit_with_main_process, read_with_workers


def steps_per_epoch(config: ml_collections.ConfigDict, source: Source | None = None) -> int:
    """Return the number of full batches in one pass over the training split.

    Args:
      config: the whole configuration.
      source: the training split, if the caller has opened it.

    Raises:
      ValueError: the split has fewer images than a batch.
    """
    source = source or open_source(config.data, config.data.train_split)
    steps = len(source) // config.batch_size
    if steps == 0:
        raise ValueError(
            f"config.batch_size = {config.batch_size} is more than the {len(source)} images of "
            f"{config.data.name!r}, split {config.data.train_split!r}; use a smaller batch"
        )
    return steps


def train_batches(
    config: ml_collections.ConfigDict,
    *,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
) -> Generator[Batch, None, None]:
    """Return an endless stream of training batches that begins at a given step.

    Every epoch has its own order, and uses the first ``steps_per_epoch`` batches of it. With
    config.data.balanced_sampling every class has its own order, and they take turns in a random
    one.
    Process p reads rows p*b .. (p+1)*b of each global batch, b = batch_size / process_count, so
    the global batch is the same for any number of processes.

    Args:
      config: the whole configuration.
      start_step: the first step to make a batch for, counted from 0 over all epochs.
      process_index: this process, counted from 0.
      process_count: number of processes.
      source: the training split, if the caller has opened it.

    Returns:
      A generator of {"image": uint8 [b, S, S, 3], "label": int32 [b]}; close() ends its threads
      and workers.

    Raises:
      ValueError: batch_size is not a multiple of process_count, or exceeds the split.
      UndecodableError: while iterating, if more than the share config.data.max_undecodable of
        the images cannot be decoded.
    """
    rows = _rows_per_process("config.batch_size", config.batch_size, process_count)
    source = source or open_source(config.data, config.data.train_split)
    epoch_size = steps_per_epoch(config, source) * config.batch_size
    # Independent of each other and of those that neighbouring seeds give.
    order_seed, augment_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    if config.data.balanced_sampling:
        labels = read_labels(source, config.data.train_split)
        order = BalancedOrder(labels, epoch_size, order_seed).shuffle(seed=order_seed)
    else:
        order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
    epochs = order[:epoch_size].repeat()
    examples = epochs.random_map(TrainExample(source, config), seed=augment_seed)
    local = _Rows(examples, start_step, rows, process_index, config.batch_size)
    return _read(local, rows, config.data, len(source))


def eval_batches(
    config: ml_collections.ConfigDict,
    *,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
    example_fields: ExampleFields | None = None,
    repeat: bool = False,
) -> Generator[Batch, None, None]:
    """Return the batches of one pass over the evaluation split.

    Over all processes, every image comes exactly once. All processes get the same number of
    batches: the last ones are padded with images of zeros, whose mask is 0. An image that cannot
    be decoded is black, with mask 1.

    Args:
      config: the whole configuration.
      process_index: this process, counted from 0.
      process_count: number of processes.
      source: the evaluation split, if the caller has opened it.
      example_fields: further entries of every example: {name: function of the source's element,
        or of None for padding}. The functions run in the threads and workers that read images.
      repeat: repeat the pass, of ``steps_per_pass`` batches, without end. The threads and workers
        stay and, between two passes, prefetch the beginning of the next one.

    Returns:
      A generator of {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": float32 [b]} with
      b = config.eval.batch_size / process_count, and [b, ...] for each of ``example_fields``;
      close() ends its threads and workers.

    Raises:
      ValueError: config.eval.batch_size is not a multiple of process_count.
      UndecodableError: while iterating, if more than the share config.data.max_undecodable of
        the images cannot be decoded.
    """
    size = config.eval.batch_size
    rows = _rows_per_process("config.eval.batch_size", size, process_count)
    source = source or open_source(config.data, config.data.eval_split)
    steps = steps_per_pass(config, source)
    example = EvalExample(source, config, example_fields)
    examples = grain.MapDataset.range(steps * size).map(example)
    local = _Rows(examples.repeat() if repeat else examples, 0, rows, process_index, size)
    if not repeat:
        local = local[: steps * rows]
    return _read(local, rows, config.data, len(source))


def steps_per_pass(config: ml_collections.ConfigDict, source: Source) -> int:
    """Return the number of batches in one pass over the evaluation split."""
    return -(-len(source) // config.eval.batch_size)


class _Rows(grain.MapDataset):
    """The rows of one process in every global batch, from a given step on."""

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


def _read(
    examples: grain.MapDataset, rows: int, data: ml_collections.ConfigDict, num_images: int
) -> Generator[Batch, None, None]:
    batches = read_with_workers(_batches(examples, rows, data))
    return limit_undecodable(batches, data, num_images)


def _batches(
    examples: grain.MapDataset, rows: int, data: ml_collections.ConfigDict
) -> grain.IterDataset:
    chosen = choose_parallelism(data, rows)
    ahead = chosen.parts_ahead
    parts = examples.batch(chosen.part, drop_remainder=True).to_iter_dataset(
        grain.ReadOptions(num_threads=chosen.threads, prefetch_buffer_size=ahead)
    )
    if chosen.workers:
        # Worker w makes parts w, w + workers, ..., and they are read in turn: the same stream.
        parts = parts.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=chosen.workers, per_worker_buffer_size=ahead),
            worker_init_fn=exit_with_main_process,
        )
        parts = StartTogether(parts)
    batches = parts.batch(rows // chosen.part, drop_remainder=True, batch_fn=_join)
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=chosen.batches_ahead
    )


def _join(parts: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows_per_process(name: str, batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"{name} = {batch_size} must be a positive multiple of the {process_count} processes"
        )
    return batch_size // process_count
