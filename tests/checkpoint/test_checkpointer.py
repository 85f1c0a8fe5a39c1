"""Checkpoints: exact, asynchronous, the right ones kept, and damage noticed."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from helpers.damage import flip_a_bit, remove, remove_item, spoil_the_metrics, truncate
from helpers.processes import finish, free_address, start_python
from helpers.states import assert_identical, make_state

from cotnet_jax.checkpoint.checkpointer import Checkpointer, CheckpointError

pytestmark = pytest.mark.end_to_end


def save_steps(directory, steps, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            checkpointer.save(make_state(step), {"ema_top1": step / 100})


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: lines.append(text % args if args else text)
    )
    return lines


@pytest.mark.parametrize("ema", [True, False])
def test_everything_comes_back_bit_for_bit(tmp_path, ema):
    state = make_state(3, ema=ema)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.restore_latest(make_state(0, ema=ema)) is None
        assert checkpointer.save(state)
    abstract = jax.eval_shape(lambda: make_state(0, ema=ema))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        for example in (make_state(0, ema=ema), abstract):
            restored = checkpointer.restore_latest(example)
            assert_identical(restored, state)
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: jnp.zeros_like(x) + x.size, s), donate_argnums=0
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
        for _ in range(5):
            state = overwrite(state)
        jax.block_until_ready(state)
        assert_identical(checkpointer.restore_latest(make_state(0)), expected)


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    accuracies = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.9, 5: None, 6: 0.1, 7: float("nan"), 8: 0.3}
    with Checkpointer(tmp_path, keep_best=2) as checkpointer:
        for step, accuracy in accuracies.items():
            metrics = None if accuracy is None else {"ema_top1": accuracy, "top1": 0.0}
            checkpointer.save(make_state(step), metrics)
        assert checkpointer.all_steps() == [2, 4, 7, 8]
    with Checkpointer(tmp_path, keep_best=2) as checkpointer:
        assert checkpointer.all_steps() == [2, 4, 7, 8]
        assert checkpointer.latest_step() == 8
        assert checkpointer.best_step() == 4  # the later one of equals
        assert checkpointer.metrics(2) == {"ema_top1": 0.9, "top1": 0.0}
        checkpointer.save(make_state(9), {"ema_top1": 1.0})
        checkpointer.wait()
        assert checkpointer.all_steps() == [4, 8, 9]
        assert checkpointer.best_step() == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "8", "9"]


def test_saving_a_step_again_only_adds_missing_metrics(tmp_path):
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        assert checkpointer.save(make_state(1))
        assert checkpointer.best_step() is None
        other = make_state(2).replace(step=jnp.int32(1))
        assert not checkpointer.save(other, {"ema_top1": 0.5})
        assert not checkpointer.save(other, {"ema_top1": 0.7})
        assert checkpointer.best_step() == 1
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        assert checkpointer.metrics(1) == {"ema_top1": 0.5}
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(1))


@pytest.mark.parametrize("damage", [truncate, remove, remove_item, flip_a_bit, spoil_the_metrics])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, warnings_logged, damage):
    save_steps(tmp_path, [1, 2])
    damage(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpointer:
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(1))
        assert any("step 2: " in line and "Damaged" in line for line in warnings_logged)
        assert any("Using the checkpoint of step 1" in line for line in warnings_logged)
        assert checkpointer.all_steps() == [1]
        assert (tmp_path / "2.damaged").is_dir()
        # The run resumes from step 1 and reaches step 2 once more.
        assert checkpointer.save(make_state(2))
    with Checkpointer(tmp_path) as checkpointer:
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(2))


def spoil(state, part, value):
    """A state with one value that is not finite in one of its parts."""
    leaves, structure = jax.tree.flatten(getattr(state, part))
    index = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
    leaves[index] = leaves[index].ravel().at[-1].set(value).reshape(leaves[index].shape)
    return state.replace(**{part: jax.tree.unflatten(structure, leaves)})


@pytest.mark.parametrize(
    ("part", "value"),
    [("params", np.nan), ("batch_stats", np.inf), ("ema", np.nan), ("opt_state", -np.inf)],
)
def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, warnings_logged, part, value):
    save_steps(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(spoil(make_state(2), part, value), {"ema_top1": 0.9})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_good_step(before=3) == 1
        assert checkpointer.latest_good_step(before=1) is None
        if part == "ema":
            assert_identical(
                checkpointer.restore_weights("best"), jax.tree.map(np.array, make_state(1).ema)
            )
            with pytest.raises(CheckpointError, match=r"step 2: 1 arrays(.|\n)*ema/.*not finite"):
                checkpointer.restore_weights(2)
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(1))
        assert any("step 2: 1 arrays have values" in line for line in warnings_logged)
        assert checkpointer.all_steps() == [1]
        assert (tmp_path / "2.damaged").is_dir()
        assert checkpointer.save(make_state(2))


def test_a_checkpoint_is_set_aside(tmp_path):
    save_steps(tmp_path, [1, 2])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.set_aside(2)
        assert checkpointer.all_steps() == [1]
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(1))
        assert checkpointer.save(make_state(2))
        checkpointer.set_aside(2)
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2.diverged"}


def test_all_damaged_is_one_error_that_names_each(tmp_path):
    save_steps(tmp_path, [1, 2])
    truncate(tmp_path / "1")
    flip_a_bit(tmp_path / "2")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(
            CheckpointError, match=r"(?s)step 2: .*changed.*step 1: .*bytes.*another --workdir"
        ),
    ):
        checkpointer.restore_latest(make_state(0))
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_weights_alone(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2], keep_best=1)
    save_steps(tmp_path, [3], keep_best=1)
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        checkpointer.save(make_state(4, ema=False))
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    read = []
    restore = ocp.CheckpointManager.restore
    monkeypatch.setattr(
        ocp.CheckpointManager,
        "restore",
        lambda self, step, args: read.extend(args.keys()) or restore(self, step, args=args),
    )
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        for step, expected in [("best", 3), (3, 3)]:
            assert_identical(
                checkpointer.restore_weights(step), jax.tree.map(np.array, make_state(expected).ema)
            )
        state = make_state(4, ema=False)
        raw = checkpointer.restore_weights("latest", "raw")
        assert_identical(
            raw,
            jax.tree.map(np.array, {"params": state.params, "batch_stats": state.batch_stats}),
        )
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(raw))
        assert read == ["ema", "ema", "weights"]
        with pytest.raises(CheckpointError, match=r"no EMA.*raw"):
            checkpointer.restore_weights("latest", "ema")
        with pytest.raises(CheckpointError, match=r"step 1 .*there are: 3, 4"):
            checkpointer.restore_weights(1)
        with pytest.raises(ValueError, match='"latest" or "best"'):
            checkpointer.restore_weights("newest")
        with pytest.raises(ValueError, match='"ema" or "raw"'):
            checkpointer.restore_weights(3, "average")
    assert files == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="missing"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (dict(width=16), r"stem/bias: float32\[8\] in the checkpoint, float32\[16\] in this run"),
        (dict(ema=False), r"ema/.*in the checkpoint, absent in this run"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, example, message):
    save_steps(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=message):
        checkpointer.restore_latest(make_state(0, **example))
    assert (tmp_path / "1").is_dir()


@pytest.mark.parametrize("jump", [2_000.0, 1.8e9, -1.8e9])
def test_a_jump_of_the_clock_does_not_end_a_write(tmp_path, monkeypatch, jump):
    """As of a machine that hears of the network's time; here at every look at the clock."""
    now = [1e9]

    def jumping_time() -> float:
        now[0] += jump
        return now[0]

    with Checkpointer(tmp_path, timeout_seconds=1800) as checkpointer:
        monkeypatch.setattr(time, "time", jumping_time)
        for step in (1, 2):
            checkpointer.save(make_state(step))
            checkpointer.wait()
        monkeypatch.undo()
        assert checkpointer.all_steps() == [1, 2]
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(2))


