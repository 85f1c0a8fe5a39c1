"""A run whose workdir another one has taken over while it stood still."""

import time

import pytest
from helpers.small_network import create_small, short_digits_config

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.files import lock
from cotnet_jax.training import loop, setup
from cotnet_jax.training.trainer import Trainer

pytestmark = pytest.mark.end_to_end


def test_a_run_that_lost_its_workdir_takes_no_further_step(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "create_model", create_small)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    workdir, steps = Workdir(tmp_path), []
    finish_step = Trainer.finish_step

    def lose_the_lock_after_two_steps(trainer, metrics):
        finish_step(trainer, metrics)
        steps.append(trainer.step)
        if trainer.step == 2:
            (held,) = lock._held.values()
            workdir.lock.write_text("{}")
            end = time.monotonic() + 30
            while held._lost_to is None:
                assert time.monotonic() < end
                time.sleep(0.01)

    monkeypatch.setattr(Trainer, "finish_step", lose_the_lock_after_two_steps)
    with pytest.raises(lock.LockLostError, match=r"lost .*run\.lock"):
        loop.train(short_digits_config(), tmp_path)
    assert steps == [1, 2]
    assert workdir.lock.read_text() == "{}"
