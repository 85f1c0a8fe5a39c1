"""Resuming with other settings: every field is classified, and what may not change is refused."""

import json

import jax
import pytest
from absl import logging
from helpers.processes import finish, free_address, start_python

from configs import default
from cotnet_jax.checkpoint.config_changes import CLASSES, Change, change_of
from cotnet_jax.checkpoint.workdir import Workdir, WorkdirError
from cotnet_jax.config import flatten
from cotnet_jax.data import imagenet

FREE = {
    "steps_per_eval": 7,
    "init_from": "/elsewhere",
    "init_kind": "raw",
    "accept_classes": True,
    "finetune.new_head": True,
    "data.data_dir": "/moved",
    "data.eval_split": "test",
    "data.crop": 0.9,
    "data.num_threads": 3,
    "data.num_workers": 3,
    "data.prefetch": 3,
    "data.max_undecodable": 0.5,
    "eval.batch_size": 64,
    "eval.every_epochs": 2,
    "eval.real_labels": "/real.json",
    "eval.calibration_bins": 10,
    "early_stopping.metric": "raw_loss",
    "early_stopping.patience": 3,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_best": 1,
    "profile.steps": 5,
    "profile.first_step": 50,
    "distributed.timeout_seconds": 100,
    "distributed.slow_timeout_seconds": 200,
    "log.writers": "wandb",
    "log.project": "mine",
    "log.extras": "all",
    "log_every_steps": 1,
    "notes": "again",
}
REFUSED = {
    "seed": 1,
    "epochs": 400,
    "steps": 500,
    "batch_size": 320,
    "accumulate_steps": 2,
    "model.name": "cotnet101",
    "model.drop_rate": 0.0,
    "model.drop_path_rate": 0.2,
    "model.output_stride": 16,
    "model.dtype": "float32",
    "model.sync_batch_norm": True,
    "model.freeze_batch_norm": True,
    "finetune.freeze": "stem",
    "finetune.rate_multipliers": "head=10",
    "finetune.layer_decay": 0.7,
    "finetune.head_only_epochs": 1,
    "finetune.head_only_steps": 10,
    "data.name": "/photos",
    "data.fake": True,
    "data.train_split": "train[:10%]",
    "data.image_size": 256,
    "data.interpolation": "bilinear",
    "data.mean": (0.5, 0.5, 0.5),
    "data.std": (0.5, 0.5, 0.5),
    "data.scaled_decoding": True,
    "data.balanced_sampling": True,
    "data.max_pixels": 1000,
    "data.exif_orientation": True,
    "augment.scale": (0.2, 1.0),
    "augment.ratio": (1.0, 1.0),
    "augment.flip": 0.0,
    "augment.randaugment": "",
    "augment.randaugment_on": "device",
    "augment.color_jitter": 0.0,
    "augment.erasing_probability": 0.5,
    "augment.erasing_mode": "const",
    "augment.erasing_area": (0.1, 0.2),
    "augment.erasing_ratio": (0.5, 2.0),
    "mixing.probability": 0.5,
    "mixing.cutmix_probability": 0.0,
    "mixing.mixup_alpha": 0.0,
    "mixing.cutmix_alpha": 0.0,
    "mixing.label_smoothing": 0.0,
    "loss.class_weights": "balanced",
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.0,
    "optimizer.momentum": 0.8,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.epsilon": 1e-6,
    "optimizer.clip_norm": 1.0,
    "schedule.peak": 0.1,
    "schedule.unit": "step",
    "schedule.warmup_epochs": 1,
    "schedule.warmup_steps": 100,
    "schedule.warmup_start": 0.0,
    "schedule.final": 0.0,
    "schedule.base_batch_size": 256,
    "ema.decay": 0.0,
    "ema.warmup": True,
}


@pytest.fixture
def config():
    return default.get_config()


@pytest.fixture
def mesh():
    return jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])


@pytest.fixture
def workdir(tmp_path, config):
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    workdir.config.write_text(config.to_json())
    return workdir


@pytest.fixture
def logged(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *args: lines.append(text % args))
    return lines


def change(config, fields):
    with config.ignore_type():
        config.update_from_flattened_dict(fields)


def test_every_field_is_classified(config):
    fields = set(flatten(config))
    assert fields == FREE.keys() | REFUSED.keys() | {"resume.allow_changes"}
    covered = {name for name in CLASSES for field in fields if f"{field}.".startswith(f"{name}.")}
    assert covered == CLASSES.keys()
    # The fields of data are of all kinds, so that a new one must be looked at.
    assert {field for field in fields if field.startswith("data.")} <= CLASSES.keys()
    assert change_of("data.new") is change_of("new") is Change.MEANING


@pytest.mark.parametrize("field", REFUSED)
def test_what_changes_a_step_is_refused(config, workdir, field):
    before = workdir.path.joinpath("config.json").read_bytes()
    old = json.loads(config.to_json())
    change(config, {field: REFUSED[field]})
    now = json.loads(config.to_json())
    with pytest.raises(WorkdirError) as error:
        workdir.check_resume(config, has_steps=True)
    message = str(error.value)
    values = flatten(old)[field], flatten(now)[field]
    assert f"--config.{field}: {values[0]!r} there, {values[1]!r} here" in message
    assert f"add --config.resume.allow_changes={field} to go on" in message
    assert workdir.config.read_bytes() == before