def test_a_write_that_takes_too_long_is_still_an_error(tmp_path, monkeypatch):
    now = time.monotonic()
    with Checkpointer(tmp_path, timeout_seconds=30) as checkpointer:
        monkeypatch.setattr(time, "monotonic", lambda: time.perf_counter() * 1e4 + now)
        with pytest.raises(CheckpointError, match=r"Could not write the checkpoint of step 1"):
            checkpointer.save(make_state(1))
            checkpointer.wait()
        monkeypatch.undo()


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot write checkpoints to .*--workdir"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path):
    # A limit on the size of files stands in for a full disk: no privilege is needed.
    code = """
        import resource, sys
        from cotnet_jax.checkpoint.checkpointer import Checkpointer, CheckpointError
        from helpers.states import make_state
        try:
            with Checkpointer(sys.argv[1]) as checkpointer:
                checkpointer.save(make_state(1))
                checkpointer.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
                checkpointer.save(make_state(2))
                checkpointer.wait()
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        with Checkpointer(sys.argv[1]) as checkpointer:
            print(int(checkpointer.restore_latest(make_state(0)).step))
            checkpointer.save(make_state(2))
            checkpointer.wait()
            print(checkpointer.all_steps())
    """
    process = start_python(code, tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    # One error: neither Orbax's tracebacks, nor the same once more from the close.
    assert len(err.splitlines()) < 20, err
    assert "Could not write" not in err
    error, *rest = out.splitlines()
    assert "Could not write the checkpoint of step 2" in error
    assert "File too large" in error
    assert "Earlier checkpoints are intact (steps: 1)" in error
    assert rest == ["1", "[1, 2]"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_killed_while_writing(tmp_path):
    code = """
        import sys
        from cotnet_jax.checkpoint.checkpointer import Checkpointer
        from helpers.states import make_state
        start = int(sys.argv[2])
        with Checkpointer(sys.argv[1]) as checkpointer:
            for step in range(start, start + 10_000):
                checkpointer.save(make_state(step))
                print(step, flush=True)
    """
    step = 0
    for kill in range(3):
        process = start_python(code, tmp_path, step + 1)
        for line in process.stdout:
            if int(line) == step + 3:
                break
        while not any(tmp_path.glob("*.orbax-checkpoint-tmp*/*")):
            assert process.poll() is None
        time.sleep(0.01 * kill)
        process.kill()
        process.communicate()
        with Checkpointer(tmp_path) as checkpointer:
            restored = checkpointer.restore_latest(make_state(0))
            assert int(restored.step) >= step + 2
            step = int(restored.step)
            assert_identical(restored, make_state(step))
            assert checkpointer.all_steps() == [step - 1, step]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(step + 1))
    assert {p.name for p in tmp_path.iterdir()} == {str(step), str(step + 1)}


def test_other_devices_and_processes(tmp_path):
    """Written by two processes of two devices, read by one, and the other way round."""
    code = """
        import sys
        import jax
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        directory, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.distributed.initialize(address, num_processes=2, process_id=rank)
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from cotnet_jax.checkpoint.checkpointer import Checkpointer
        from helpers.states import assert_identical, make_state
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        replicated = NamedSharding(mesh, PartitionSpec())

        def place(state):
            return jax.tree.map(
                lambda x: jax.make_array_from_callback(
                    x.shape, replicated, np.asarray(x).__getitem__
                ),
                state,
            )

        with Checkpointer(directory, keep_best=1) as checkpointer:
            restored = checkpointer.restore_latest(place(make_state(0)))
            assert_identical(restored, make_state(1))  # the newer step 2 is damaged
            assert all(x.sharding == replicated for x in jax.tree.leaves(restored))
            assert checkpointer.all_steps() == [1]
            for step in (2, 3, 4):
                assert checkpointer.save(place(make_state(step)), {"ema_top1": 1 / step})
            weights = checkpointer.restore_weights("best")
            assert_identical(weights, jax.tree.map(np.array, make_state(2).ema))
            print(checkpointer.all_steps(), checkpointer.best_step())
        try:
            Checkpointer(f"{directory}/only-{rank}")
        except RuntimeError as error:
            print(error)
    """
    save_steps(tmp_path, [1, 2])
    flip_a_bit(tmp_path / "2")
    address = free_address()
    processes = [start_python(code, tmp_path, address, rank, devices=2) for rank in range(2)]
    for out in finish(*processes):
        assert "[2, 3, 4] 2" in out
        assert "not the same folder on all 2 processes" in out
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        assert_identical(checkpointer.restore_latest(make_state(0)), make_state(4))
