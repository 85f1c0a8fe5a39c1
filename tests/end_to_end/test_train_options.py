"""Options of training, on a network that compiles in a second."""

import functools
import io

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from helpers.events import read_events
from helpers.small_network import Small, create_small, short_digits_config
from PIL import Image

from configs import default, digits
from cotnet_jax.checkpoint.checkpointer import open_checkpoints
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.checkpoint.workdir import Workdir, WorkdirError
from cotnet_jax.data import pipeline
from cotnet_jax.data.sources import Synthetic
from cotnet_jax.distributed import sharding
from cotnet_jax.training import evaluate, loop, setup, utilization
from cotnet_jax.training import state as train_state
from cotnet_jax.training.input_limit import InputLimit
from cotnet_jax.training.metric_writer import read_metrics
from cotnet_jax.training.optimizer import ema_step_size_schedule, make_optimizer
from cotnet_jax.training.profiler import Profiler
from cotnet_jax.training.setup import EvalSetup, TrainSetup
from cotnet_jax.training.step import make_train_step

pytestmark = pytest.mark.end_to_end


def steps(model, count, *, accumulate_steps=1, ema_step_size=lambda step: 0.5):
    """The states before and after each of so many steps on one device, and the last metrics."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 8, 8, 8, 3), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    optimizer = optax.sgd(0.1)
    variables["batch_stats"] = jax.tree.map(
        lambda a: a + random.random(a.shape, np.float32), variables["batch_stats"]
    )
    before = TrainState(
        step=jnp.int32(0),
        **variables,
        ema=variables,
        opt_state=optimizer.init(variables["params"]),
        key=jax.random.key_data(jax.random.key(1)),
    )
    history = [jax.device_get(before)]
    step = make_train_step(
        model,
        optimizer,
        lambda key, batch: (batch["image"], jax.nn.one_hot(batch["label"], 10)),
        mesh=mesh,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        ema_step_size=ema_step_size,
        accumulate_steps=accumulate_steps,
    )
    state = sharding.replicate(mesh, history[0])
    for batch in images:
        state, metrics = step(state, {"image": batch, "label": np.arange(8, dtype=np.int32)})
        history.append(jax.device_get(state))
    return history, jax.device_get(metrics)


def differs(a, b):
    return jax.tree.map(lambda a, b: bool((a != b).any()), a, b)


def test_frozen_statistics_stay_bitwise_in_state_and_averages():
    warming = ema_step_size_schedule(ml_collections.ConfigDict({"decay": 0.95, "warmup": True}))
    history, _ = steps(Small(freeze_batch_norm=True), 50, ema_step_size=warming)
    first, last = history[0], history[-1]
    assert not any(jax.tree.leaves(differs(first.batch_stats, last.batch_stats)))
    assert not any(jax.tree.leaves(differs(first.ema["batch_stats"], last.ema["batch_stats"])))
    # Everything else is trained, scales and biases too.
    assert all(jax.tree.leaves(differs(first.params, last.params)))


def test_frozen_parts_are_the_whole_batch():
    """With frozen statistics accumulation is exact: no image sees its neighbours."""
    model = Small(freeze_batch_norm=True)
    whole, whole_metrics = steps(model, 2)
    parts, parts_metrics = steps(model, 2, accumulate_steps=4)
    np.testing.assert_allclose(parts_metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        parts[-1].params,
        whole[-1].params,
    )


def test_accumulated_parts_give_their_mean_gradient():
    """Each part has its own batch statistics, and the running ones take one after the other."""
    history, metrics = steps(Small(), 1, accumulate_steps=2)
    first, last = history
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    images = ((images / 255 - 0.5) / 0.25).astype(np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of_part(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = Small().apply(variables, images, train=True, mutable=["batch_stats"])
        targets = jax.nn.one_hot(labels, 10)
        return optax.softmax_cross_entropy(logits, targets).mean(), updates["batch_stats"]

    batch_stats, losses, gradients = first.batch_stats, [], []
    for part in (slice(0, 4), slice(4, 8)):
        (loss, batch_stats), gradient = of_part(
            first.params, batch_stats, images[part], np.arange(8)[part]
        )
        losses.append(loss)
        gradients.append(gradient)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, first.params, mean)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.global_norm(mean)), rel=1e-4)
    for ours, theirs in ((last.params, expected), (last.batch_stats, batch_stats)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs
        )


def test_averages_follow_their_schedule():
    history, _ = steps(Small(), 3, ema_step_size=lambda step: 1 / (2 + step))
    expected = history[0].ema
    for number, state in enumerate(history[1:]):
        share = 1 / (2 + number)
        new = {"params": state.params, "batch_stats": state.batch_stats}
        expected = jax.tree.map(lambda a, n, s=share: (1 - s) * a + s * n, expected, new)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            state.ema,
            expected,
        )


@pytest.mark.parametrize(
    ("fields", "evaluated", "saved"),
    [
        ({}, [4, 8, 12], [4, 8, 12]),
        ({"eval.every_epochs": 2}, [8, 12], [4, 8, 12]),
        ({"checkpoint.every_steps": 6}, [4, 8, 12], [4, 6, 8, 12]),
        ({"steps_per_eval": 5}, [5, 10, 12], [5, 10, 12]),
        ({"steps_per_eval": 5, "checkpoint.every_steps": 3}, [5, 10, 12], [3, 5, 6, 9, 10, 12]),
    ],
)
def test_when_to_evaluate_and_save(fields, evaluated, saved):
    config = default.get_config()
    config.update_from_flattened_dict({"epochs": 3} | fields)
    evaluation = EvalSetup(config, mesh=None, model=None, eval_source=None, evaluators=())
    run = TrainSetup(evaluation, train_source=None, steps_per_epoch=4, learning_rates=None)
    assert [step for step in range(1, 13) if run.evaluates_after(step)] == evaluated
    assert [step for step in range(1, 13) if run.saves_after(step)] == saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_float32_whatever_is_computed_with(dtype):
    config = digits.get_config()
    config.model.dtype = dtype
    run = setup.set_up_training(config, devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, run.learning_rates, run.steps_per_epoch)
    before = train_state.abstract_train_state(run, optimizer)
    batch = {"image": np.zeros((64, 32, 32, 3), np.uint8), "label": np.zeros(64, np.int32)}
    traced = loop.build_train_step(run, optimizer).trace(before, batch)
    after, metrics = traced.out_info
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)
    kept = jax.tree.leaves((after.params, after.batch_stats, after.ema, metrics))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    assert ("bf16" in str(traced.jaxpr)) == (dtype == "bfloat16")


@pytest.fixture
def config(monkeypatch):
    """A run of three epochs of four steps on the digits, with the small network."""

    monkeypatch.setattr(setup, "create_model", create_small)
    return short_digits_config()


def test_a_run_evaluated_by_steps(config, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(InputLimit, "after_line", lambda limit, share: waited.append(share))
    config.log_every_steps = 6
    config.steps_per_eval = 5
    config.checkpoint.keep_best = 3
    figures = loop.train(config, tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [step for step in metrics if "ema_top1" in metrics[step]] == [5, 10, 12]
    assert waited == [metrics[step]["data_wait_share"] for step in (6, 12)]
    assert metrics[12]["ema_top1"] == figures["ema_top1"]
    with open_checkpoints(Workdir(tmp_path), config, read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [5, 10, 12]


def test_all_that_is_logged_on_request(config, tmp_path, monkeypatch):
    monkeypatch.setitem(utilization.PEAKS, jax.devices()[0].device_kind, 1e9)
    config.log.extras, config.log_every_steps = "all", 3
    config.steps_per_eval = 8
    batches = setup.set_up_training(config).train_batches(0)
    given = [next(batches)["image"] for _ in range(9)]
    loop.train(config, tmp_path)
    line = read_metrics(tmp_path / "metrics.jsonl")[6]
    assert {"step_seconds", "mfu", "gradient_norm/conv", "gradient_norm/head"} <= line.keys()
    events = read_events(tmp_path / "tensorboard")
    pictures = {e.step: v.image for e in events for v in e.summary.value if v.HasField("image")}
    assert list(pictures) == [1, 9]
    for step, picture in pictures.items():
        pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
        # The eight images are shared by the devices; the first one is on the first device.
        np.testing.assert_array_equal(pixels[:8, :8], given[step - 1][0])


def test_a_single_class_is_refused(config, monkeypatch):
    source = Synthetic("train", image_size=8, sizes={"train": 32}, class_names=("only",))
    monkeypatch.setattr(setup, "open_source", lambda *_: source)
    with pytest.raises(ValueError, match="has one class, 'only', and a classifier needs two"):
        setup.set_up_training(config)


def test_any_checkpoint_is_evaluated_on_any_split(config, tmp_path, monkeypatch):
    config.checkpoint.keep_best = 3
    loop.train(config, tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    config.data.train_split = "not there, and not needed"
    config.batch_size = 7
    for kind in ("raw", "ema"):
        config.init_from, config.init_kind = str(tmp_path / "checkpoints" / "4"), kind
        figures = evaluate.evaluate_only(config, None)
        assert figures["given_loss"] == pytest.approx(metrics[4][f"{kind}_loss"], rel=1e-5)
    config.data.eval_split = "train[:20]"
    assert evaluate.evaluate_only(config, None)["count"] == 20
    config.data.name, config.data.eval_split = "synthetic", "validation[:8]"
    message = "the weights have 10 classes, but 'synthetic' has 1000; .*train --config=finetune "
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate_only(config, None)


def test_with_randaugment_on_the_device_the_same_step_again_is_bitwise_the_same(config):
    config.augment.randaugment = "rand-m9-n2"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 8, 8, 8, 3), np.uint8)

    def trained(place, start=None):
        """The states after each step, from the second one on if it is given."""
        config.augment.randaugment_on = place
        run = setup.set_up_training(config, devices=jax.devices()[:1])
        optimizer = loop.build_optimizer(run)
        step = loop.build_train_step(run, optimizer)
        state = start or train_state.create_train_state(run, optimizer)
        history = []
        for batch in images[2 if start else 0 :]:
            state, _ = step(state, {"image": batch, "label": np.arange(8, dtype=np.int32)})
            history.append(jax.device_get(state))
        return history

    whole, host = trained("device"), trained("host")
    jax.tree.map(np.testing.assert_array_equal, trained("device", whole[1]), whole[2:])
    assert any(jax.tree.leaves(differs(whole[0].params, host[0].params)))


def test_going_on_does_not_read_the_first_weights_again(config, tmp_path, monkeypatch):
    model = Small()
    given = model.init(jax.random.key(5), jnp.zeros((1, 8, 8, 3)))
    config.init_from, config.epochs = "somewhere", 1
    monkeypatch.setattr(train_state, "load", lambda *args, **kwargs: (model, given))
    loop.train(config, tmp_path)
    monkeypatch.delattr(train_state, "load")
    config.epochs, config.resume.allow_changes = 2, "epochs"
    loop.train(config, tmp_path)
    assert max(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_resuming_with_another_batch_size_is_refused(config, tmp_path):
    config.epochs = 1
    loop.train(config, tmp_path)
    config.epochs, config.batch_size = 2, 16
    before = sorted(tmp_path.rglob("*"))
    message = r"(?s)batch_size: 8 there, 16 here.*allow_changes=epochs,batch_size to go on"
    with pytest.raises(WorkdirError, match=message):
        loop.train(config, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    config.resume.allow_changes = "batch_size,epochs"
    loop.train(config, tmp_path)
    # The settings are this run's from now on.
    config.resume.allow_changes = ""
    loop.train(config, tmp_path)


def profiles(workdir):
    return sorted((workdir / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))


def test_a_window_of_steps_is_profiled(config, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    window = config.profile
    window.first_step, window.steps = 3, 2

    def trace(start_step, total_steps=12, last=None):
        events.clear()
        with Profiler(tmp_path, window, start_step=start_step, total_steps=total_steps) as profiler:
            for step in range(start_step + 1, (last or total_steps) + 1):
                profiler.before_step(step)
                events.append(step)
                profiler.after_step(step, [])
        return events

    assert trace(0, last=5) == [1, 2, "start", 3, 4, "stop", 5]
    assert trace(3, last=5) == ["start", 4, "stop", 5]
    # What ends inside the window ends the profile too.
    assert trace(0, last=3) == [1, 2, "start", 3, "stop"]
    assert trace(0, total_steps=3) == [1, 2, "start", 3, "stop"]
    window.steps = 0
    assert "start" not in trace(0)


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    config, tmp_path, caplog, monkeypatch
):
    def full():
        # As JAX has it where the disk is full; a real one would leave its profiler unusable.
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    config.profile.first_step, config.profile.steps = 1, 1
    with Profiler(tmp_path, config.profile, start_step=0, total_steps=1) as profiler:
        profiler.before_step(1)
        profiler.after_step(1, [])
    assert f"The profile could not be written to {tmp_path}: RESOURCE_EXHAUSTED" in caplog.text


def test_a_profile_lies_beside_the_curves(config, tmp_path, caplog):
    config.epochs = 1
    config.profile.first_step, config.profile.steps = 2, 2
    loop.train(config, tmp_path)
    (profile,) = profiles(tmp_path)
    assert b"train" in profile.read_bytes()
    config.epochs, config.resume.allow_changes = 2, "epochs"
    loop.train(config, tmp_path)
    assert len(profiles(tmp_path)) == 1
    assert "asks for steps 2 to 3, but this process runs steps 5 to 8" in caplog.text


def test_a_configuration_is_tried_on_fake_images(config, tmp_path):
    config.data.fake = True
    config.epochs = 1
    figures = loop.train(config, tmp_path)
    assert figures["count"] == 12
    assert max(read_metrics(tmp_path / "metrics.jsonl")) == 4
    config.data.fake = False
    with pytest.raises(ValueError, match=r"--config.data.fake: True there, False here"):
        loop.train(config, tmp_path)


def test_every_evaluation_of_a_run_reads_through_the_same_pipeline(config, tmp_path, monkeypatch):
    opened, closed = [], []
    eval_batches = pipeline.eval_batches

    def counted(*args, **kwargs):
        opened.append(kwargs["repeat"])
        try:
            yield from eval_batches(*args, **kwargs)
        finally:
            closed.append(True)

    monkeypatch.setattr(pipeline, "eval_batches", counted)
    loop.train(config, tmp_path)
    assert (opened, closed) == ([True], [True])
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [step for step in metrics if "raw_loss" in metrics[step]] == [4, 8, 12]
