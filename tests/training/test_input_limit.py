"""A run that waits for its images says so once, with what helps."""

import itertools

import pytest
from absl import logging

from cotnet_jax.configs import default
from cotnet_jax.data import parallelism
from cotnet_jax.training import input_limit
from cotnet_jax.training.input_limit import InputLimit, advice


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(parallelism, "available_cores", lambda: 16)
    monkeypatch.setattr(parallelism, "available_memory", lambda: 64e9)


@pytest.mark.parametrize(
    ("shares", "said", "seconds"),
    [
        ([0.0, 0.05, 0.09, 0.0], None, 20),
        # The buffers that were full at the beginning, or a disk that was busy for a while.
        ([0.5, 0.0, 0.3, 0.0], None, 20),
        ([0.0, 0.2, 0.4], "30 %", 20),
        ([0.2, 0.2, 0.9, 0.9], "20 %", 20),
        # Workers that start, in lines of a few steps each.
        ([0.9, 0.8, 0.5, 0.4, 0.0], None, 5),
        ([0.5] * 6, "50 %", 5),
        ([0.9], None, 60),
    ],
)
def test_it_is_said_once_after_two_lines_and_half_a_minute(
    warnings, shares, said, seconds, monkeypatch
):
    clock = itertools.count(step=seconds)
    monkeypatch.setattr(input_limit.time, "monotonic", lambda: next(clock))
    limit = InputLimit(default.get_config(), 640)
    for share in shares:
        limit.after_line(share)
    assert len(warnings) == bool(said)
    if said:
        assert f"{said} of its time is spent waiting" in warnings[0]
        assert "--config.augment.randaugment_on=device" in warnings[0]


def test_only_what_is_not_done_already_is_advised():
    config = default.get_config()
    assert advice(config, 640)[0].startswith("--config.augment.randaugment_on=device")
    config.data.num_workers, config.data.num_threads = 0, 8
    first, *others = advice(config, 640)
    assert first == (
        "--config.data.num_workers=-1 --config.data.num_threads=0 "
        "(16 processes of 1 thread, now 8 threads)"
    )
    config.data.num_workers = 16
    assert advice(config, 640) == others
    config.augment.randaugment_on = "device"
    config.data.scaled_decoding = True
    assert advice(config, 640) == [
        "images stored smaller, by cotnet-prepare ... --size=N, in a new run",
        "more cores",
    ]


def test_no_advice_that_the_configuration_refuses():
    config = default.get_config()
    config.augment.erasing_probability = 0.25
    assert not any("randaugment_on" in line for line in advice(config, 640))


def test_noise_is_neither_decoded_nor_augmented():
    config = default.get_config()
    config.data.fake = True
    assert advice(config, 640) == ["more cores"]
