"""Evaluating and fine-tuning on a dataset whose classes have other names, or another order."""

import contextlib
import types

import numpy as np
import pytest

from configs import default
from cotnet_jax.data.sources import Synthetic
from cotnet_jax.training import evaluate
from cotnet_jax.training.setup import TrainSetup
from cotnet_jax.weights import loading
from cotnet_jax.weights.folder import WeightsError


def weights(names):
    kernel = np.arange(len(names), dtype=np.float32)[None].repeat(2, 0)
    variables = {"params": {"head": {"kernel": kernel, "bias": kernel[0]}}, "batch_stats": {}}
    return loading.Weights(
        model="cotnet_tiny",
        variables=variables,
        kind="ema",
        settings={},
        attributes={},
        class_names=tuple(names),
        batches=0,
        source={},
        notes=(),
    )


class FakeLoop(contextlib.nullcontext):
    def __init__(self, setup, watchdog):
        super().__init__(self)

    def run(self, given):
        return given["given"]["params"]["head"]["bias"].tolist()


@pytest.fixture
def evaluate_on(monkeypatch):
    def evaluate_on(names, source, **fields):
        config = default.get_config()
        config.init_from = "w"
        config.update(fields)
        model = types.SimpleNamespace(num_classes=len(source.class_names))
        setup = types.SimpleNamespace(config=config, model=model, eval_source=source)
        monkeypatch.setattr(evaluate, "set_up_evaluation", lambda config: setup)
        monkeypatch.setattr(evaluate, "read_weights", lambda *args: weights(names))
        monkeypatch.setattr(evaluate, "Watchdog", lambda config: contextlib.nullcontext())
        monkeypatch.setattr(evaluate, "EvalLoop", FakeLoop)
        return evaluate.evaluate_only(config, None)

    return evaluate_on


def dataset(names):
    return types.SimpleNamespace(class_names=tuple(names))


def test_evaluation_maps_or_refuses_other_names(evaluate_on):
    assert evaluate_on("abc", dataset("abc")) == [0, 1, 2]
    assert evaluate_on("abc", dataset("cab")) == [2, 0, 1]
    with pytest.raises(WeightsError, match="only the weights have 'c'"):
        evaluate_on("abc", dataset("abd"))
    assert evaluate_on("abc", dataset("abd"), accept_classes=True) == [0, 1, 2]
    # Noise has no classes.
    noise = Synthetic("train", 8, {"train": 3}, ["class 0", "class 1", "class 2"])
    assert evaluate_on("abc", noise) == [0, 1, 2]


def test_fine_tuning_maps_or_refuses_other_names(monkeypatch):
    monkeypatch.setattr(loading, "read_weights", lambda *args: weights("abc"))

    def bias(names, **options):
        _, variables = loading.load("w", len(names), class_names=names, **options)
        return variables["params"]["head"]["bias"].tolist()

    assert bias("cab") == [2, 0, 1]
    with pytest.raises(WeightsError, match="only the dataset has 'd'"):
        bias("abd")
    assert bias("abd", accept_classes=True) == [0, 1, 2]
    # Another number of classes gets a new classifier, whatever their names.
    assert len(bias("abcd")) == 4
    setup = TrainSetup(
        eval=None, train_source=dataset("ab"), steps_per_epoch=1, learning_rates=np.ones(1)
    )
    assert setup.class_names == ("a", "b")
