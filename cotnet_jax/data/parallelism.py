"""How many processes and threads make the images, and how much memory they take."""

import dataclasses
import math
from pathlib import Path

import joblib
import ml_collections

# Up to so many cores the threads of one process decode as fast as processes would: only Python's
# own part of the work, a few percent, waits for its turn.
_CORES_FOR_THREADS = 4
# Threads that are chosen for each core, so that some decode while others wait for the disk, and the
# most of all.
_THREADS_PER_CORE, _MAX_THREADS = 4, 16
# Largest number of images that a thread makes at a time.
_MAX_PART = 16
# Memory of a process, in bytes, without images: 233 MB were measured.
_PROCESS_BYTES = 250e6
# Training and evaluation each have processes of their own; together they get half of the memory.
_PIPELINES = 2
_MEMORY_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """Who makes the images of one pipeline.

    Attributes:
      workers: processes besides the main one; 0: its own threads.
      threads: of each process.
      part: images that a thread makes at a time; a batch is a whole number of parts.
      parts_ahead: parts that each process makes ready before they are needed.
      batches_ahead: whole batches that the main process makes ready.
    """

    workers: int
    threads: int
    part: int
    parts_ahead: int
    batches_ahead: int

    def num_bytes(self, rows: int, image_size: int) -> int:
        """Return about how much memory this takes at most, without the images being decoded.

        Args:
          rows: images of a batch in this process.
          image_size: side of the images in pixels.
        """
        # With threads and one more batch that is being joined.
        images = self.part * self.parts_ahead * max(1, self.workers)
        images += rows * (self.batches_ahead + 1)
        return round(self.workers * _PROCESS_BYTES) + images * 3 * image_size**2

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        if not self.workers:
            return threads
        return f"{self.workers} process{'es' * (self.workers != 1)} of {threads}"


def choose_parallelism(data: ml_collections.ConfigDict, rows: int) -> Parallelism:
    """Choose what config.data leaves open, for this machine.

    Processes, where there are more than four cores: one for each core, but no more than the batches
    that are prepared ahead give work to, twice, nor than fit into a quarter of the free memory.
    Noise needs none.

    Args:
      data: config.data; the fields name, fake, num_workers, num_threads and prefetch are read.
      rows: images of a batch in this process.
    """
    # Parts, so that no thread waits for a whole batch of another. A part has several images because
    # Grain takes 0.2 ms to hand over a part of any size.
    part = max(size for size in range(1, _MAX_PART + 1) if rows % size == 0)
    cores = available_cores()
    workers = data.num_workers
    if workers < 0 and (cores <= _CORES_FOR_THREADS or is_noise(data)):
        workers = 0
    elif workers < 0:
        useful = 2 * data.prefetch * rows // part
        free = min(available_memory(), cores * _PROCESS_BYTES * _PIPELINES / _MEMORY_SHARE)
        fitting = round(_MEMORY_SHARE * free / _PIPELINES / _PROCESS_BYTES)
        workers = max(1, min(cores, useful, fitting))
    threads = data.num_threads or (1 if workers else min(_THREADS_PER_CORE * cores, _MAX_THREADS))
    return Parallelism(
        workers=workers,
        threads=threads,
        part=part,
        parts_ahead=max(threads, data.prefetch * rows // (part * max(1, workers))),
        batches_ahead=data.prefetch,
    )


def is_noise(data: ml_collections.ConfigDict) -> bool:
    """Return whether config.data asks for noise in place of images."""
    return data.fake or data.name == "synthetic"


def available_cores() -> int:
    """Return how many cores this process may use; containers and schedulers can limit them."""
    return joblib.cpu_count()


def available_memory() -> float:
    """Return the bytes of memory that are free, or infinity where the system does not tell."""
    return min(_free_on_the_host(), _left_in_the_container())


def _free_on_the_host() -> float:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return math.inf


def _left_in_the_container() -> float:
    """Return what the control groups of this process leave; versions 1 and 2 of Linux's cgroups."""
    left = [math.inf]
    for line in _lines("/proc/self/cgroup"):
        _, controller, path = line.split(":", 2)
        if controller not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controller)
        group = root / path.lstrip("/")
        # Each limit holds for all groups inside. A container may see its own group as the root.
        folders = [each for each in (group, *group.parents) if each.is_relative_to(root)]
        left += [_left_in_group(each, version=1 if controller else 2) for each in folders]
    return min(left)


def _left_in_group(folder: Path, version: int) -> float:
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    limit, used = (_lines(f"{folder}/memory.{name}") for name in names)
    if not limit or not used or not limit[0].isdigit():
        return math.inf
    # Files that were read count as used, but give way.
    kinds = [f"{'total_' * (version == 1)}{kind}_file" for kind in ("active", "inactive")]
    sizes = dict(line.split() for line in _lines(f"{folder}/memory.stat"))
    return int(limit[0]) - int(used[0]) + sum(int(sizes.get(kind, 0)) for kind in kinds)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
