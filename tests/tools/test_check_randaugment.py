"""The comparison of RandAugment on the device with the host's."""

import sys

import jax.numpy as jnp
import pytest

from cotnet_jax.data import randaugment
from cotnet_jax.tools import check_randaugment
from cotnet_jax.training.randaugment import batch


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["check_randaugment", "--images=2", "--size=24", "--batch_size=2"]
    )
    return check_randaugment.main


def test_every_operation_is_compared(run, capsys):
    run()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in randaugment.OP_NAMES)
    assert "a batch of 2:" in printed


def test_other_pixels_are_an_error(run, monkeypatch):
    monkeypatch.setattr(
        check_randaugment,
        "apply_operations",
        lambda images, operations: jnp.where(
            operations.op[:, None, None, None] == randaugment.OP_NAMES.index("Color"),
            images ^ 1,
            batch.apply_operations(images, operations),
        ),
    )
    with pytest.raises(SystemExit, match=r"other pixels than the host.s: Color$"):
        run()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--images=0", "must be an integer of 1 or more, not '0'"),
        ("--size=0", "must be an integer of 1 or more, not '0'"),
        ("--batch_size=-1", "must be 0 or more, not -1"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, argument, message):
    monkeypatch.setattr(sys, "argv", ["check_randaugment", argument])
    with pytest.raises(SystemExit):
        check_randaugment.main()
    assert message in capsys.readouterr().err
