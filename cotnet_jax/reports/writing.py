"""Write a report: report.json, predictions.csv, three PNGs and report.html."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotnet_jax import files
from cotnet_jax.checkpoint.workdir import describe_environment
from cotnet_jax.reports import confusion_matrix, reliability
from cotnet_jax.reports.canvas import to_png
from cotnet_jax.reports.page import to_html
from cotnet_jax.reports.predictions_csv import to_csv
from cotnet_jax.reports.summary import Report
from cotnet_jax.reports.wrong_images import draw_contact_sheet, read_wrong_images
from cotnet_jax.training.setup import EvalSetup

PAGE = "report.html"


def write_report(folder: Path, report: Report, setup: EvalSetup) -> None:
    """Write all files of a report; those of an earlier one are replaced.

    Args:
      folder: made if missing.
      report: from ``summarize``.
      setup: of the evaluation, whose wrong images are read again.

    Raises:
      OSError: a file could not be written; the message names the folder.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wrong = read_wrong_images(setup, report)
    matrix = to_png(confusion_matrix.draw(report))
    diagram = to_png(reliability.draw(report))
    contents: dict[str, str | bytes] = {
        "report.json": to_json(report, describe_environment(setup.mesh)),
        "predictions.csv": to_csv(report),
        "confusion_matrix.png": matrix,
        "reliability.png": diagram,
        "wrong_images.png": to_png(draw_contact_sheet(wrong, report)),
        PAGE: to_html(report, wrong, confusion=matrix, reliability=diagram),
    }
    with explained(folder):
        for name, content in contents.items():
            files.write_whole(folder / name, content)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Raise an OSError inside as one that says what was not written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Could not write the evaluation to {folder}: {error.strerror or error}. Choose "
            "another folder by --output=DIR, or none by --no_report."
        ) from None


def to_json(report: Report, environment: dict[str, Any]) -> str:
    """Return a report as a JSON object, one entry on a line.

    The confusion matrix is a list of [label, prediction, images] of those that are not 0.
    """
    labels, predictions = report.counts.nonzero()
    images = report.counts[labels, predictions]
    content = {
        **report.about,
        "metrics": report.metrics,
        "classes": [dataclasses.asdict(each) for each in report.classes],
        "confusions": [dataclasses.asdict(each) for each in report.confusions],
        "confusion_matrix": [
            list(each)
            for each in zip(labels.tolist(), predictions.tolist(), images.tolist(), strict=True)
        ],
        "calibration": [dataclasses.asdict(each) for each in report.bins],
        "environment": environment,
    }
    lines = (
        f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}"
        for name, value in content.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
