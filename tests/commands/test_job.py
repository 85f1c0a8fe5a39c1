"""How training and evaluating end."""

import jax
import pytest

from cotnet_jax import interrupt
from cotnet_jax.commands import compilation_cache, job, train

OPTIONS = ["--config=digits", "--workdir=run", "--config.accumulate_steps=2"]


@pytest.fixture
def fail_with(monkeypatch):
    """A function that works, and fails with an error of the runtime; returns how it ended."""
    monkeypatch.setattr(interrupt, "raise_again", lambda: None)
    monkeypatch.setattr(compilation_cache, "keep_compiled_programs", lambda: None)

    def run(text: str) -> BaseException:
        def work(config, workdir):
            raise jax.errors.JaxRuntimeError(text)

        with pytest.raises((SystemExit, jax.errors.JaxRuntimeError)) as caught:
            job._connect_and_work(lambda: work, train.parse(OPTIONS))
        return caught.value

    return run


def test_a_device_without_memory_is_one_error_that_says_what_to_reduce(fail_with):
    ended = fail_with("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nBuffers: ...")
    assert isinstance(ended, SystemExit)
    said = str(ended.code)
    assert said.startswith("error: the memory of a device does not suffice (RESOURCE_EXHAUSTED: ")
    assert "Buffers" not in said
    for option in (
        "--config.accumulate_steps=4",
        "--config.batch_size (now 64)",
        "--config.eval.batch_size (now 360)",
    ):
        assert option in said


def test_other_errors_of_the_runtime_stay_what_they_are(fail_with):
    assert isinstance(fail_with("INTERNAL: a mistake"), jax.errors.JaxRuntimeError)