@pytest.mark.parametrize("field", ["augment.randaugment_on", "data.scaled_decoding"])
def test_a_run_from_before_a_field_goes_on_as_it_began(config, workdir, logged, field):
    section, name = field.split(".")
    old = json.loads(config.to_json())
    del old[section][name]
    workdir.config.write_text(json.dumps(old))
    workdir.check_resume(config, has_steps=True)
    assert not logged
    change(config, {field: REFUSED[field]})
    with pytest.raises(WorkdirError, match=f"--config.{field}: "):
        workdir.check_resume(config, has_steps=True)


@pytest.mark.parametrize("field", FREE)
def test_what_may_change_is_one_line(config, workdir, logged, field):
    change(config, {field: FREE[field]})
    workdir.check_resume(config, has_steps=True)
    (line,) = logged
    assert line.startswith(f"Changed since the last start: --config.{field}: ")
    assert f"{FREE[field]!r} here" in line


@pytest.mark.parametrize(
    "allowed",
    ["epochs,schedule.peak,seed", "schedule, epochs ,seed", "all", "seed,epochs,schedule"],
)
def test_changes_that_are_allowed(config, workdir, logged, allowed):
    fields = {"epochs": 400, "schedule.peak": 0.1, "seed": 7}
    change(config, {**fields, "resume.allow_changes": allowed})
    workdir.check_resume(config, has_steps=True)
    assert len(logged) == 3


def test_only_what_is_listed_is_allowed(config, workdir):
    fields = {"epochs": 400, "schedule.peak": 0.1, "seed": 7, "ema.decay": 0.5}
    change(config, {**fields, "resume.allow_changes": "schedule,epoch,sed,ema.warmup"})
    with pytest.raises(WorkdirError) as error:
        workdir.check_resume(config, has_steps=True)
    assert "allow_changes=seed,epochs,ema.decay to" in str(error.value)
    assert "schedule" not in str(error.value)


def test_before_the_first_checkpoint_all_may_change(config, workdir, logged):
    change(config, {"seed": 7, "model.name": "cotnet101"})
    workdir.check_resume(config, has_steps=False)
    assert len(logged) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("acb", "they have another order: label 1 is 'b' in the run, 'c' in the dataset"),
        ("abd", "only the run has 'c'; only the dataset has 'd'"),
        ("abcd", "only the dataset has 'd'"),
        ("ab", "only the run has 'c'"),
        ("abcc", "the run has 3, the dataset 4"),
        (["A", "b", " c"], "only the run has 'a'; only the dataset has 'A'"),
    ],
)
def test_other_classes_are_refused(config, workdir, logged, names, words):
    workdir.classes.write_text("a\nb\nc\n")
    with pytest.raises(WorkdirError) as error:
        workdir.check_resume(config, has_steps=True, class_names=names)
    message = str(error.value)
    assert f"not those of this run ({workdir.classes}): {words}. Continue with" in message
    assert f"--weights={workdir} or" in message.replace(";", "")
    assert not logged
    config.accept_classes = True
    workdir.check_resume(config, has_steps=True, class_names=names)
    assert any(words in line for line in logged)


@pytest.mark.parametrize("content", [None, "", "a\nb\n", "\ufeffa\r\nb \n\n"])
def test_the_same_classes_or_unknown_ones_go_on(config, workdir, content):
    config.data.name = "mine"
    workdir.config.write_text(config.to_json())
    if content is not None:
        workdir.classes.write_text(content)
    workdir.check_resume(config, has_steps=True, class_names=("a", "b"))
    # Noise has no classes, and before the first checkpoint nothing was learned.
    workdir.check_resume(config, has_steps=True, class_names=None)
    workdir.check_resume(config, has_steps=False, class_names=("x", "y"))


def test_damaged_class_names_are_one_line(config, workdir):
    workdir.classes.write_bytes(b"a\nb\xff\n")
    with pytest.raises(WorkdirError) as error:
        workdir.check_resume(config, has_steps=True, class_names=("a", "b"))
    assert str(error.value).startswith(f"{workdir.classes}: not a text file")
    assert "or delete it" in str(error.value)


def test_imagenet_is_known_without_a_list(config, workdir):
    wnids = imagenet.wnids()
    workdir.check_resume(config, has_steps=True, class_names=wnids)
    with pytest.raises(WorkdirError, match="another order: label 0 is 'n01440764'"):
        workdir.check_resume(config, has_steps=True, class_names=wnids[::-1])


def test_fields_of_other_versions_count_as_equal(config, workdir):
    earlier = json.loads(config.to_json())
    del earlier["ema"], earlier["seed"], earlier["data"]["fake"], earlier["resume"]
    earlier["removed"], earlier["data"]["removed"] = 1, {"deep": 2}
    workdir.config.write_text(json.dumps(earlier))
    workdir.check_resume(config, has_steps=True)


