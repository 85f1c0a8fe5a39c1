"""The recipes of the published models, and what is said of values that cannot be used."""

import importlib
import re
from pathlib import Path

import pytest

from cotnet_jax import configs
from cotnet_jax.config import find_problems
from cotnet_jax.configs import default

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


# What one model's recipe may have of its own: the columns above.
OWN = {
    "model.name",
    "batch_size",
    "schedule.peak",
    "optimizer.weight_decay",
    "model.drop_path_rate",
    "data.image_size",
    "data.crop",
}


def get(name):
    return importlib.import_module(f"cotnet_jax.configs.{name}").get_config()


def test_the_checkout_has_the_configurations_of_the_package():
    folder = Path(__file__).parents[1] / "configs"
    names = {"default", *configs.names()}
    assert {file.stem for file in folder.glob("*.py")} == names
    for name in names:
        shipped = importlib.import_module(f"cotnet_jax.configs.{name}")
        assert importlib.import_module(f"configs.{name}").get_config is shipped.get_config


def flatten(config, prefix=""):
    """{"section.key": value} of all fields."""
    flat = {}
    for key, value in config.to_dict().items():
        name = f"{prefix}{key}"
        flat |= flatten(config[key], f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


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
    default_fields = flatten(default.get_config())
    changed = {field for field, value in flatten(config).items() if value != default_fields[field]}
    assert changed <= OWN
    # As published, on eight devices.
    assert not find_problems(config, devices=8)


def test_what_all_recipes_share():
    config = default.get_config()
    shared = {
        "finetune": {
            "new_head": False,
            "freeze": "",
            "rate_multipliers": "",
            "layer_decay": 1.0,
            "head_only_epochs": 0,
            "head_only_steps": 0,
        },
        "loss": {"class_weights": ""},
        "optimizer": {
            "name": "sgd",
            "weight_decay": 4e-5,
            "momentum": 0.9,
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-8,
            "clip_norm": 0.0,
        },
        "mixing": {
            "probability": 1.0,
            "cutmix_probability": 0.5,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
            "label_smoothing": 0.1,
        },
        "ema": {"decay": 0.9999, "warmup": False},
    }
    for section, fields in shared.items():
        assert config[section].to_dict() == fields
    schedule, augment, data = config.schedule, config.augment, config.data
    assert (schedule.warmup_epochs, schedule.warmup_start, schedule.final) == (5, 1e-4, 1e-5)
    assert (schedule.base_batch_size, schedule.unit, config.steps) == (0, "epoch", 0)
    assert not (data.balanced_sampling or config.early_stopping.metric)
    assert (augment.scale, augment.ratio, augment.flip) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert augment.randaugment == "rand-m15-mstd0.5-n2"
    assert augment.erasing_probability == 0
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert config.model.drop_rate == 0.25
    assert not (config.model.sync_batch_norm or config.model.freeze_batch_norm)
    assert config.checkpoint.keep_best == 10


# A value that each field cannot have.
BAD = {
    "seed": -1,
    "epochs": 0,
    "steps": -1,
    "batch_size": 641,
    "steps_per_eval": -1,
    "accumulate_steps": 0,
    "init_kind": "best",
    "model.name": "cotnet5",
    "model.drop_rate": 1.0,
    "model.drop_path_rate": -0.1,
    "model.output_stride": 4,
    "model.dtype": "float16",
    "model.freeze_batch_norm": True,
    "finetune.new_head": True,
    "finetune.freeze": "stage[1",
    "finetune.rate_multipliers": "head=0",
    "finetune.layer_decay": 0.0,
    "finetune.head_only_epochs": -1,
    "finetune.head_only_steps": -1,
    "data.name": "",
    "data.image_size": 0,
    "data.crop": 0.0,
    "data.interpolation": "nearest",
    "data.mean": (0.5,),
    "data.std": (0.5, 0.5, 0.0),
    "data.num_threads": -1,
    "data.num_workers": -2,
    "data.prefetch": 0,
    "data.max_undecodable": 1.1,
    "data.max_pixels": 200_000_000,
    "augment.scale": (0.5, 0.1),
    "augment.ratio": (0.0, 1.0),
    "augment.flip": 1.5,
    "augment.randaugment": "rand-m20",
    "augment.randaugment_on": "gpu",
    "augment.color_jitter": -0.1,
    "augment.erasing_probability": float("nan"),
    "augment.erasing_mode": "grey",
    "augment.erasing_area": (0.1, 1.1),
    "augment.erasing_ratio": (1.0,),
    "mixing.probability": 2.0,
    "mixing.cutmix_probability": -1.0,
    "mixing.mixup_alpha": -0.1,
    "mixing.cutmix_alpha": -0.1,
    "mixing.label_smoothing": 1.1,
    "loss.class_weights": "balance",
    "optimizer.name": "adam",
    "optimizer.weight_decay": -1.0,
    "optimizer.momentum": 1.0,
    "optimizer.beta1": 1.0,
    "optimizer.beta2": -0.1,
    "optimizer.epsilon": 0.0,
    "optimizer.clip_norm": -1.0,
    "schedule.peak": float("inf"),
    "schedule.unit": "steps",
    "schedule.warmup_epochs": 351,
    "schedule.warmup_steps": 100,
    "schedule.warmup_start": -0.1,
    "schedule.final": -0.1,
    "schedule.base_batch_size": -1,
    "ema.decay": 1.5,
    "distributed.timeout_seconds": 9,
    "distributed.slow_timeout_seconds": 0,
    "eval.batch_size": 9,
    "eval.every_epochs": 0,
    "eval.calibration_bins": 0,
    "early_stopping.metric": "ema_top3",
    "early_stopping.patience": 0,
    "checkpoint.every_steps": -1,
    "checkpoint.keep_best": -1,
    "resume.allow_changes": "epoch",
    "profile.steps": -1,
    "profile.first_step": 0,
    "log.writers": "wandb,mlflow",
    "log.extras": "speed",
    "log_every_steps": 0,
}
# Anything goes, or it is looked at where it is used.
UNCHECKED = {
    "init_from",
    "accept_classes",
    "data.balanced_sampling",
    "data.scaled_decoding",
    "data.exif_orientation",
    "model.sync_batch_norm",
    "ema.warmup",
    "data.data_dir",
    "data.fake",
    "data.train_split",
    "data.eval_split",
    "eval.real_labels",
    "log.project",
    "notes",
}


def test_every_field_is_checked():
    assert set(BAD) | UNCHECKED == set(flatten(default.get_config()))


@pytest.mark.parametrize("field", BAD)
def test_a_value_out_of_range_is_one_line(field):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({field: BAD[field]})
    (problem,) = find_problems(config, devices=8)
    assert re.match(rf"--config\.{field}\b", problem)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"epochs": 4}, "--config.schedule.warmup_epochs=5: must be at most the run's --config.ep"),
        ({"epochs": 5}, ""),
        (
            {"steps": 10, "schedule.unit": "step", "schedule.warmup_steps": 11},
            "--config.schedule.warmup_steps=11: must be at most the run's --config.steps=10, or",
        ),
        ({"steps": 10, "schedule.unit": "step", "schedule.warmup_steps": 10}, ""),
        # How long an epoch is, is not known here.
        ({"steps": 10}, ""),
        (
            {"init_from": "weights", "finetune.head_only_epochs": 350},
            "--config.finetune.head_only_epochs=350: must be less than the run's --config.epochs",
        ),
        (
            {"finetune.head_only_epochs": 1},
            "--config.finetune.head_only_epochs=1: must be 0 where --config.init_from names no we",
        ),
        (
            {"finetune.freeze": "stem"},
            '--config.finetune.freeze=stem: must be "" where --config.init_from names no weights',
        ),
        ({"finetune.freeze": "stem", "data.fake": True}, ""),
        (
            {"schedule.warmup_steps": 3},
            '--config.schedule.warmup_steps=3: must be 0, or --config.schedule.unit="step"',
        ),
        (
            {"loss.class_weights": "balanced", "data.balanced_sampling": True},
            '--config.loss.class_weights=balanced: must be "", or --config.data.balanced_sampling',
        ),
        (
            {"augment.randaugment_on": "device", "augment.erasing_probability": 0.25},
            "--config.augment.erasing_probability=0.25: must be 0, or --config.augment.randaugment",
        ),
        ({"augment.randaugment_on": "device"}, ""),
        ({"early_stopping.metric": "raw_loss"}, ""),
        (
            {"early_stopping.metric": "ema_loss", "ema.decay": 0.0},
            '--config.early_stopping.metric=ema_loss: must be "raw_top1", "raw_top5", "raw_loss" o',
        ),
    ],
)
def test_fields_that_depend_on_each_other(fields, line):
    config = default.get_config()
    config.update_from_flattened_dict(fields)
    problems = find_problems(config, devices=1)
    assert len(problems) == bool(line)
    assert not line or problems[0].startswith(line)


def test_all_problems_of_a_configuration_are_listed():
    config = default.get_config()
    config.model.output_stride = 4
    config.ema.decay = 1.5
    config.data.crop = 0.0
    assert [problem.split(":")[0] for problem in find_problems(config, devices=1)] == [
        "--config.model.output_stride=4",
        "--config.data.crop=0.0",
        "--config.ema.decay=1.5",
    ]
