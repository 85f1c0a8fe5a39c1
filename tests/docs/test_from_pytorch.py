"""The tables for those who come from PyTorch: what they say is here is here."""

import dataclasses
import importlib
import re

import pytest
from helpers.documented import ROOT

import cotnet_jax
from cotnet_jax.commands import SUMMARIES
from cotnet_jax.config import flatten
from cotnet_jax.configs import default
from cotnet_jax.models import CoTNet

TEXT = (ROOT / "docs/from_pytorch.md").read_text(encoding="utf-8")
FIELDS = flatten(default.get_config())

# All keys of the original's cot_experiments/CoTNet-50-350epoch/config.yaml.
ORIGINAL = """
seed amp
data_loader: data_path batch_size vbatch_size workers pin_mem prefetcher use_multi_epochs_loader
model: name pretrained initial_checkpoint resume no_resume_opt num_classes gp drop drop_path
  drop_block model_ema model_ema_force_cpu model_ema_decay
BN: bn_tf bn_momentum bn_eps sync_bn dist_bn split_bn
augmentation: no_aug scale ratio hflip vflip interpolation color_jitter aa aug_splits reprob remode
  recount resplit mixup mixup_off_epoch cutmix mixup_prob mixup_switch_prob mixup_mode
  train_interpolation tta
loss: jsd smoothing
solver: opt opt_eps momentum weight_decay sched lr lr_noise lr_noise_pct lr_noise_std lr_cycle_mul
  lr_cycle_limit warmup_lr min_lr epochs start_epoch decay_epochs warmup_epochs cooldown_epochs
  patience_epochs decay_rate log_interval recovery_interval
eval: eval_metric
"""


def keys_of(text):
    section = ""
    for word in text.split():
        if word.endswith(":"):
            section = word.replace(":", ".")
        else:
            yield section + word


def table(title):
    """The rows below a heading, as lists of cells."""
    body = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def spans(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_every_setting_of_the_original_has_a_row():
    named = {name for row in table("Settings") for name in spans(row[0])}
    assert set(keys_of(ORIGINAL)) - named == set()


def test_every_field_exists():
    fields = [name for row in table("Settings") for name in spans(row[2])]
    assert len(fields) > 40
    assert set(fields) - set(FIELDS) == set()
    assert set(re.findall(r"--config\.([\w.]+)", TEXT)) - {"NAME"} <= set(FIELDS)


def test_every_option_exists():
    parsers = [importlib.import_module(f"cotnet_jax.commands.{n}").make_parser() for n in SUMMARIES]
    known = {option for parser in parsers for option in parser._option_string_actions}
    here = [row[-1] for row in table("Commands")] + [row[3] for row in table("Settings")]
    options = set(re.findall(r"(--[a-z_]+)(?![a-z_.])", " ".join(here)))
    assert options - known == {"--config"}


@pytest.mark.parametrize("cell", [row[1] for row in table("Python")])
def test_every_name_of_python_exists(cell):
    for name in re.findall(r"cotnet_jax\.(\w+)", cell):
        assert name in cotnet_jax.__all__
    attributes = {field.name for field in dataclasses.fields(CoTNet)}
    assert {name for name in re.findall(r"(\w+)=", cell)} - {"train"} <= attributes


def test_published_recipes_are_named():
    assert "CoTNet-50-350epoch" in TEXT
    for name in re.findall(r"--config=(\w+)", TEXT):
        assert name in (*cotnet_jax.configs.names(), "FILE")
