"""What all pictures share: matplotlib without its global state, colours, captions.

Figures are made and drawn by the Agg backend through their own objects, so that a picture neither
needs a display nor meets the figures of a program that calls this package.
"""

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, whose colours also those who see fewer tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG = COLORS[0], COLORS[1]


def new_figure(width: float, height: float, *, dpi: int = 150, arranged: bool = True) -> "Figure":
    """Return an empty figure of a size in inches, whose plots make room for their labels."""
    from matplotlib.figure import Figure

    return Figure(
        figsize=(width, height),
        dpi=dpi,
        layout="constrained" if arranged else None,
        facecolor="white",
    )


def to_png(figure: "Figure") -> bytes:
    """Draw a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with warnings.catch_warnings():
        # Names of classes may have letters that the font has not: they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def shorten(text: str, longest: int) -> str:
    """Return a text of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"
