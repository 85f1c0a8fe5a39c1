"""A report as one HTML page, which needs no network and no other file."""

import base64
from collections.abc import Sequence
from html import escape

from cotnet_jax.reports.summary import ClassFigures, Report
from cotnet_jax.reports.wrong_images import WrongImage

_MOST_CONFUSIONS = 20
# Longer tables are folded.
_OPEN_ROWS = 30

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
.tiles div { flex: 1 1 7rem; padding: .5rem .75rem; border: 1px solid #8886; border-radius: .5rem; }
.tiles b { display: block; font-size: 1.4rem; }
.wide { overflow-x: auto; }
.wide img { background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid #8884; }
.number { text-align: right; white-space: nowrap; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
.images figure { margin: 0; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.images img { width: 100%; max-width: 144px; display: block; }
.note { color: #777; font-size: .9rem; }
"""


def to_html(
    report: Report, wrong: Sequence[WrongImage], *, confusion: bytes, reliability: bytes
) -> str:
    """Return the page.

    Args:
      report: its figures.
      wrong: images to show.
      confusion, reliability: PNG files.
    """
    about = report.about
    step = "" if about["step"] is None else f", step {about['step']}"
    title = f"{about['model']}{step} on {about['split']}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{_about(report)}</p>",
        _tiles(report),
        "<h2>Confusion matrix</h2>",
        _picture(confusion, "Confusion matrix"),
        _confusions(report),
        "<h2>Classes</h2>",
        _classes(report),
        "<h2>Calibration</h2>",
        "<p>How often a prediction is right, by its probability. "
        "On the dashed line the probabilities are what they say.</p>",
        _picture(reliability, "Reliability diagram"),
        "<h2>Wrong images</h2>",
        _wrong(report, wrong),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _about(report: Report) -> str:
    about = report.about
    kind = {"ema": "EMA", "raw": "raw"}[about["kind"]]
    return escape(
        f"{about['images']:,} images of {about['dataset']}, split {about['split']}, at "
        f"{about['image_size']} pixels; {kind} weights of {about['weights']}"
    )


def _tiles(report: Report) -> str:
    names = {
        "top1": "top-1",
        "top5": "top-5",
        "real_top1": "ReaL top-1",
        "class_accuracy": "mean of classes",
        "ece": "calibration error (ECE)",
    }
    tiles = [
        f"<div><b>{report.metrics[name]:.2f} %</b>{shown}</div>"
        for name, shown in names.items()
        if name in report.metrics
    ]
    others = {"raw_top1": "raw weights", "ema_top1": "EMA"}
    tiles += [
        f"<div><b>{report.metrics[name]:.2f} %</b>top-1 of {shown}</div>"
        for name, shown in others.items()
        if name in report.metrics
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _confusions(report: Report) -> str:
    shown = report.confusions[:_MOST_CONFUSIONS]
    if not shown:
        return "<p>No class is taken for another.</p>"
    rows = [
        [
            escape(report.names[each.label]),
            escape(report.names[each.prediction]),
            f"{each.images:,}",
            f"{100 * each.share:.1f} %",
        ]
        for each in shown
    ]
    more = len(report.confusions) - len(shown)
    note = f'<p class="note">{more:,} more pairs are in report.json.</p>' if more else ""
    return "<h2>Worst confusions</h2>" + note + _table("label|taken for|#images|#share", rows)


def _classes(report: Report) -> str:
    """The table of all classes, the worst first."""

    def order(each: ClassFigures) -> float:
        # Those without an image come last.
        return 2.0 if each.accuracy is None else each.accuracy

    rows = [
        [escape(each.name), _percent(each.accuracy), _percent(each.precision), f"{each.images:,}"]
        for each in sorted(report.classes, key=order)
    ]
    head = "class|#accuracy|#precision|#images"
    note = (
        '<p class="note">Accuracy: share of the images of a class that are classified as it. '
        "Precision: share of the images classified as it that are of the class.</p>"
    )
    if len(rows) <= _OPEN_ROWS:
        return note + _table(head, rows)
    worst, others = _table(head, rows[:_OPEN_ROWS]), _table(head, rows[_OPEN_ROWS:])
    return (
        f"{note}<p>The {_OPEN_ROWS} worst:</p>{worst}"
        f"<details><summary>The other {len(rows) - _OPEN_ROWS:,}</summary>{others}</details>"
    )


def _wrong(report: Report, images: Sequence[WrongImage]) -> str:
    wrong = int((~report.predictions.right).sum())
    if not wrong:
        return "<p>None.</p>"
    which = "all" if len(images) == wrong else f"the {len(images)} with the highest probability"
    figures = [
        f'<figure><img loading="lazy" alt="record {each.record}" '
        f'src="{_inline(each.to_jpeg(), "jpeg")}">'
        f"<figcaption>{escape(each.label)}<br>taken for <b>{escape(each.prediction)}</b>, "
        f"{100 * each.probability:.1f} %"
        f'<br><span class="note">{escape(each.file_name) or f"record {each.record}"}</span>'
        "</figcaption></figure>"
        for each in images
    ]
    return f'<p>{wrong:,} images; here {which}.</p><div class="images">{"".join(figures)}</div>'


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table; the columns whose heads begin with # hold numbers."""
    heads = head.split("|")
    classes = [' class="number"' if each.startswith("#") else "" for each in heads]

    def row(tag: str, cells: Sequence[str]) -> str:
        inside = "".join(
            f"<{tag}{style}>{cell}</{tag}>" for style, cell in zip(classes, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    body = "\n".join(row("td", each) for each in rows)
    names = row("th", [each.removeprefix("#") for each in heads])
    return f'<div class="wide"><table>{names}\n{body}</table></div>'


def _picture(png: bytes, name: str) -> str:
    # Half its pixels, for sharp screens; a phone shrinks it as far as it is legible, then scrolls.
    width = int.from_bytes(png[16:20], "big") // 2
    style = f"width: 100%; max-width: {width}px; min-width: {round(0.7 * width)}px"
    return f'<div class="wide"><img alt="{name}" style="{style}" src="{_inline(png, "png")}"></div>'


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
