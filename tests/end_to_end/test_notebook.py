"""The notebooks run from top to bottom, and their figures show what they should."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import golden, quick
from helpers import torch_file_builder as build
from nbclient import NotebookClient
from sklearn.datasets import load_sample_images

from cotnet_jax.weights import name_map

pytestmark = pytest.mark.end_to_end

FOLDER = Path(__file__).parents[2] / "notebooks"
INFERENCE, FINETUNE = (FOLDER / f"{name}.ipynb" for name in ("inference", "finetune"))

# Keeps what each figure says, and which arrays it draws, before it is shown.
BEFORE = """
import matplotlib.pyplot as plt

def text_of(axis):
    return {
        "title": axis.get_title(),
        "labels": [axis.get_xlabel(), axis.get_ylabel()],
        "images": [image.get_array().shape[:2] for image in axis.images],
        "scale": [[float(end) for end in image.get_clim()] for image in axis.images],
        "bars": [bar.get_width() for bar in axis.patches],
        "ticks": [tick.get_text() for tick in axis.get_yticklabels()],
        "texts": [text.get_text() for text in axis.texts],
    }

def show(original=plt.show):
    figure = plt.gcf()
    axes = [text_of(axis) for axis in figure.axes]
    shown_figures.append(
        {"title": figure.get_suptitle(), "size": list(figure.bbox.size), "axes": axes}
    )
    original()

shown_figures = []
plt.show = show
"""
# The demo's network with its first two stages, on a quarter of its training images; in small
# batches and without what slows its first steps, it learns from them in two epochs.
SMALLER = """
import dataclasses
from cotnet_jax.configs import digits
from cotnet_jax.models.variants import VARIANTS

VARIANTS["cotnet_tiny"] = dataclasses.replace(VARIANTS["cotnet_tiny"], blocks=(1, 1, 0, 0))

def few_images(get_config=digits.get_config):
    config = get_config()
    config.data.train_split = "train[:320]"
    config.batch_size = 16
    config.schedule.warmup_epochs = 0
    config.mixing.probability = 0.0
    config.ema.decay = 0.5
    return config

