"""The reliability diagram: how often the network is right when it is so sure."""

from typing import TYPE_CHECKING

from cotnet_jax.reports.canvas import RIGHT, WRONG, new_figure
from cotnet_jax.reports.summary import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(report: Report) -> "Figure":
    """Draw accuracy over confidence, and how many images have which confidence.

    Guo et al., arXiv 1706.04599, figure 1; a calibrated network lies on the diagonal.
    """
    bins = [each for each in report.bins if each.images]
    middles = [(each.low + each.high) / 2 for each in bins]
    width = report.bins[0].high - report.bins[0].low
    figure = new_figure(5.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(
        middles,
        [each.accuracy for each in bins],
        width,
        color=RIGHT,
        edgecolor="white",
        label="accuracy",
    )
    above.plot(
        [each.confidence for each in bins],
        [each.accuracy for each in bins],
        "o",
        color="black",
        markersize=3,
        label="at the mean confidence",
    )
    above.plot([0, 1], [0, 1], "--", color=WRONG, linewidth=1.5, label="calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    above.set_title(f"ECE {report.metrics['ece']:.2f} % ({len(report.bins)} bins)", fontsize=11)
    above.legend(loc="upper left", fontsize=9)
    below.bar(middles, [each.images for each in bins], width, color="#888888", edgecolor="white")
    below.set_yscale("log")
    below.set(xlabel="confidence", ylabel="images")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure
