"""A folder in which the documented commands and code can run."""

import numpy as np
import pytest
from helpers import documented, golden
from helpers import torch_file_builder as build
from helpers.documented import ROOT, SHORT
from PIL import Image

from cotnet_jax.tools import make_fake_imagenet
from cotnet_jax.weights import name_map


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with everything that the commands name, all of it small."""
    world = tmp_path_factory.mktemp("world")
    noise = np.random.default_rng(0)

    def save(path, size=48):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (size, size, 3), np.uint8)).save(path)

    for index in range(32):
        save(world / "IMAGES" / ("cats", "dogs")[index % 2] / f"{index}.png")
    for index in range(200):
        for name in ("five", "ten"):
            save(world / "digits" / name / str(index % 2) / f"{index}.png", 8)
    for index in range(16):
        folder = ("train/sky/moon", "train/ground/brick", "validation/sky/moon")[index % 3]
        save(world / "photographs" / folder / f"{index // 3}.png")
    save(world / "cat.jpg")
    save(world / "holidays/beach.jpg")
    make_fake_imagenet.make(world / "made", 8, 8, 8)
    (world / "ARCHIVES").symlink_to(world / "made/tars")
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=1000)
    checkpoint = build.training_checkpoint(golden.state_dict(shapes, 0), None)
    (world / "cotnet50.pth.tar").write_bytes(checkpoint)
    (world / "PATH").symlink_to("runs/tuned")
    (world / "IMAGE").symlink_to("cat.jpg")
    (world / "mine.py").write_text(documented.blocks(ROOT / "docs/training.md", "python")[0])
    (world / "tests").symlink_to(ROOT / "tests")
    for command in (
        "cotnet-prepare folder --source=IMAGES --output=FOLDER --validation=0.25 --workers=1",
        "cotnet-prepare folder --source=digits/five --output=data/five --validation=0.2 "
        "--workers=1",
        "cotnet-prepare imagenet --source=ARCHIVES --output=DATA_DIR --no_checksum --workers=1",
        "cotnet-convert --weights=cotnet50.pth.tar --output=weights/cotnet50",
        "cotnet-train --config=cotnet50 --workdir=runs/mine --config.data.data_dir=DATA_DIR "
        + SHORT,
        "cotnet-train --config=finetune --weights=weights/cotnet50 --workdir=runs/tuned "
        "--config.data.name=FOLDER " + SHORT,
    ):
        documented.run(command, world)
    for name in ("DIR", "OTHER_DIR"):
        (world / name).symlink_to("runs/tuned")
    for name in ("digits", "five", "photographs"):
        (world / "runs" / name).symlink_to("mine")
    for name in ("ten", "photographs"):
        (world / "data" / name).symlink_to("five")
    return world