def test_the_same_path_written_otherwise_is_equal(config, workdir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    earlier = json.loads(config.to_json())
    earlier["data"]["name"] = "photos"
    workdir.config.write_text(json.dumps(earlier))
    config.data.name = str(tmp_path / "photos")
    workdir.check_resume(config, has_steps=True)


def test_evaluating_elsewhere_only_the_network_and_its_images_count(config, workdir):
    change(config, {"batch_size": 7, "data.image_size": 320, "seed": 1})
    workdir.check_config(config)
    config.model.name = "cotnet101"
    with pytest.raises(WorkdirError, match=r"model.name: 'cotnet50' there, 'cotnet101' here"):
        workdir.check_config(config)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"seed": 1',
        b"[]",
        b"null",
        b"{}",
        b'"text"',
        b"\xff\xfe\0",
        b'{"a": NaNa}',
        b"\0" * 40,
        b"[" * 100_000,
    ],
)
def test_a_damaged_configuration_names_its_file_and_the_remedy(config, workdir, content):
    workdir.config.write_bytes(content)
    for check in (
        lambda: workdir.check_resume(config, has_steps=True),
        lambda: workdir.check_config(config),
    ):
        with pytest.raises(WorkdirError) as error:
            check()
        message = str(error.value)
        assert message.startswith(f"{workdir.config}: the configuration of this run is damaged: ")
        assert f"of the last whole line of {workdir.starts}" in message
        assert "\n" not in message


@pytest.mark.parametrize("content", ['{"model": "x"}', '{"model": {"name": 7}, "data": []}'])
def test_sections_of_another_kind_differ_or_are_unknown(config, workdir, content):
    workdir.config.write_text(content)
    try:
        workdir.check_resume(config, has_steps=True)
    except WorkdirError as error:
        assert "holds another run" in str(error)


def test_the_configuration_of_every_start_is_kept(config, tmp_path, mesh):
    workdir = Workdir(tmp_path / "run")
    for seed in (1, 2, 3):
        config.seed = seed
        workdir.write_run_metadata(config=config, params={}, mesh=mesh, class_names=())
        # A kill in the middle of a line costs that line only.
        with workdir.starts.open("a") as file:
            file.write('{"torn')
    starts = []
    for line in workdir.starts.read_text().splitlines():
        try:
            starts.append(json.loads(line))
        except ValueError:
            assert line == '{"torn'
    assert [start["config"]["seed"] for start in starts] == [1, 2, 3]
    assert starts[0]["config"] == json.loads(config.to_json()) | {"seed": 1}
    assert starts[0]["versions"]["jax"] == jax.__version__
    assert starts[0]["versions"]["cotnet_jax"]


def test_one_run_at_a_time_and_its_leftovers(tmp_path):
    workdir = Workdir(tmp_path / "run")
    left = [".writing-12-config.json", "config.json.tmp", "checkpoints/.probe-5"]
    left.append("checkpoints/3/.writing-1-manifest.json")
    kept = ["metrics.jsonl", "checkpoints/3/manifest.json", "notes.tmp"]
    for name in left + kept:
        (workdir.path / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir.path / name).write_text("")
    with workdir.locked():
        assert not any((workdir.path / name).exists() for name in left)
        assert all((workdir.path / name).exists() for name in kept)
        workdir.check_lock()
        (workdir.checkpoints / ".probe-9").write_text("")
        other = Workdir(workdir.path)
        message = "another run is at work in .*choose another --workdir"
        with pytest.raises(OSError, match=message), other.locked():
            pass
        # What belongs to a living process stays.
        assert (workdir.checkpoints / ".probe-9").exists()
    assert not workdir.lock.exists()


def test_processes_share_the_lock_of_the_first(tmp_path):
    code = """
        import pathlib, sys, time
        import jax
        jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
        from cotnet_jax.checkpoint.workdir import Workdir
        from cotnet_jax.files import FolderLock
        folder = pathlib.Path(sys.argv[3]).parent
        workdir = Workdir(sys.argv[3])
        with workdir.locked():
            print("held", workdir.lock.exists())
            # Until both have looked.
            (folder / f"looked {jax.process_index()}").touch()
            while len([*folder.glob("looked *")]) < 2:
                time.sleep(0.01)
        if jax.process_index() == 0:
            FolderLock(workdir.lock, "other", "none").acquire()
        try:
            with workdir.locked():
                pass
        except OSError as error:
            print(type(error).__name__, error)
        from cotnet_jax.distributed.first_process import run_on_first
        print("shared", run_on_first(lambda: [jax.process_index(), 0.1], 60))
    """
    address = free_address()
    first, second = finish(*(start_python(code, address, n, tmp_path / "run") for n in range(2)))
    assert first.startswith("held True\nLockedError another run is at work in ")
    assert second.startswith("held True\nFirstProcessError process 0: another run is at work in ")
    assert "shared [0, 0.1]" in first and "shared [0, 0.1]" in second
