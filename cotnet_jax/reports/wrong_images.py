"""The images that the network gets wrong, surest first, as the network saw them."""

import dataclasses
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cotnet_jax.data.examples import EvalExample
from cotnet_jax.reports.canvas import RIGHT, WRONG, new_figure, shorten
from cotnet_jax.reports.summary import Report
from cotnet_jax.training.setup import EvalSetup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IMAGES = 40
_COLUMNS = 8
_NAME_LENGTH = 20
# Of the images in a page, in pixels.
_SIDE = 144
# Of the contact sheet, in inches: a cell's width and height, the space between images, the height
# of the title, and that of a line of text.
_CELL = (1.6, 2.15)
_GAP = 0.1
_HEAD = 0.65
_LINE = 0.2


@dataclasses.dataclass(frozen=True)
class WrongImage:
    """An image that is classified wrongly.

    Attributes:
      pixels: uint8 [S, S, 3], as the network saw it.
      record: its number in the split.
      file_name: "" where the dataset has none.
      label, prediction: names of the classes.
      probability: of the prediction, 0..1.
    """

    pixels: np.ndarray
    record: int
    file_name: str
    label: str
    prediction: str
    probability: float

    def to_jpeg(self) -> bytes:
        """Return a small picture; tiny images keep their pixels, enlarged."""
        image = Image.fromarray(self.pixels)
        smaller = image.width > _SIDE
        filter = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
        file = io.BytesIO()
        image.resize((_SIDE, _SIDE), filter).save(file, "JPEG", quality=80)
        return file.getvalue()


def read_wrong_images(setup: EvalSetup, report: Report) -> list[WrongImage]:
    """Read the wrong images of the highest probability again, at most ``MOST_IMAGES``."""
    example = EvalExample(setup.eval_source, setup.config)
    found = report.predictions
    return [
        WrongImage(
            pixels=np.asarray(example(record)["image"]),
            record=record,
            file_name=found.file_names[record],
            label=report.names[found.labels[record]],
            prediction=report.names[found.classes[record, 0]],
            probability=float(found.probabilities[record, 0]),
        )
        for record in found.most_confident_errors(MOST_IMAGES).tolist()
    ]


def draw_contact_sheet(images: list[WrongImage], report: Report) -> "Figure":
    """Draw wrong images in a grid, each with label, prediction and probability."""
    wrong = int((~report.predictions.right).sum())
    columns = min(_COLUMNS, max(4, len(images)))
    rows = -(-len(images) // columns)
    # One plot in inches for all of them: laying out one for each takes seconds.
    width, height = columns * _CELL[0], rows * _CELL[1] + _HEAD
    figure = new_figure(width, height, dpi=120, arranged=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    shown = f", the {len(images)} surest" if len(images) < wrong else ""
    title = f"{wrong:,} of {report.about['images']:,} images are wrong{shown}"
    axes.text(width / 2, 0.25, title, ha="center", va="center", fontsize=11)
    legend = "above: label; below: prediction and its probability"
    axes.text(width / 2, 0.5, legend, ha="center", va="center", fontsize=8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = column * _CELL[0] + _GAP / 2, row * _CELL[1] + _HEAD + _LINE
        side = _CELL[0] - _GAP
        axes.imshow(
            image.pixels,
            extent=(left, left + side, top + side, top),
            interpolation="nearest" if image.pixels.shape[0] < _SIDE else "auto",
            aspect="auto",
        )
        middle = left + side / 2
        label, prediction = (
            shorten(name, _NAME_LENGTH) for name in (image.label, image.prediction)
        )
        below = f"{prediction}\n{100 * image.probability:.1f} %"
        style: dict[str, Any] = {"ha": "center", "fontsize": 8, "parse_math": False}
        axes.text(middle, top - 0.04, label, va="bottom", color=RIGHT, **style)
        axes.text(middle, top + side + 0.04, below, va="top", color=WRONG, **style)
    # Each image has set them to its own.
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure
