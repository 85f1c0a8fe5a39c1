"""The recipes of the published models."""

import importlib

import pytest

from cotnet_jax import experiment

# model: global batch, peak learning rate, weight decay, drop path, side in pixels, crop
RECIPES = {
    "cotnet50": (640, 0.25, 4e-5, 0.1, 224, 0.875),
    "cotnext50_2x48d": (512, 0.2, 4e-5, 0.1, 224, 0.875),
    "se_cotnetd_50": (640, 0.25, 4e-5, 0.1, 224, 0.875),
    "cotnet101": (448, 0.175, 6e-5, 0.1, 224, 0.875),
    "cotnext101_2x48d": (512, 0.2, 6e-5, 0.1, 224, 0.875),
    "se_cotnetd_101": (512, 0.2, 4e-5, 0.1, 224, 0.875),
    "se_cotnetd_152": (512, 0.2, 4e-5, 0.15, 256, 0.888),
}


def get(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    config = get(name)
    assert config.model.name == name
    assert config.epochs == 350
    assert (
        config.batch_size,
        config.schedule.peak,
        config.optimizer.weight_decay,
        config.model.drop_path_rate,
        config.data.image_size,
        config.data.crop,
    ) == RECIPES[name]
    # As published, on eight devices.
    assert not experiment.find_problems(config, devices=8)


def test_all_problems_of_a_configuration_are_listed():
    config = get("digits")
    config.model.output_stride = 4
    config.ema.decay = 1.5
    config.data.crop = 0.0
    problems = experiment.find_problems(config, devices=1)
    assert [p.split(":")[0] for p in problems] == [
        "--config.model.output_stride=4",
        "--config.ema.decay=1.5",
        "--config.data.crop=0.0",
    ]
