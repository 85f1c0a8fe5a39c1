"""Checkpoints of a run: written in the background by Orbax, checked before they are trusted.

Each step is one folder, put in place by one rename once it is complete. Beside Orbax's files it
holds a manifest with the step's metrics and the checksums of its files (checksums.py).
"""

import contextlib
import functools
import logging as std_logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.checkpointers import async_checkpointer
from orbax.checkpoint._src.futures import future, signaling_client
from orbax.checkpoint.checkpoint_managers import (
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from cotnet_jax import files
from cotnet_jax.checkpoint import checksums, weight_values
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.config import weight_kinds

T = TypeVar("T")

_ITEMS = ("weights", "ema", "optimizer")
# The newest step may turn out to be damaged: the one before it must still be there.
_KEEP_LATEST = 2
# Attempts, 0.1 s apart, at removing an unfinished checkpoint.
_REMOVALS = 20


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why, and what to do."""


def open_checkpoints(
    workdir: Workdir, config: Mapping[str, Any], *, read_only: bool = False
) -> "Checkpointer":
    """Open the checkpoints of the run in ``workdir``, whose configuration is ``config``."""
    best_metric = f"{weight_kinds(config)[-1]}_top1"
    if read_only:
        # An earlier version may have written them, whose configuration had fewer fields.
        return Checkpointer(workdir.checkpoints, best_metric=best_metric, read_only=True)
    return Checkpointer(
        workdir.checkpoints,
        best_metric=best_metric,
        keep_best=config["checkpoint"]["keep_best"],
        timeout_seconds=config["distributed"]["slow_timeout_seconds"],
    )


def find_steps(directory: epath.PathLike) -> list[int]:
    """Return the steps that a folder has checkpoints of, damaged ones too, ascending."""
    directory = epath.Path(directory)
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def has_steps(directory: epath.PathLike) -> bool:
    """Return whether a folder exists and holds any checkpoint, damaged or not."""
    return bool(find_steps(directory))


class Checkpointer:
    """Save and restore a :class:`TrainState`, keeping the latest two steps and the best ones.

    In a run of several processes every process calls every method, with the same arguments, and
    ``directory`` is on a file system that all of them see. Usable as a context manager.

    Args:
      directory: folder of the checkpoints, made if missing.
      keep_best: number of steps kept for their metric, besides the latest two.
      best_metric: name in the metrics given to :meth:`save`; larger is better.
      read_only: nothing is written, made or cleaned up; for reading another run's weights.
      timeout_seconds: longest time that one process waits for the others to finish a write.

    Raises:
      CheckpointError: the directory cannot be written to, is not shared by all processes, or,
        with ``read_only``, does not exist.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_best: int = 0,
        best_metric: str = "ema_top1",
        read_only: bool = False,
        timeout_seconds: int = 600,
    ):
        self.directory = epath.Path(files.local(directory)).resolve()
        self._best_metric = best_metric
        self._read_only = read_only
        self._metrics: dict[int, dict[str, float]] = {}
        self._writing: int | None = None

        _quieten_orbax()
        _keep_orbax_from_wall_time()
        if read_only:
            if not self.directory.is_dir():
                raise CheckpointError(f"No checkpoints: the folder {self.directory} is missing.")
        else:
            _check_writable(self.directory)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in _ITEMS:
            # zstd takes 7 % off float weights, and cores away from decoding images.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            registry.add(item, ocp.args.PyTreeSave, handler)
            registry.add(item, ocp.args.PyTreeRestore, handler)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=_KeepLatestAndBest(self._ranked, keep_best),
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=timeout_seconds,
                    post_finalization_callback=self._write_manifest_of_new_step,
                ),
            ),
            handler_registry=registry,
        )
        self._load_metrics()

    def all_steps(self) -> list[int]:
        """Return the steps that have a checkpoint or are being written, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Return the last step that has a checkpoint; None without any."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the largest ``best_metric``, the later of equals; None without."""
        return next(iter(self._ranked(self.all_steps())), None)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics saved with a step; {} when it has none."""
        return dict(self._metrics.get(step, {}))

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> bool:
        """Start to write a checkpoint of ``state.step``; return once its arrays are on the host.

        A step that exists is not written again, but gains ``metrics`` if it had none.

        Args:
          state: replicated over all devices; may be donated as soon as this returns.
          metrics: metrics kept with the step; ``best_metric`` among them ranks it.

        Returns:
          Whether a write was started.

        Raises:
          CheckpointError: this or the previous write failed; older checkpoints are intact.
        """
        step = int(state.step)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self.wait()
        if step in self.all_steps():
            if metrics and not self.metrics(step):
                self._metrics[step] = metrics
                if jax.process_index() == 0:
                    with self._explain_failure(step):
                        folder = self._folder(step)
                        sums = checksums.read(folder)["files"]
                        checksums.write(folder, sums, {"metrics": metrics})
            return False
        self._metrics[step], self._writing = metrics, step
        items = {
            name: ocp.args.PyTreeSave(tree)
            for name, tree in _to_items(state).items()
            if tree is not None
        }
        with self._explain_failure(step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return True

    def wait(self) -> None:
        """Wait until the write under way is finished and in place.

        Raises:
          CheckpointError: it failed; older checkpoints are intact.
        """
        with self._explain_failure(self._writing):
            self._manager.wait_until_finished()
        self._writing = None

    def close(self) -> None:
        """Finish the write under way and end the background threads.

        Raises:
          CheckpointError: the write failed; older checkpoints are intact.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as close_error:
            if error is None:
                raise
            logging.error("%s", close_error)

    def restore_latest(self, example: TrainState) -> TrainState | None:
        """Restore the newest good checkpoint; return None when there is none at all.

        Good ones are undamaged, and all their values are finite. A newer one that is not is named
        in a warning and renamed to STEP.damaged, so that its step can be written again.

        Args:
          example: arrays or ``jax.ShapeDtypeStruct`` with shardings; the restored arrays get its
            structure and shardings, whatever devices and processes wrote them.

        Raises:
          CheckpointError: no checkpoint is good, or the newest undamaged one is of another model
            or of other options.
        """
        self.wait()
        steps = self.all_steps()[::-1]
        if not steps:
            return None
        state, passed_over = self._first_good(steps, lambda step: self._restore(step, example))
        if passed_over and not self._read_only:
            self._rename(passed_over, "damaged")
        return state

    def latest_good_step(self, *, before: int) -> int | None:
        """Return the newest step before another that is undamaged and finite on disk, or None."""
        self.wait()
        older = [step for step in self.all_steps()[::-1] if step < before]
        try:
            _, passed_over = self._first_good(older, self._read_arrays)
        except CheckpointError:
            return None
        return older[len(passed_over)]

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint to STEP.diverged, so that the run resumes from the one before it."""
        self.wait()
        self._rename([step], "diverged")

    def restore_weights(
        self, step: int | str = "latest", kind: str = "ema"
    ) -> dict[str, dict[str, Any]]:
        """Read the weights of one checkpoint, without the optimizer.

        Args:
          step: a step, "latest" or "best"; the latter two skip damaged ones, and those with
            values that are not finite, with a warning.
          kind: "ema" or "raw".

        Returns:
          {"params", "batch_stats"}, nested dicts of NumPy arrays.

        Raises:
          CheckpointError: there is no such step, it is damaged or not finite, or it has no EMA.
          ValueError: ``step`` or ``kind`` is none of the above.
        """
        return self.restore_step_and_weights(step, kind)[1]

    def restore_step_and_weights(
        self, step: int | str = "latest", kind: str = "ema"
    ) -> tuple[int, dict[str, dict[str, Any]]]:
        """Return the step that ``restore_weights`` reads for these arguments, and its weights."""
        if kind not in ("ema", "raw"):
            raise ValueError(f'kind must be "ema" or "raw", not {kind!r}.')
        self.wait()
        if step == "latest":
            candidates = self.all_steps()[::-1]
        elif step == "best":
            candidates = self._ranked(self.all_steps())
        elif isinstance(step, int):
            candidates = [step] if step in self.all_steps() else []
        else:
            raise ValueError(f'step must be a number, "latest" or "best", not {step!r}.')
        if not candidates:
            wanted = f"{step} step" if isinstance(step, str) else f"step {step}"
            raise CheckpointError(
                f"No checkpoint of the {wanted} in {self.directory}; "
                f"there are: {_shorten(self.all_steps()) or 'none'}."
            )
        item = {"ema": "ema", "raw": "weights"}[kind]
        arrays, passed_over = self._first_good(
            candidates, lambda step: self._read_arrays(step, item)
        )
        return candidates[len(passed_over)], arrays[item]

    def _ranked(self, steps: Sequence[int]) -> list[int]:
        """Return the steps that have ``best_metric``, best first."""

        def value(step: int) -> float:
            return self._metrics.get(step, {}).get(self._best_metric, np.nan)

        measured = [step for step in steps if not np.isnan(value(step))]
        return sorted(measured, key=lambda step: (value(step), step), reverse=True)

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _load_metrics(self) -> None:
        for step in self.all_steps():
            with contextlib.suppress(checksums.DamageError):
                self._metrics[step] = checksums.read(self._folder(step))["metrics"]

    def _write_manifest_of_new_step(self) -> None:
        """Called by Orbax on the first process, after the last file and before the rename."""
        step = self._writing
        assert step is not None
        folder = next(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"), self._folder(step))
        checksums.write(folder, checksums.checksums(folder), {"metrics": self._metrics[step]})

    def _first_good(
        self, steps: Sequence[int], read: Callable[[int], T]
    ) -> tuple[T, Sequence[int]]:
        """Return what ``read`` gives for the first good one of ``steps``, and those before it.

        Raises:
          CheckpointError: none is undamaged with finite values.
        """
        problems = []
        for index, step in enumerate(steps):
            problem = self._find_damage(step)
            if problem is None:
                arrays = read(step)
                not_finite = weight_values.find_not_finite(arrays)
                if not not_finite:
                    if index:
                        logging.warning("Using the checkpoint of step %d instead.", step)
                    return arrays, steps[:index]
                problem = f"{len(not_finite)} arrays have values that are not finite:\n    "
                problem += "\n    ".join(not_finite)
            problems.append(f"step {step}: {problem}")
            if jax.process_index() == 0:
                shortened = _shorten(problems[-1].splitlines(), "\n")
                logging.warning("Damaged checkpoint in %s: %s", self.directory, shortened)
        raise CheckpointError(
            f"No checkpoint in {self.directory} can be read:\n  " + "\n  ".join(problems) + "\n"
            "Restore one from a copy, or start again with another --workdir."
        )

    def _find_damage(self, step: int) -> str | None:
        """Return how a checkpoint differs from its manifest; None where it does not."""
        problem = None
        if jax.process_index() == 0:
            try:
                checksums.check(self._folder(step))
            except checksums.DamageError as error:
                problem = str(error)
        if jax.process_count() > 1:
            # One process checks and decides for all: they must not disagree.
            damaged = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
            if damaged and problem is None:
                problem = "process 0 prints the reason"
        return problem

    def _rename(self, steps: Sequence[int], suffix: str) -> None:
        if jax.process_index() == 0:
            for step in steps:
                folder = self._folder(step)
                target = folder.with_name(f"{step}.{suffix}")
                if target.exists():
                    target.rmtree()
                folder.rename(target)
                logging.warning("Renamed the %s %s to %s.", suffix, folder, target.name)
        _barrier("cotnet_jax renamed checkpoints")
        self._manager.reload()

    def _restore(self, step: int, example: TrainState) -> TrainState:
        abstract = {
            name: jax.tree.map(_abstract, tree)
            for name, tree in _to_items(example).items()
            if tree is not None
        }
        saved = self._saved_arrays(step)
        differences = _differences(saved, abstract)
        if differences:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} does not fit this run "
                f"({len(differences)} differences):\n  {_shorten(differences, chr(10) + '  ')}\n"
                "It was made by another model or with other options: use that run's config, or "
                "another --workdir."
            )
        args = {
            name: ocp.args.PyTreeRestore(
                item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in abstract.items()
        }
        return _from_items(self._read(step, args), example)

    def _saved_arrays(self, step: int) -> dict[str, Any]:
        """Return {item: nested dict of array descriptions} of what a step holds."""
        return {
            name: metadata.tree
            for name, metadata in self._manager.item_metadata(step).items()
            if name in _ITEMS and metadata is not None
        }

    def _read_arrays(self, step: int, item: str | None = None) -> dict[str, Any]:
        """Return {item: nested dict of NumPy arrays} of one item of a step, or of all."""
        saved = self._saved_arrays(step)
        if item is not None and item not in saved:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} has no EMA, which was off in "
                'that run. Ask for the raw weights (kind="raw").'
            )
        args = {
            name: ocp.args.PyTreeRestore(
                restore_args=jax.tree.map(
                    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved[name]
                )
            )
            for name in ([item] if item else saved)
        }
        restored = self._read(step, args)
        return {name: restored[name] for name in args}

    def _read(self, step: int, args: Mapping[str, ocp.args.PyTreeRestore]) -> ocp.args.Composite:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise CheckpointError(
                f"Could not read the checkpoint of step {step} in {self.directory}: "
                f"{_cause(error)}."
            ) from error

    def _remove_unfinished(self, step: int | None) -> None:
        """Remove what a failed write of a step left, while its other threads may still write."""
        for _ in range(_REMOVALS):
            leftovers = list(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"))
            if not leftovers:
                break
            for leftover in leftovers:
                with contextlib.suppress(OSError):
                    leftover.rmtree()
            time.sleep(0.1)

    @contextlib.contextmanager
    def _explain_failure(self, step: int | None) -> Iterator[None]:
        """Turn a failed write into one CheckpointError, and remove what it had written."""
        try:
            yield
        except Exception as error:
            self._writing = None
            if step is not None:
                self._metrics.pop(step, None)
            logging.debug("Failed to write step %s", step, exc_info=True)
            if jax.process_index() == 0:
                self._remove_unfinished(step)
            with contextlib.suppress(OSError):
                self._manager.reload()
            raise CheckpointError(
                f"Could not write the checkpoint of step {step} to {self.directory}: "
                f"{_cause(error)}. Earlier checkpoints are intact (steps: "
                f"{_shorten(self.all_steps()) or 'none'}). Free disk space or repair the folder, "
                "then start the same command again."
            ) from None


class _KeepLatestAndBest(PreservationPolicy):
    """Orbax's BestN alone would delete the latest step when it is not among the best."""

    def __init__(self, ranked: Callable[[Sequence[int]], list[int]], keep_best: int):
        self._ranked = ranked
        self._keep_best = keep_best

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> list[bool]:
        del context
        steps = sorted(info.step for info in checkpoints)
        kept = {*steps[-_KEEP_LATEST:], *self._ranked(steps)[: self._keep_best]}
        return [info.step in kept for info in checkpoints]


