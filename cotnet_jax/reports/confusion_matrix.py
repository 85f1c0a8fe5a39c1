"""The confusion matrix as a picture: all classes, or the ones that are confused most."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cotnet_jax.reports.canvas import new_figure, shorten
from cotnet_jax.reports.summary import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More cannot be read on a page.
MOST_CLASSES = 30
_NAME_LENGTH = 24
# Shares from here on have the strongest colour, so that rare confusions are seen.
_STRONGEST_WRONG = 0.3


def draw(report: Report) -> "Figure":
    """Draw counts by label (rows) and prediction (columns), coloured by the share of the label.

    With more than ``MOST_CLASSES`` classes, those of the most frequent confusions are drawn, beside
    each other, and one column has the predictions of all other classes.
    """
    shown = most_confused(report)
    counts = report.counts[np.ix_(shown, shown)]
    columns = [shorten(report.names[i], _NAME_LENGTH) for i in shown]
    rows = list(columns)
    hidden = len(report.names) - len(shown)
    if hidden:
        rest = report.counts[shown].sum(1) - counts.sum(1)
        counts = np.concatenate([counts, rest[:, None]], axis=1)
        columns.append(f"{hidden} other classes")
    shares = counts / np.maximum(1, report.counts[shown].sum(1))[:, None]

    cell = 0.3 if len(shown) > 15 else 0.5
    margin = 0.4 + 0.085 * max(map(len, columns))
    figure = new_figure(
        max(5.0, cell * len(columns) + margin + 0.3), max(5.0, cell * len(rows) + margin + 0.9)
    )
    axes = figure.add_subplot()
    right = np.eye(*counts.shape) > 0
    none = counts == 0
    for mask, colormap, strongest in (
        (~right | none, "Blues", 1.0),
        (right | none, "Oranges", _STRONGEST_WRONG),
    ):
        # The palest colours are left out: they would not differ from none.
        values = np.ma.masked_array(shares, mask)
        axes.imshow(values, cmap=colormap, vmin=-0.2 * strongest, vmax=strongest)
    for row, column in zip(*counts.nonzero(), strict=True):
        strong = shares[row, column] / (1.0 if right[row, column] else _STRONGEST_WRONG) > 0.6
        text = str(counts[row, column])
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=min(9.0, 55 * cell / max(2, len(text))),
            color="white" if strong else "black",
        )
    _label(axes, rows, columns)
    title = f"Confusion matrix of {report.about['images']} images"
    if hidden:
        title = f"{len(shown)} most confused of {len(report.names)} classes"
    axes.set_title(title, fontsize=11)
    return figure


def most_confused(report: Report) -> list[int]:
    """Return the classes to draw: all in order, or those of the most frequent confusions.

    Two classes that are confused come one after the other, so that confusions lie near the
    diagonal.
    """
    if len(report.names) <= MOST_CLASSES:
        return list(range(len(report.names)))
    # Filled up by the first classes, where so few are confused.
    pairs = [(each.label, each.prediction) for each in report.confusions]
    chosen = dict.fromkeys(i for pair in [*pairs, range(MOST_CLASSES)] for i in pair)
    return _neighbours(list(chosen)[:MOST_CLASSES], report.counts)


def _neighbours(classes: list[int], counts: np.ndarray) -> list[int]:
    """Return classes in an order in which each follows the one that it is confused with most."""
    rest, ordered = classes[1:], classes[:1]
    while rest:
        last = ordered[-1]
        confused = [counts[last, each] + counts[each, last] for each in rest]
        ordered.append(rest.pop(int(np.argmax(confused))))
    return ordered


def _label(axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    short = all(len(name) <= 2 for name in columns)
    size = 8 if len(rows) > 15 else 9
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=0 if short else 90,
        fontsize=size,
        parse_math=False,
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=size, parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.tick_params(length=0)
    # Lines between the cells.
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
