"""A run's metrics on disk, and the counts of an evaluation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from helpers.events import read_events

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.training.metric_writer import MetricWriter, read_metrics
from cotnet_jax.training.metrics import (
    calibration_counts,
    confusion_counts,
    evaluation_counts,
    expected_calibration_error,
    mean_class_accuracy,
)


def test_scalars_reach_both_files(tmp_path):
    with MetricWriter(Workdir(tmp_path / "run")) as writer:
        writer.write_scalars(1, {"loss": jnp.float32(0.5), "top1": np.float64(2)})
        writer.write_scalars(2, {"loss": float("nan")})
        writer.write_text(2, "note", "**bold**")
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()  # before the close
    first, second = map(json.loads, lines)
    assert {"step": 1, "loss": 0.5, "top1": 2.0}.items() <= first.items()
    assert first["time"] > 1e9
    assert second["loss"] is None
    events = read_events(tmp_path / "run/tensorboard")
    values = {
        (event.step, value.tag): value.simple_value
        for event in events
        for value in event.summary.value
    }
    assert values[1, "loss"] == 0.5
    assert values[1, "top1"] == 2.0
    assert np.isnan(values[2, "loss"])
    assert any(tag.startswith("note") for _, tag in values)


def test_a_resumed_run_appends_and_the_last_value_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricWriter(Workdir(tmp_path)) as writer:
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": step})
    with path.open("a") as file:
        file.write('{"step": 40, "loss": 4')  # killed in the middle of a line
    with MetricWriter(Workdir(tmp_path), resume_step=20) as writer:
        writer.write_scalars(30, {"loss": 33})
        writer.write_scalars(30, {"top1": 0.5})
    metrics = read_metrics(path)
    assert list(metrics) == [10, 20, 30]
    assert metrics[20]["loss"] == 20
    assert metrics[30]["loss"] == 33
    assert metrics[30]["top1"] == 0.5
    assert len(path.read_text().splitlines()) == 6
    restarts = [e.step for e in read_events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert sorted(restarts) == [1, 21]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    with MetricWriter(Workdir(tmp_path / "off"), enabled=False) as writer:
        writer.write_scalars(1, {"loss": 1.0})
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(Workdir(tmp_path / "other")) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_text(1, "note", "text")
        writer.flush()
    assert not any(tmp_path.iterdir())


def test_a_failed_write_says_where_and_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"metrics to .*file.*--workdir"):
        MetricWriter(Workdir(tmp_path / "file"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    writer = MetricWriter(Workdir(tmp_path / "run"))
    with writer, pytest.raises(OSError, match=r"metrics.jsonl: No space left"):
        writer.write_scalars(1, {"loss": 1.0})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes", [3, 10])
def test_counts_against_sorting(dtype, classes):
    rng = np.random.default_rng(0)
    # Few distinct values, so that ties are everywhere.
    logits = rng.integers(0, 4, (64, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 64).astype(np.int32)
    mask = rng.random(64) < 0.8
    labels[~mask] = -1
    logits[~mask] = np.nan
    counts = jax.jit(evaluation_counts)(jnp.asarray(logits, dtype), labels, mask)

    order = np.argsort(-logits[mask], axis=-1, kind="stable")
    hits = order == labels[mask][:, None]
    shifted = logits[mask].astype(np.float64)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(mask.sum()), labels[mask]]
    assert counts["count"] == mask.sum()
    assert counts["top1"] == hits[:, 0].sum()
    assert counts["top5"] == hits[:, :5].sum()
    np.testing.assert_allclose(counts["loss"], losses.sum(), rtol=1e-5)
    assert counts["count"].dtype == counts["top1"].dtype == counts["top5"].dtype == jnp.int32


def test_a_logit_that_is_no_number_is_never_right():
    logits = jnp.full((2, 10), jnp.nan).at[1, 3].set(1.0)
    count = jax.jit(evaluation_counts)
    counts = count(logits, jnp.array([0, 3]), jnp.array([True, True]))
    assert counts["top1"] == counts["top5"] == 0
    few = count(logits[:1, :2], jnp.array([0]), jnp.array([True]))
    assert few["top5"] == 0


def test_confusion_and_calibration_against_scikit_learn():
    rng = np.random.default_rng(1)
    # Few distinct values, so that ties are everywhere, and confidences on the edges of the bins.
    logits = rng.integers(0, 3, (200, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 200).astype(np.int32)
    mask = rng.random(200) < 0.8
    labels[~mask], logits[~mask] = -1, np.nan
    top = logits[mask].argmax(1)
    counts = jax.jit(confusion_counts)(logits, labels, mask)["images"]
    np.testing.assert_array_equal(counts, sklearn.metrics.confusion_matrix(labels[mask], top))
    accuracy = sklearn.metrics.balanced_accuracy_score(labels[mask], top)
    assert mean_class_accuracy(np.asarray(counts)) == pytest.approx(accuracy)

    bins = 4
    sums = jax.jit(calibration_counts, static_argnums=3)(logits, labels, mask, bins)
    probabilities = scipy.special.softmax(logits[mask], axis=1).max(1)
    right = top == labels[mask]
    error = 0.0
    for number in range(bins):
        inside = (probabilities > number / bins) & (probabilities <= (number + 1) / bins)
        assert sums["images"][number] == inside.sum()
        assert sums["right"][number] == right[inside].sum()
        if inside.any():
            gap = abs(right[inside].mean() - probabilities[inside].mean())
            error += inside.mean() * gap
    sums = jax.device_get(sums)
    assert expected_calibration_error(**sums) == pytest.approx(error, rel=1e-5)
    assert sums["images"].sum() == mask.sum()


def test_a_confidence_of_one_is_in_the_last_bin():
    logits = jnp.array([[100.0, 0.0], [0.0, 0.0]])
    sums = calibration_counts(logits, jnp.array([0, 1]), jnp.array([True, True]), bins=2)
    # A confidence of exactly 1/2 is in the first bin, which ends there.
    assert sums["images"].tolist() == [1, 1]
    assert sums["right"].tolist() == [0, 1]


def test_classes_without_an_image_have_no_accuracy():
    assert mean_class_accuracy(np.array([[1, 1], [0, 0]])) == 0.5
