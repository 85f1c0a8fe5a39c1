"""Makes the files beside this one, with the code of commit 29124b1 and nothing newer.

    git worktree add /tmp/old 29124b1
    cd /tmp/old && PYTHONPATH=.:tests python .../make.py OUTPUT

The arrays repeat a short pattern, so that megabytes of them are compressed to kilobytes. In the
run the last stage's features are all 0, so that no gradient reaches its kernels, and its arrays
stay as regular: weight decay, momentum and EMA are functions of each value alone.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import torch_file_builder as build
from cotnet_jax.experiment import set_up
from cotnet_jax.optim import make_optimizer
from cotnet_jax.train import state_shapes

from configs import digits
from cotnet_jax import convert, torch_weights, weights
from cotnet_jax.checkpoint import open_checkpoints

OUTPUT = pathlib.Path(sys.argv[1])
PERIOD = 61
FLAGS = {
    "data.train_split": "train[:16]",
    "data.eval_split": "test[:8]",
    "batch_size": 8,
    "eval.batch_size": 8,
    "epochs": 2,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_best": 2,
    "log_every_steps": 1,
    "schedule.warmup_start": 0.1,
    "optimizer.weight_decay": 0.01,
    "init_from": "tiny.pth.tar",
}
# Of four steps.
KEPT = (2, 3)
KINDS = ("raw", "ema")


def pattern(name, shape, seed):
    if name.endswith("num_batches_tracked"):
        return np.asarray(7, np.int64)
    random = np.random.RandomState((sum(name.encode()) + seed) & 0xFFFFFFFF)
    values = random.uniform(0.5, 1.5, PERIOD)
    if not name.endswith("running_var"):
        values -= 1
    size = int(np.prod(shape))
    scale = 1 if len(shape) == 1 else np.sqrt(1 / np.prod(shape[1:]))
    return (scale * values[np.arange(size) % PERIOD]).astype(np.float32).reshape(shape)


def state_dict(seed):
    shapes = torch_weights.torch_shapes("cotnet_tiny", num_classes=10)
    counters = {n[:-11] + "num_batches_tracked": () for n in shapes if n.endswith("running_var")}
    return {name: pattern(name, shape, seed) for name, shape in (shapes | counters).items()}


def digests(tree):
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest = hashlib.sha256(leaf.tobytes()).hexdigest()[:16]
        found[name] = f"{leaf.dtype} {list(leaf.shape)} {digest}"
    return found


def zipped(folder, file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(folder.rglob("*")):
            # Times of the files would make each build another one.
            info = zipfile.ZipInfo(f"{path.relative_to(folder.parent)}{'/' * path.is_dir()}")
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, b"" if path.is_dir() else path.read_bytes())


def make_folder(temporary):
    file = temporary / "tiny.pth.tar"
    file.write_bytes(build.training_checkpoint(state_dict(1), state_dict(2)))
    folder = temporary / "converted"
    convert.convert_torch_file(file, folder)
    zipped(folder, OUTPUT / "converted.zip")
    return {"ema": digests(weights.load(folder)[1])}


def make_workdir(temporary):
    tensors = state_dict(3)
    for name in ("layer4.0.bn3", "layer4.0.downsample.2"):
        tensors[f"{name}.weight"] = np.zeros_like(tensors[f"{name}.weight"])
        tensors[f"{name}.bias"] = np.full_like(tensors[f"{name}.bias"], -1)
    tensors["fc.weight"] = np.zeros_like(tensors["fc.weight"])
    (temporary / "tiny.pth.tar").write_bytes(build.training_checkpoint(tensors, None))
    workdir = temporary / "run"
    main = pathlib.Path("main.py").absolute()
    config = pathlib.Path("configs/digits.py").absolute()
    options = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, main, f"--config={config}", "--workdir=run", *options]
    subprocess.run(list(map(str, command)), cwd=temporary, check=True)

    settings = digits.get_config()
    with settings.unlocked():
        settings.update_from_flattened_dict(FLAGS)
    experiment = set_up(settings)
    optimizer = make_optimizer(settings.optimizer, experiment.rates, experiment.steps_per_epoch)
    shutil.rmtree(workdir / "tensorboard")
    # It holds the command and the machine.
    (workdir / "starts.jsonl").unlink()
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) not in KEPT:
            shutil.rmtree(folder)
    with open_checkpoints(workdir, settings, read_only=True) as checkpointer:
        state = checkpointer.restore_latest(state_shapes(experiment, optimizer))
        older = {kind: digests(checkpointer.restore_weights(KEPT[0], kind)) for kind in KINDS}
    best = weights.read_weights(workdir)
    zipped(workdir, OUTPUT / "run.zip")
    return {
        "best": {"step": best.batches, "ema": digests(best.variables)},
        "older": {"step": KEPT[0], **older},
        "state": {"step": int(state.step), "arrays": digests(state)},
    }


if __name__ == "__main__":
    scratch = OUTPUT / "temporary"
    scratch.mkdir(parents=True)
    made = {"flags": FLAGS, "folder": make_folder(scratch), "workdir": make_workdir(scratch)}
    (OUTPUT / "expected.json").write_text(json.dumps(made, indent=0) + "\n")
    shutil.rmtree(scratch)