def _to_items(state: TrainState) -> dict[str, Any]:
    """Return the parts that are stored apart, so that the weights can be read alone."""
    return {
        "weights": {"params": state.params, "batch_stats": state.batch_stats},
        "ema": state.ema,
        "optimizer": {
            "step": state.step,
            "key": state.key,
            # Plain dicts, so that the files do not depend on optax's classes.
            "opt_state": flax.serialization.to_state_dict(state.opt_state),
        },
    }


def _from_items(items: Mapping[str, Any], example: TrainState) -> TrainState:
    optimizer = items["optimizer"]
    return TrainState(
        step=optimizer["step"],
        params=items["weights"]["params"],
        batch_stats=items["weights"]["batch_stats"],
        ema=None if example.ema is None else items["ema"],
        opt_state=flax.serialization.from_state_dict(example.opt_state, optimizer["opt_state"]),
        key=optimizer["key"],
    )


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _differences(saved, wanted) -> list[str]:
    def describe(tree) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    saved, wanted = describe(saved), describe(wanted)
    return [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{wanted.get(name, 'absent')} in this run"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]


def _shorten(items: Sequence, separator: str = ", ", longest: int = 10) -> str:
    shown = separator.join(str(item) for item in items[:longest])
    return shown + (f"{separator}..." if len(items) > longest else "")


def _cause(error: BaseException) -> str:
    """Return the message of the first of a chain of exceptions, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    # TensorStore's messages name the same path three times around the reason.
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else f"{type(error).__name__}: {text[:500]}"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _check_writable(directory: epath.Path) -> None:
    """Raise at the start, not after the first epoch, if nothing can be saved here."""
    token, problem = time.time_ns() % 2**31, ""
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f".probe-{token}").write_text("")
        except OSError as error:
            token, problem = -1, f": {error}"
    everywhere = True
    if jax.process_count() > 1:
        token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
        here = token >= 0 and (directory / f".probe-{token}").exists()
        everywhere = bool(np.all(multihost_utils.process_allgather(np.int32(here))))
    if token < 0:
        raise CheckpointError(
            f"Cannot write checkpoints to {directory}{problem}. Choose a writable --workdir."
        )
    if jax.process_index() == 0:
        (directory / f".probe-{token}").unlink()
    if not everywhere:
        raise CheckpointError(
            f"{directory} is not the same folder on all {jax.process_count()} processes. Choose "
            "a --workdir on a file system that all hosts share."
        )


@functools.cache
def _quieten_orbax() -> None:
    """Once per process, leave the report of a failed write to CheckpointError alone."""
    logging.get_absl_logger().addFilter(_hide_orbax_details)
    # The arrays that fail after the first one: each is a task whose result nobody reads.
    asyncio_logger = std_logging.getLogger("asyncio")
    asyncio_logger.addFilter(lambda record: "/orbax/" not in record.getMessage())
    earlier_hook = sys.unraisablehook

    def hook(unraisable) -> None:
        # TensorStore reports those arrays to an event loop that has ended.
        if str(unraisable.exc_value) != "Event loop is closed":
            earlier_hook(unraisable)

    sys.unraisablehook = hook


class _MonotonicTime:
    """The module ``time`` with monotonic time for ``time()``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, "monotonic" if name == "time" else name)


@functools.cache
def _keep_orbax_from_wall_time() -> None:
    """Once per process, let Orbax measure its timeouts by monotonic time.

    By wall time a write ends with "Timed out after 1799.99 seconds" as soon as the clock is set
    forward by more than the timeout, which a machine without a battery does when it hears of the
    network's time.
    """
    for module in (async_checkpointer, future, signaling_client):
        module.time = _MonotonicTime()


def _hide_orbax_details(record: std_logging.LogRecord) -> bool:
    """Keep Orbax from burying the run's own lines: each write logs thirty lines at INFO, and each
    failure, which is raised as CheckpointError anyway, hundreds of traceback at ERROR."""
    expected = record.levelno != std_logging.WARNING or "read only" in str(record.msg)
    return not expected or "/orbax/" not in record.pathname
