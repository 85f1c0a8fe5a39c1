"""notebooks/inference.ipynb runs from top to bottom, and its images show what they should."""

import json
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

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "inference.ipynb"

# Keeps what each figure says, and which arrays it draws, before it is shown.
BEFORE = """
import matplotlib.pyplot as plt

def text_of(axis):
    return {
        "title": axis.get_title(),
        "labels": [axis.get_xlabel(), axis.get_ylabel()],
        "images": [image.get_array().shape[:2] for image in axis.images],
        "bars": [bar.get_width() for bar in axis.patches],
        "ticks": [tick.get_text() for tick in axis.get_yticklabels()],
        "texts": [text.get_text() for text in axis.texts],
    }

def show(original=plt.show):
    figure = plt.gcf()
    axes = [text_of(axis) for axis in figure.axes]
    shown_figures.append({"size": list(figure.bbox.size), "axes": axes})
    original()

shown_figures = []
plt.show = show
"""
AFTER = """
import json
print(json.dumps({"drawn": shown_figures, "titles": titles, "names": predictor.names}))
"""


def run(before="", after="", **parameters):
    """Executes the notebook with other parameters; (its outputs as text, what AFTER printed)."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in parameters.items():
        lines = [line for line in first.source.splitlines() if line.startswith(f"{name} = ")]
        first.source = first.source.replace(lines[0], f"{name} = {value!r}")
    cells = notebook.cells
    cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    cells += [nbformat.v4.new_code_cell(source) for source in (after, AFTER)]
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    streams = "".join(output.text for output in outputs if output.output_type == "stream")
    return streams, json.loads(outputs[-1].text)


def axes_with(figure, part):
    return [axis for axis in figure["axes"] if part in axis["title"]]


def check_top5(figures, titles, names):
    """An image and five bars each; returns the likeliest class of each."""
    likeliest = []
    for figure, title in zip(figures, titles, strict=True):
        left, right = figure["axes"]
        assert (left["title"], right["title"]) == (title, "top-5 classes")
        assert right["labels"][0] == "probability, %"
        assert len(right["bars"]) == 5
        assert right["bars"] == sorted(right["bars"], reverse=True)
        assert 0 < sum(right["bars"]) <= 100.001
        assert right["texts"] == [f"{bar:.1f}" for bar in right["bars"]]
        assert set(right["ticks"]) <= {name.split(",")[0] for name in names}
        likeliest.append((right["ticks"][0], right["bars"][0]))
    return likeliest


def check_weights(figure, sets):
    titles = [f"pixel {p}, set {s}" for s in range(1, sets + 1) for p in range(1, 5)]
    grids = axes_with(figure, "pixel")
    assert [grid["title"] for grid in grids] == titles
    assert all(grid["images"] == [[3, 3]] for grid in grids)
    assert all(len(grid["texts"]) == 9 for grid in grids)
    assert len({tuple(grid["texts"]) for grid in grids}) == len(grids), "each has its own"
    assert figure["axes"][0]["texts"] == ["1", "2", "3", "4"]
    assert figure["axes"][-1]["labels"][1] == "weight (a factor, no unit)"


def check_contexts(figure, size, images):
    for part in ("static context", "dynamic context", "% dynamic"):
        maps = axes_with(figure, part)
        assert [drawn["images"] for drawn in maps] == [[[size, size]]] * images
    units = [axis["labels"][1] for axis in figure["axes"] if axis["labels"][1]]
    assert units == ["mean activation\n(no unit)"] * images


def check_sizes(figures):
    """Readable and no wider than a page."""
    for figure in figures:
        width, height = figure["size"]
        assert 500 <= width <= 1200
        assert 150 <= height <= 900


def test_with_a_checkpoint(tmp_path):
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=1000)
    state_dict = golden.state_dict(shapes, 0)
    state_dict["fc.weight"] *= 20
    path = tmp_path / "tiny.pth.tar"
    path.write_bytes(build.training_checkpoint(state_dict, state_dict))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (images,) = (cell.source for cell in notebook.cells if "IMAGES or" in cell.source)
    china = load_sample_images().filenames[0]
    streams, results = run(
        WEIGHTS=str(path),
        WORKDIR=str(tmp_path / "unused"),
        after=f"shown_before = titles\nIMAGES = [{china!r}]\n{images}\n"
        "assert titles == shown_before[:1]\ntitles = shown_before",
    )
    assert "weights   ema" in streams
    assert "cotnet_tiny, by names and shapes; 1000 classes" in streams
    assert "2 images of 32 x 32 pixels" in streams
    assert results["titles"] == ["china.jpg", "flower.jpg"]
    *top5, weights, contexts = results["drawn"]
    check_top5(top5, results["titles"], results["names"])
    check_weights(weights, sets=2)
    check_contexts(contexts, 16, images=2)
    check_sizes(results["drawn"])
    assert not (tmp_path / "unused").exists()


def test_with_the_demo(tmp_path, monkeypatch):
    # It trains for long enough that some optimisation pays.
    monkeypatch.setenv("XLA_FLAGS", f"{quick.FLAGS} --xla_backend_optimization_level=1")
    streams, results = run(WORKDIR=str(tmp_path / "run"))
    assert "epoch 5/5 | step 110/110" in streams
    assert "ema weights of cotnet_tiny, best checkpoint" in streams
    *top5, weights, contexts = results["drawn"]
    likeliest = check_top5(top5, results["titles"], [str(digit) for digit in range(10)])
    right = [
        title.endswith(f"a {name}")
        for title, (name, _) in zip(results["titles"], likeliest, strict=True)
    ]
    assert len(right) == 6
    assert sum(right) >= 5
    assert np.mean([percent for _, percent in likeliest]) > 50
    check_weights(weights, sets=2)
    check_contexts(contexts, 16, images=3)
    check_sizes(results["drawn"])


def test_is_committed_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    assert max(len(cell.source.splitlines()) for cell in code) <= 20, "cells are short"
    text = json.dumps([cell.source for cell in notebook.cells] + outputs)
    for private in ("/home/", "/root/", "/tmp/"):
        assert private not in text
