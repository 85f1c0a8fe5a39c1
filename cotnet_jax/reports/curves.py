"""The curves of a run, or of several in one figure."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from cotnet_jax import files
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.reports.canvas import COLORS, new_figure, shorten, to_png
from cotnet_jax.training.metric_writer import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panel: [(name in metrics.jsonl, line style, what it is where a panel has several)].
_PANELS = {
    "training loss": [("loss", "-", "")],
    "top-1, %": [("ema_top1", "-", "EMA"), ("raw_top1", ":", "raw")],
    "learning rate": [("learning_rate", "-", "")],
    "images per second": [("images_per_second", "-", "")],
}
_NAME_LENGTH = 40


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's metrics.

    Attributes:
      name: to show.
      metrics: {step: {name: value, None where it is not finite}}.
    """

    name: str
    metrics: dict[int, dict[str, float | None]]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a metric, [N] each."""
        points = [
            (step, values[name])
            for step, values in self.metrics.items()
            if values.get(name) is not None
        ]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values


def read_runs(workdirs: Sequence[str | Path]) -> list[Run]:
    """Read the metrics of runs, named by the part of their paths that differs.

    Raises:
      ValueError: lists every folder without metrics; or no folder is given.
    """
    if not workdirs:
        raise ValueError("no run is given whose curves could be drawn")
    paths = [files.local(each) for each in workdirs]
    found = [Workdir(path).metrics for path in paths]
    problems = [
        f"{path.parent}: " + (f"no {path.name} in it" if path.parent.is_dir() else "no such folder")
        for path in found
        if not path.is_file()
    ]
    runs = [read_metrics(path) if path.is_file() else {} for path in found]
    problems += [
        f"{path}: no line of metrics in it"
        for path, run in zip(found, runs, strict=True)
        if path.is_file() and not run
    ]
    if problems:
        raise ValueError(
            "\n  ".join([f"{len(problems)} of the given folders are no run's workdir:", *problems])
        )
    return [Run(name, run) for name, run in zip(_names(paths), runs, strict=True)]


def draw(runs: Sequence[Run]) -> "Figure":
    """Draw loss, top-1, learning rate and speed of runs over their steps."""
    figure = new_figure(10.0, 7.0)
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (title, curves) in zip(grid.flat, _PANELS.items(), strict=True):
        _draw_panel(axes, title, curves, runs)
    for axes in grid[1]:
        axes.set_xlabel("step")
    title = shorten(runs[0].name, 2 * _NAME_LENGTH) if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def write(workdirs: Sequence[str | Path], output: str | Path) -> None:
    """Draw the curves of runs into a PNG file.

    Raises:
      ValueError: as ``read_runs``.
      OSError: the file cannot be written.
    """
    png = to_png(draw(read_runs(workdirs)))
    try:
        files.write_whole(output, png)
    except OSError as error:
        raise OSError(f"Could not write {output}: {error.strerror or error}") from None


def write_after_training(workdir: str | Path) -> None:
    """Draw a run's curves into its workdir; a problem is a warning, as the training is done."""
    path = Workdir(workdir).curves
    try:
        write([workdir], path)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        logging.warning("%s was not drawn: %s", path, reason)
    else:
        logging.info("The curves are in %s.", path)


def _draw_panel(axes: "Axes", title: str, curves, runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        for position, (name, style, kind) in enumerate(curves):
            steps, values = run.curve(name)
            if not len(steps):
                continue
            # One run's two curves have a colour each; several runs each have one.
            color = COLORS[(index if len(runs) > 1 else position) % len(COLORS)]
            parts = [shorten(run.name, _NAME_LENGTH)] * (len(runs) > 1) + [kind] * bool(kind)
            axes.plot(
                steps,
                values,
                style,
                color=color,
                linewidth=1.6,
                marker="." if len(steps) < 40 else "",
                label=" ".join(parts),
            )
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        legend = axes.legend(handles, labels, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return paths without what all of them begin with; one alone has its last part."""
    if len(paths) == 1:
        return [paths[0].name]
    shared = 0
    while len({path.parts[: shared + 1] for path in paths}) == 1:
        if shared + 1 >= min(len(path.parts) for path in paths):
            break
        shared += 1
    return ["/".join(path.parts[shared:]) for path in paths]
