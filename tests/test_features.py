"""docs/features.md: its code runs as it is written, and gives what it says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import golden
from helpers import torch_file_builder as build
from PIL import Image

import cotnet_jax
from cotnet_jax.commands import predict
from cotnet_jax.weights import convert, name_map

pytestmark = pytest.mark.end_to_end

DOCUMENT = Path(__file__).parents[1] / "docs" / "features.md"
BLOCK = re.compile(r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_command(line):
    name, *arguments = shlex.split(line)
    assert name == "cotnet-predict"
    predict.main(arguments)


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """What each section's code leaves: {heading: (its variables, what it printed)}.

    In a folder with images, and with weights of the smallest model in the place of cotnet50's.
    """
    folder = tmp_path_factory.mktemp("features")
    (folder / "weights").mkdir()
    (folder / "holidays").mkdir()
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=10)
    file = folder / "tiny.pth"
    file.write_bytes(build.training_checkpoint(golden.state_dict(shapes, 0), None))
    convert.convert_torch_file(file, folder / "weights" / "cotnet50")
    random = np.random.default_rng(0)
    for index in range(7):
        pixels = random.integers(0, 256, (1, 1, 3)) + random.integers(-50, 50, (40, 50, 3))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / "holidays" / f"{index}.png")
    left, printed, heading, variables = {}, {}, "", {}
    with contextlib.chdir(folder):
        for title, language, code in BLOCK.findall(DOCUMENT.read_text(encoding="utf-8")):
            heading = title or heading
            output = printed.setdefault(heading, io.StringIO())
            with contextlib.redirect_stdout(output):
                if language == "bash":
                    run_command(code)
                elif language == "python":
                    exec(compile(code, f"{DOCUMENT.name}: {heading}", "exec"), variables)
            left[heading] = dict(variables)
    return {name: (left[name], printed[name].getvalue()) for name in left}


def test_nearest_neighbours(sections):
    variables, printed = sections["Pooled features"]
    report, *neighbours = printed.splitlines()
    assert report.startswith("7 rows of features are in ")
    assert len(neighbours) == 5
    similarities, paths = zip(*map(str.split, neighbours), strict=True)
    assert list(similarities) == sorted(similarities, reverse=True)
    assert set(paths) < {f"holidays/{index}.png" for index in range(1, 7)}
    assert (variables["features"].shape, variables["features"].dtype) == ((1, 512), jnp.float32)


def test_stage_features(sections):
    variables, printed = sections["Stage features"]
    assert [stage.shape for stage in variables["features"]] == [
        *((1, 112, 112, 64), (1, 56, 56, 128), (1, 28, 28, 256), (1, 14, 14, 512))
    ]
    assert printed.splitlines()[0] == "stage1 64 2 (1, 112, 112, 64)"
    # What it prints for the model that is named there.
    backbone = cotnet_jax.create_model("cotnet50", features_only=True)
    lines = [
        f"{info.name} {info.channels} {info.reduction} "
        f"{(1, 224 // info.reduction, 224 // info.reduction, info.channels)}"
        for info in backbone.feature_info
    ]
    assert "\n".join(lines) in DOCUMENT.read_text(encoding="utf-8")


def test_other_channels(sections):
    variables, _ = sections["Other channels"]
    images = jnp.zeros((1, 32, 32, 4))
    logits = jax.eval_shape(variables["model"].apply, variables["variables"], images)
    assert logits.shape == (1, 10)


def test_a_feature_pyramid(sections):
    variables, printed = sections["A feature pyramid"]
    assert printed.strip() in DOCUMENT.read_text(encoding="utf-8")
    levels = [level.shape for level in variables["pyramid"]]
    assert levels == [(1, 38, 51, 256), (1, 19, 26, 256), (1, 10, 13, 256), (1, 5, 7, 256)]
    placed = variables["variables"]["params"]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, placed, variables["trained"]["params"])
    assert all(np.isfinite(level).all() and np.any(level) for level in variables["pyramid"])


def test_the_layer_in_a_linen_network(sections):
    variables, _ = sections["The layer in a Linen network"]
    assert variables["logits"].shape == (2, 10)
    assert set(variables["updates"]["batch_stats"]) == {"CoTLayer_0"}


def test_loaded_weights_through_nnx(sections):
    variables, _ = sections["NNX"]
    logits = jax.jit(variables["model"].apply)(variables["variables"], variables["images"])
    np.testing.assert_allclose(variables["logits"], logits, rtol=1e-5)


def test_the_layer_in_an_nnx_network(sections):
    net = sections["NNX"][0]["net"]
    layer = cotnet_jax.CoTLayer()
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 64))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    bridged = {name: nnx.to_pure_dict(nnx.state(net.cot, kind)) for name, kind in kinds.items()}
    assert jax.tree.map(jnp.shape, bridged) == jax.tree.map(jnp.shape, variables)
    # Its one call in training has updated the statistics of a batch of zeros.
    assert np.any(bridged["batch_stats"]["key_bn"]["var"] != 1)

    @nnx.jit
    def both(net, variables, x):
        return net.cot(x), layer.apply(variables, x)

    np.testing.assert_allclose(*both(net, bridged, x), rtol=1e-5, atol=1e-6)