digits.get_config = few_images
"""
AFTER = """
import json
print(json.dumps({"drawn": shown_figures, "titles": titles, "names": predictor.names}))
"""
# What the fine-tuning's cells leave.
AFTER_FINETUNE = """
import json
print(json.dumps({
    "drawn": shown_figures,
    "names": list(predictor.names),
    "top1": accuracy["ema_top1"],
    "held_out": accuracy["count"],
    "files": [path.name for path in report.iterdir()],
    "pictures": len(list(report.glob("[cw]*.png"))),
}))
"""


def run(path, *, before="", after=AFTER, **parameters):
    """Execute a notebook with other parameters; return its outputs as text, and the last line."""
    notebook = nbformat.read(path, as_version=4)
    (first,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in parameters.items():
        (line,) = (line for line in first.source.splitlines() if line.startswith(f"{name} = "))
        first.source = first.source.replace(line, f"{name} = {value!r}")
    cells = notebook.cells
    cells.insert(0, nbformat.v4.new_code_cell(BEFORE + before))
    cells.append(nbformat.v4.new_code_cell(after))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    streams = "".join(output.text for output in outputs if output.output_type == "stream")
    return streams, json.loads(streams.splitlines()[-1])


def check_top5(figure, titles, names):
    """An image and five bars each, in one grid; returns the likeliest class of each."""
    likeliest = []
    axes = figure["axes"][: 2 * len(titles)]
    for left, right, title in zip(axes[::2], axes[1::2], titles, strict=True):
        assert left["title"] == title
        assert len(left["images"]) == 1
        assert len(right["bars"]) == 5
        assert right["bars"] == sorted(right["bars"], reverse=True)
        assert 0 < sum(right["bars"]) <= 100.001
        assert right["texts"] == [f"{bar:.1f}" for bar in right["bars"]]
        assert set(right["ticks"]) <= {name.split(",")[0][:20] for name in names}
        likeliest.append((right["ticks"][0], right["bars"][0]))
    return likeliest


def axes_with(figure, part):
    return [axis for axis in figure["axes"] if part in axis["title"]]


def check_weights(figure, sets):
    titles = [f"pixel {p}, set {s}" for s in range(1, sets + 1) for p in range(1, 5)]
    grids = axes_with(figure, "pixel")
    assert [grid["title"] for grid in grids] == titles
    assert all(grid["images"] == [[3, 3]] for grid in grids)
    assert all(len(grid["texts"]) == 9 for grid in grids)
    assert len({tuple(grid["texts"]) for grid in grids}) == len(grids), "each has its own"
    assert len({str(grid["scale"]) for grid in grids}) == 1
    assert figure["axes"][0]["texts"] == ["1", "2", "3", "4"]
    assert figure["axes"][-1]["labels"][1] == "weight (a factor, no unit)"


def check_contexts(figure, size, images):
    scales = set()
    for part in ("static context", "dynamic context", "% dynamic"):
        maps = axes_with(figure, part)
        assert [drawn["images"] for drawn in maps] == [[[size, size]]] * images
        scales |= {str(drawn["scale"]) for drawn in maps}
    assert len(scales) == 1, "all can be compared"
    units = [axis["labels"][1] for axis in figure["axes"] if axis["labels"][1]]
    assert units == ["mean activation (no unit)"]


def check_grad_cam(figure, size, classes):
    cams, strengths = axes_with(figure, "Grad-CAM for"), axes_with(figure, "weights of")
    assert [cam["title"] for cam in cams] == [f"Grad-CAM for {name}" for name in classes]
    for drawn in (cams, strengths):
        assert [each["images"] for each in drawn] == [[[size, size]]] * len(classes)
        assert len({str(each["scale"]) for each in drawn}) == 1


def check_sizes(figures):
    """Readable and no wider than a page."""
    for figure in figures:
        width, height = figure["size"]
        assert 500 <= width <= 1200
        assert 150 <= height <= 900


def test_inference_with_a_checkpoint(tmp_path):
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=1000)
    state_dict = golden.state_dict(shapes, 0)
    state_dict["fc.weight"] *= 20
    path = tmp_path / "tiny.pth.tar"
    path.write_bytes(build.training_checkpoint(state_dict, state_dict))
    notebook = nbformat.read(INFERENCE, as_version=4)
    (images,) = (cell.source for cell in notebook.cells if "IMAGES or" in cell.source)
    china = load_sample_images().filenames[0]
    streams, results = run(
        INFERENCE,
        WEIGHTS=str(path),
        WORKDIR=str(tmp_path / "unused"),
        after=f"shown_before = titles\nIMAGES = [{china!r}]\n{images}\n"
        f"assert titles == shown_before[:1]\ntitles = shown_before\n{AFTER}",
    )
    assert "weights   ema" in streams
    assert "cotnet_tiny, by names and shapes; 1000 classes" in streams
    assert "2 images of 32 x 32 pixels" in streams
    assert results["titles"] == ["china.jpg", "flower.jpg"]
    top5, weights, contexts, grad_cam = results["drawn"]
    assert top5["title"] == "Top-5 classes"
    likeliest = check_top5(top5, results["titles"], results["names"])
    check_weights(weights, sets=2)
    check_contexts(contexts, 16, images=2)
    check_grad_cam(grad_cam, 16, [name for name, _ in likeliest])
    check_sizes(results["drawn"])
    assert not (tmp_path / "unused").exists()


def check_demo(tmp_path, epochs, before, accuracy, at_least, epoch_steps=22):
    """The whole inference notebook as it is, but for these; its accuracy, in percent, is above."""
    workdir = tmp_path / "run"
    streams, results = run(INFERENCE, before=before, WORKDIR=str(workdir), EPOCHS=epochs)
    steps = epoch_steps * epochs
    assert f"epoch {epochs}/{epochs} | step {steps}/{steps}" in streams
    assert "ema weights of cotnet_tiny, best checkpoint" in streams
    (shown,) = re.findall(r"Right on ([\d.]+) % of 359 held-out images\.", streams)
    *_, measured = re.findall(r"ema weights \| top-1 ([\d.]+) %", streams)
    assert float(shown) == pytest.approx(float(measured), abs=0.1)
    assert float(shown) > accuracy
    top5, weights, contexts, grad_cam = results["drawn"]
    likeliest = check_top5(top5, results["titles"], [str(digit) for digit in range(10)])
    right = [
        title.endswith(f"a {name}")
        for title, (name, _) in zip(results["titles"], likeliest, strict=True)
    ]
    assert len(right) == 6
    assert sum(right) >= at_least
    assert top5["title"] == f"Top-5 classes, {sum(right)} of 6 right"
    check_weights(weights, sets=2)
    check_contexts(contexts, 16, images=3)
    check_grad_cam(grad_cam, 16, [name for name, _ in likeliest[:3]])
    check_sizes(results["drawn"])
    return likeliest


@pytest.fixture
def some_optimisation(monkeypatch):
    """It trains for long enough that it pays."""
    monkeypatch.setenv("XLA_FLAGS", f"{quick.FLAGS} --xla_backend_optimization_level=1")


def test_a_short_demo_and_fine_tuning_from_it(tmp_path):
    # Guesses are right on 10 %.
    check_demo(tmp_path, epochs=2, before=SMALLER, accuracy=20, at_least=0, epoch_steps=20)
    streams, results = run(
        FINETUNE,
        before=SMALLER,
        after=AFTER_FINETUNE,
        DRAWN=80,
        WEIGHTS=str(tmp_path / "run"),
        FOLDER=str(tmp_path / "finetune"),
        EPOCHS=1,
    )
    check_finetuning(streams, results, drawn=80)


@pytest.mark.slow
def test_the_demo_and_fine_tuning_from_it(tmp_path, some_optimisation):
    likeliest = check_demo(tmp_path, epochs=5, before="", accuracy=90, at_least=5)
    assert np.mean([percent for _, percent in likeliest]) > 50
    streams, results = run(
        FINETUNE,
        after=AFTER_FINETUNE,
        WEIGHTS=str(tmp_path / "run"),
        FOLDER=str(tmp_path / "finetune"),
    )
    check_finetuning(streams, results, drawn=359)
    assert results["top1"] > 70


def check_finetuning(streams, results, drawn):
    images, curves = results["drawn"]
    counts = [axis["title"].split(": ") for axis in images["axes"]]
    assert [name for name, _ in counts] == results["names"] == sorted(results["names"])
    assert sum(int(count.split()[0]) for _, count in counts) == drawn
    assert all(len(axis["images"]) == 1 for axis in images["axes"])
    (curve,) = curves["axes"]
    assert curve["labels"] == ["training step", "held-out top-1, %"]
    assert (
        curve["title"]
        == f"{results['top1']:.1f} % of {results['held_out']} held-out images are right"
    )
    measured = [float(value) for value in re.findall(r"ema weights \| top-1 ([\d.]+) %", streams)]
    (reported,) = re.findall(r"^top-1 ([\d.]+) %, top-5", streams, re.MULTILINE)
    assert float(reported) == pytest.approx(max(measured), abs=0.1), "of the best checkpoint"
    assert 0.1 * drawn < results["held_out"] < 0.3 * drawn
    check_sizes(results["drawn"])
    assert {"report.html", "report.json", "predictions.csv"} <= set(results["files"])
    for name in results["names"]:
        assert f"{name}: " in streams
    assert results["pictures"] == 2


@pytest.mark.parametrize(("name", "figures"), [("inference", 4), ("finetune", 4)])
def test_is_committed_with_its_outputs(name, figures):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures
    assert max(len(cell.source.splitlines()) for cell in code) <= 20, "cells are short"
    assert path.stat().st_size < 600_000
    text = json.dumps([cell.source for cell in notebook.cells] + outputs)
    for private in ("/home/", "/root/", "/tmp/", "sys.path"):
        assert private not in text
    assert 'pip install "cotnet_jax[notebook]"' in text.replace('\\"', '"')
