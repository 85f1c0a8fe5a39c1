"""An evaluation as a report: every image once, files that agree, pictures that are pictures."""

import ast
import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from helpers import small_dataset
from helpers.small_network import create_small
from PIL import Image

from cotnet_jax import reports
from cotnet_jax.data.class_names import imagenet_names, imagenet_wnids
from cotnet_jax.distributed.watchdog import Watchdog
from cotnet_jax.reports import confusion_matrix, summary
from cotnet_jax.reports.canvas import to_png
from cotnet_jax.reports.page import to_html
from cotnet_jax.reports.summary import summarize
from cotnet_jax.reports.writing import write_report
from cotnet_jax.reports.wrong_images import draw_contact_sheet
from cotnet_jax.training import setup
from cotnet_jax.training.evaluate import EvalLoop, FoundWeights

# What HTML, CSV, matplotlib's mathematics and its font could each stumble over.
NAMES = ("<b>cat</b>", 'a "quoted", $dog_1$ $x', "狗")
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def weights_of(model):
    """Random weights that are sure of themselves."""
    variables = model.init(jax.random.key(3), jnp.zeros((1, 8, 8, 3)))
    variables["params"]["head"]["kernel"] *= 20
    return variables


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(setup, report) of random weights: ten images in batches of four, the last one padded."""
    folder = tmp_path_factory.mktemp("dataset") / "mine"
    config = small_dataset.config_for(small_dataset.write(folder, LABELS, class_names=NAMES))
    config.data.crop = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "create_model", create_small)
        run = setup.set_up_evaluation(config, devices=jax.devices()[:1], report=True)
    found = FoundWeights("/runs/<mine>", 7, "ema", {"ema": weights_of(run.model)})
    with EvalLoop(run, Watchdog(config.distributed)) as eval_loop:
        twice = [eval_loop.evaluate(found.variables) for _ in range(2)]
    # The threads have begun the second pass when the first one ends.
    assert twice[0].metrics == twice[1].metrics
    return run, summarize(run, found, twice[1])


@pytest.fixture(scope="module")
def folder(evaluated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    write_report(folder, evaluated[1], evaluated[0])
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return list(csv.DictReader(io.StringIO((folder / "predictions.csv").read_text())))


def test_every_image_has_its_own_row(evaluated, rows):
    run, _ = evaluated
    assert [row["record"] for row in rows] == [str(record) for record in range(10)]
    assert [row["file_name"] for row in rows] == [f"{record}.png" for record in range(10)]
    assert [int(row["label"]) for row in rows] == LABELS
    # The network itself, image by image.
    images = np.stack([Image.open(io.BytesIO(run.eval_source[i]["image"])) for i in range(10)])
    mean, std = (255 * np.array(run.config.data[name]) for name in ("mean", "std"))
    logits = run.model.apply(weights_of(run.model), (images - mean) / std)
    expected = np.asarray(jax.nn.softmax(logits))
    for row, probabilities in zip(rows, expected, strict=True):
        order = np.argsort(-probabilities)
        assert [int(row[f"top{n}"]) for n in (1, 2, 3)] == order.tolist()
        assert [row[f"top{n}_name"] for n in (1, 2, 3)] == [NAMES[i] for i in order]
        np.testing.assert_allclose(
            [float(row[f"top{n}_probability"]) for n in (1, 2, 3)], probabilities[order], atol=1e-4
        )
        assert row["correct"] == str(int(row["label"] == row["top1"]))


def test_the_figures_are_those_of_the_rows(evaluated, folder, rows):
    """The counts were summed on the devices, the rows were not."""
    content = json.loads((folder / "report.json").read_text())
    labels, top = (np.array([int(row[name]) for row in rows]) for name in ("label", "top1"))
    matrix = np.zeros((3, 3), int)
    for label, prediction, images in content["confusion_matrix"]:
        matrix[label, prediction] = images
    np.testing.assert_array_equal(matrix, sklearn.metrics.confusion_matrix(labels, top))
    assert content["metrics"]["top1"] == pytest.approx(100 * (labels == top).mean())
    precision, recall, _, support = sklearn.metrics.precision_recall_fscore_support(
        labels, top, labels=range(3), zero_division=np.nan
    )
    for index, each in enumerate(content["classes"]):
        assert each["name"] == NAMES[index]
        assert each["images"] == support[index]
        assert each["accuracy"] == pytest.approx(recall[index])
        assert (each["precision"] is None) == np.isnan(precision[index])
        assert each["precision"] is None or each["precision"] == pytest.approx(precision[index])
    assert [content[name] for name in ("model", "step", "kind", "images")] == [
        evaluated[0].config.model.name,
        7,
        "ema",
        10,
    ]
    confidence = np.array([float(row["top1_probability"]) for row in rows])
    for each in content["calibration"]:
        inside = (confidence > each["low"]) & (confidence <= each["high"])
        assert each["images"] == inside.sum()
        if inside.any():
            assert each["accuracy"] == pytest.approx((labels == top)[inside].mean())


def test_the_worst_confusions_come_first(evaluated):
    _, report = evaluated
    counts = np.array([[5, 3, 0], [1, 8, 1], [0, 0, 0]])
    pairs = summary.find_confusions(counts)
    found = [(each.label, each.prediction, each.images) for each in pairs]
    assert found == [(0, 1, 3), (1, 0, 1), (1, 2, 1)]
    assert pairs[0].share == 3 / 8
    assert sum(each.images for each in report.confusions) == (~report.predictions.right).sum()


def test_the_page_needs_nothing_else(evaluated, folder):
    page = (folder / "report.html").read_text()
    # No link, no script, no style sheet and no image but those inside.
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    sources = re.findall(r'src="([^"]*)"', page)
    wrong = int((~evaluated[1].predictions.right).sum())
    assert wrong and len(sources) == 2 + wrong
    assert all(source.startswith("data:image/") for source in sources)
    assert 'name="viewport"' in page
    assert "<b>cat</b>" not in page and "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "&lt;mine&gt;" in page


def test_pictures_are_drawn(folder):
    for name in ("confusion_matrix", "reliability", "wrong_images"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300
            # Not empty.
            assert len(image.convert("L").getcolors()) > 10
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "report.html",
        "predictions.csv",
        "confusion_matrix.png",
        "reliability.png",
        "wrong_images.png",
    }


def test_wrong_images_are_the_surest(evaluated):
    _, report = evaluated
    found = report.predictions
    few = found.most_confident_errors(2)
    wrong = [i for i in range(10) if found.classes[i, 0] != LABELS[i]]
    assert few.tolist() == sorted(wrong, key=lambda i: -found.probabilities[i, 0])[:2]


def test_a_report_without_a_wrong_image(evaluated):
    _, report = evaluated
    found = dataclasses.replace(report.predictions, labels=report.predictions.classes[:, 0])
    counts = np.diag(np.bincount(found.labels, minlength=3))
    perfect = dataclasses.replace(
        report,
        counts=counts,
        classes=summary.class_figures(counts, NAMES),
        confusions=summary.find_confusions(counts),
        predictions=found,
    )
    sheet = to_png(draw_contact_sheet([], perfect))
    page = to_html(perfect, [], confusion=sheet, reliability=sheet)
    assert "No class is taken for another." in page
    assert "<p>None.</p>" in page


def test_of_many_classes_the_most_confused_are_drawn(evaluated):
    names = tuple(f"class {i}" for i in range(1000))
    counts = np.diag(np.full(1000, 50))
    counts[700, 3], counts[3, 700], counts[999, 500], counts[3, 10] = 9, 4, 8, 1
    report = dataclasses.replace(
        evaluated[1], names=names, counts=counts, confusions=summary.find_confusions(counts)
    )
    shown = confusion_matrix.most_confused(report)
    assert len(shown) == len(set(shown)) == confusion_matrix.MOST_CLASSES
    # Those that are confused stand beside each other.
    assert shown[:3] == [700, 3, 10]
    assert abs(shown.index(999) - shown.index(500)) == 1
    (axes,) = confusion_matrix.draw(report).axes
    assert axes.get_xticklabels()[-1].get_text() == "970 other classes"
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[1, 0] == "9" and cells[0, 1] == "4"


def test_imagenet_is_shown_in_words():
    assert summary.readable_names(imagenet_wnids()) == imagenet_names()
    assert summary.readable_names(NAMES) == NAMES


def test_a_report_that_cannot_be_written_says_where(evaluated, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"to .*file/report: Not a directory.*--output=DIR"):
        write_report(tmp_path / "file" / "report", evaluated[1], evaluated[0])


def test_matplotlib_is_imported_late_and_never_by_its_global_state():
    """Training must run where it is broken, and the figures of a caller are the caller's."""
    for file in Path(reports.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [ast.unparse(node) for node in imports if "matplotlib" in ast.unparse(node)]
        assert "pyplot" not in file.read_text()
