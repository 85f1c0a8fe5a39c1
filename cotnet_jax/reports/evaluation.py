"""Evaluate weights and write the report, or many weights and write one table."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from cotnet_jax import files
from cotnet_jax.checkpoint.checkpointer import CheckpointError, find_steps
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.distributed.first_process import run_on_first
from cotnet_jax.reports.summary import Report, summarize
from cotnet_jax.reports.writing import explained, write_report
from cotnet_jax.training.evaluate import FoundWeights, find_weights, open_eval_loop
from cotnet_jax.training.metric_writer import write_events
from cotnet_jax.training.setup import EvalSetup, set_up_evaluation
from cotnet_jax.weights.loading import run_of

# Where reports go that belong to no run.
_FOLDER = "evaluations"
_TABLE = ("weights", "model", "step", "kind", "top1", "top5", "ece", "images", "seconds")
# Longest time that processes wait until the first one has made a folder.
_SHARE_SECONDS = 300


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | Path | None = None,
    *,
    output: str | Path | None = None,
) -> tuple[dict[str, float], Path]:
    """Evaluate weights as ``evaluate_only`` does, and write a report of the last kind of them.

    Args:
      config: as in configs/default.py; ``evaluation_config`` makes one from a run or weights.
      workdir: the run whose best checkpoint is evaluated where config.init_from is "".
      output: folder of the report. None: a folder of its own in evaluations/ of the run that the
        weights are of, or of the current folder; a run gets the metrics in
        evaluations/metrics.jsonl and for TensorBoard as well.

    Returns:
      The metrics, as ``evaluate_only``, and the folder of the report.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: as ``evaluate_only``.
      OSError: the report could not be written.
    """
    setup = set_up_evaluation(config, report=True)
    found = find_weights(setup, workdir)
    run = _run_of(setup.config, workdir)
    folder = files.local(output) if output else _evaluations(run) / _name(setup, found)
    with _made(folder), open_eval_loop(setup) as eval_loop:
        evaluation = eval_loop.evaluate(found.variables)
    if jax.process_index() == 0:
        report = summarize(setup, found, evaluation)
        write_report(folder, report, setup)
        if run and not output:
            _write_metrics(run, report)
    return evaluation.metrics, folder


def evaluate_each(
    configs: Sequence[ml_collections.ConfigDict],
    workdir: str | Path | None = None,
    *,
    output: str | Path | None = None,
) -> tuple[list[dict[str, Any]], Path]:
    """Evaluate many weights, one after the other, and write one table of all.

    The table is written anew after each of them, so that a stop leaves those that are done.
    Weights that cannot be evaluated are left out, and reported at the end.

    Args:
      configs: one for each, with config.init_from; those that differ in the weights alone share
        what is compiled and the workers that read images.
      workdir: a run, in whose evaluations/ the table goes.
      output: the folder of the table in its place.

    Returns:
      {column: value} of each, and the file. Columns: the path of the weights, model, step, kind,
      top1, top5 and ece in percent, images, seconds.

    Raises:
      ValueError: lists the weights that could not be evaluated, and why.
      OSError: the table could not be written.
    """
    run = Workdir(workdir) if workdir is not None else None
    folder = files.local(output) if output else _evaluations(run)
    data = configs[0].data
    path = folder / f"table-{_slug(Path(data.name).name, data.eval_split)}.csv"
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    with _made(folder):
        for row in _rows(configs, problems):
            rows.append(row)
            if jax.process_index() == 0:
                with explained(folder):
                    files.write_whole(path, _to_csv(rows))
    if problems:
        what = f"{len(problems)} of {len(configs)} weights could not be evaluated"
        rest = f"\nThe others are in {path}." if rows else ""
        raise ValueError("\n  ".join([f"{what}:", *problems]) + rest)
    return rows, path


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of ``evaluate_each`` as text, in columns."""
    cells = [
        [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(_TABLE, *cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (_TABLE, *cells)
    )


def checkpoints_of(workdir: str | Path) -> list[Path]:
    """Return the paths of all checkpoints of a run, which are weights, by ascending step.

    Raises:
      ValueError: there is none.
    """
    folder = Workdir(workdir).checkpoints
    steps = find_steps(folder)
    if not steps:
        raise ValueError(f"{workdir}: no checkpoint in it")
    return [folder / str(step) for step in steps]


def _rows(
    configs: Sequence[ml_collections.ConfigDict], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield each row; add a line to ``problems`` for each of the weights that has none."""
    for _, group in itertools.groupby(configs, _without_weights):
        group = list(group)
        setup = set_up_evaluation(group[0], report=True)
        with open_eval_loop(setup) as eval_loop:
            for config in group:
                logging.info("Evaluating %s.", config.init_from)
                try:
                    given = dataclasses.replace(setup, config=config)
                    found = find_weights(given, None)
                    evaluation = eval_loop.evaluate(found.variables)
                except (ValueError, OSError, CheckpointError) as error:
                    problems.append(str(error))
                    continue
                figures = summarize(given, found, evaluation)
                row = figures.about | figures.metrics
                yield {name: row[name] for name in _TABLE}


def _without_weights(config: ml_collections.ConfigDict) -> str:
    config = config.copy_and_resolve_references()
    config.init_from = config.init_kind = ""
    return config.to_json()


def _to_csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _TABLE, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder before hours of work for it; remove it again if they fail and it is empty."""

    def make() -> None:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)

    run_on_first(make, _SHARE_SECONDS)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _run_of(config: ml_collections.ConfigDict, workdir: str | Path | None) -> Workdir | None:
    """Return the run that the weights are of; of given ones, that of the workdir comes second."""
    run = run_of(config.init_from) if config.init_from else None
    return run or (Workdir(workdir) if workdir is not None else None)


def _evaluations(run: Workdir | None) -> Path:
    return run.evaluations if run else files.local(_FOLDER)


def _name(setup: EvalSetup, found: FoundWeights) -> str:
    """Return the name of a report's folder: STEP-DATASET-SPLIT-KIND."""
    data = setup.config.data
    of = Path(found.path).name.split(".")[0] if found.step is None else str(found.step)
    return _slug(of, Path(data.name).name, data.eval_split, found.kind)


def _slug(*parts: str) -> str:
    """Join parts to a name that every file system takes; slices of splits stay apart."""
    texts = (part.replace(":", "to").replace("%", "pct") for part in parts)
    return "-".join(re.sub(r"[^\w.+-]+", "_", text).strip("_") for text in texts)


def _write_metrics(run: Workdir, report: Report) -> None:
    about = report.about
    line = {"time": round(time.time(), 3), **about, **report.metrics}
    # Apart from the run's own: another process may be at work on those.
    with explained(run.evaluations):
        files.append_line(run.evaluations / "metrics.jsonl", json.dumps(line))
        folder = run.tensorboard / _slug("evaluate", Path(about["dataset"]).name, about["split"])
        write_events(
            folder,
            about["step"] or 0,
            {
                name if name.startswith(("raw_", "ema_")) else f"{about['kind']}_{name}": value
                for name, value in report.metrics.items()
            },
        )
