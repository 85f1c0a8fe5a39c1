"""The Python code that stands in README and docs: it compiles, and runs where it can."""

import jax
import pytest
from helpers import documented

pytestmark = pytest.mark.end_to_end

ROOT = documented.ROOT
BLOCKS = [
    (f"{file.name}, block {number}", block)
    for file in documented.FILES
    for number, block in enumerate(documented.blocks(file, "python"), 1)
]


@pytest.mark.parametrize(("where", "code"), BLOCKS, ids=[where for where, _ in BLOCKS])
def test_it_is_python(where, code):
    compile(code, where, "exec")


def test_the_quick_start():
    quick_start, models, *_ = documented.blocks(ROOT / "README.md", "python")

    def run():
        names = {}
        exec(f"{quick_start}\n{models}", names)
        return names["logits"], names["features"][2]

    # Traced, not computed: the network is the full one.
    logits, features = jax.eval_shape(run)
    assert logits.shape == (8, 1000)
    assert features.shape == (8, 14, 14, 1024)


def test_a_configuration_of_ones_own():
    names = {}
    exec(documented.blocks(ROOT / "docs/training.md", "python")[0], names)
    assert names["get_config"]().batch_size == 256


@pytest.mark.slow
def test_loading_and_predicting(world, monkeypatch):
    monkeypatch.chdir(world)
    (step,) = (int(path.name) for path in (world / "runs/mine/checkpoints").iterdir())
    names = {}
    for block in documented.blocks(ROOT / "docs/weights.md", "python"):
        # tests/weights/test_hub.py has a Hub.
        if "push_to_hub" not in block:
            block = block.replace("hf-hub:OWNER/NAME", "weights/cotnet50")
            block = block.replace("stage4_block2", "stage4_block0")  # the network is a smaller one
            exec(block.replace("checkpoints/5000", f"checkpoints/{step}"), names)
    assert names["variables"].keys() == {"params", "batch_stats"}
