"""The list of evaluators: one more entry is one more set of metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_network import Small

from configs import digits
from cotnet_jax.distributed.watchdog import Watchdog
from cotnet_jax.training import evaluators, setup
from cotnet_jax.training.evaluate import EvalLoop


class BytesPerImage:
    """The mean of something that only the source's element has, and of the logits."""

    name = "bytes"

    def __init__(self):
        self.example_fields = {"bytes": lambda e: np.int32(len(e["image"]) if e else 10**6)}

    @classmethod
    def from_config(cls, config):
        if config.notes == "unusable":
            raise ValueError("--config.notes=unusable: must be something else")
        return cls() if config.notes else None

    def check_source(self, config, source):
        if config.notes == "not here":
            raise ValueError(f"no {source.num_classes} classes here")

    def counts(self, logits, batch):
        kept = batch["mask"] > 0
        return {
            "bytes": jnp.sum(jnp.where(kept, batch["bytes"], 0)),
            "logits": jnp.sum(jnp.where(kept[:, None], logits, 0)),
        }

    def metrics(self, kind, counts):
        return {"bytes": int(counts["bytes"]), f"{kind}_logits": float(counts["logits"])}

    def log_text(self, kind, metrics):
        return f"{metrics['bytes']} bytes"


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(evaluators, "_EVALUATORS", (BytesPerImage.from_config,))
    monkeypatch.setattr(setup, "create_model", lambda name, num_classes, **_: Small(num_classes))
    config = digits.get_config()
    config.data.image_size = config.eval.batch_size = 8
    config.data.eval_split = "test[:12]"
    return config


def test_an_evaluator_has_its_entries_its_metrics_and_its_log(config, caplog):
    caplog.set_level("INFO", "absl")
    config.notes = "on"
    run = setup.set_up_evaluation(config, devices=jax.devices()[:1])
    variables = jax.tree.map(
        jnp.ones_like, run.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    )
    with EvalLoop(run, Watchdog(config.distributed)) as eval_loop:
        metrics = eval_loop.run({"raw": variables, "ema": variables})
    # Four rows of the second batch are padding.
    assert metrics["bytes"] == sum(len(run.eval_source[i]["image"]) for i in range(12))
    assert metrics["raw_logits"] == metrics["ema_logits"] > 0
    assert metrics["count"] == 12
    assert f"ema weights | {metrics['bytes']} bytes" in caplog.text


def test_an_evaluator_may_be_off_or_refuse(config):
    assert setup.set_up_evaluation(config).evaluators == ()
    config.notes, config.log_every_steps = "unusable", 0
    with pytest.raises(ValueError, match=r"(?s)--config.log_every_steps=0.*--config.notes=unusabl"):
        setup.set_up_evaluation(config)
    config.notes, config.log_every_steps = "not here", 1
    with pytest.raises(ValueError, match="no 10 classes here"):
        setup.set_up_evaluation(config)
