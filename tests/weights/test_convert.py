"""Conversion from and to PyTorch: same logits, whole or nothing, every problem named."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden
from helpers import torch_file_builder as build
from helpers.processes import run_python

import cotnet_jax
from cotnet_jax import files
from cotnet_jax.weights import convert, identify, loading, name_map, torch_files
from cotnet_jax.weights.folder import NewFolder, WeightsError

pytestmark = pytest.mark.end_to_end

ROOT = pathlib.Path(__file__).parents[2]
CLASSES = 10


def tiny(seed=0, classes=CLASSES):
    """A state dict of cotnet_tiny with torch's names, by the formula of the golden weights."""
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=classes)
    counters = {
        name.replace("running_var", "num_batches_tracked"): ()
        for name in shapes
        if name.endswith("running_var")
    }
    return golden.state_dict(shapes | counters, seed)


@pytest.fixture(scope="module")
def state_dicts():
    return {"raw": tiny(1), "ema": tiny(2)}


@pytest.fixture
def checkpoint(tmp_path, state_dicts):
    path = tmp_path / "tiny.pth.tar"
    path.write_bytes(build.training_checkpoint(**state_dicts))
    return path


@pytest.fixture
def no_forward_pass(monkeypatch):
    """Saves its compilation where it is beside the point."""
    monkeypatch.setattr(
        convert, "_compile_forward_pass", lambda *_: lambda variables: np.zeros(CLASSES)
    )


def trees_equal(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def convert_quietly(*arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()) as report:
        convert.convert_torch_file(*arguments, **options)
    return report.getvalue()


@pytest.mark.parametrize("kind", [None, "raw"])
def test_round_trip(tmp_path, checkpoint, state_dicts, no_forward_pass, kind):
    report = convert_quietly(checkpoint, tmp_path / "jax", kind=kind)
    taken = kind or "ema"
    assert f"weights   {taken}, " in report
    assert f"--kind={'raw' if taken == 'ema' else 'ema'}" in report
    assert "cotnet_tiny, by names and shapes; 10 classes" in report
    assert "not run   yacs.config.CfgNode" in report
    counters = sum(name.endswith("tracked") for name in state_dicts["ema"])
    assert f"left out  {counters} num_batches_tracked" in report
    model, variables = loading.load(tmp_path / "jax")
    expected = cotnet_jax.from_torch_state_dict("cotnet_tiny", state_dicts[taken])
    assert trees_equal(variables, expected)
    assert (model.num_classes, model.variant.blocks) == (CLASSES, (1, 1, 1, 1))

    back = tmp_path / "back.safetensors"
    convert.convert_to_torch(tmp_path / "jax", back)
    read = torch_files.read_torch_checkpoint(back)
    assert read.arch == "cotnet_tiny"
    arrays = read.arrays()
    assert arrays.keys() == state_dicts[taken].keys()
    for name, array in state_dicts[taken].items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        np.testing.assert_array_equal(arrays[name], array)

    assert f"weights   {taken}, " in convert_quietly(back, tmp_path / "again")
    assert trees_equal(loading.load(tmp_path / "again")[1], expected)


def test_description(tmp_path, checkpoint, no_forward_pass):
    convert_quietly(checkpoint, tmp_path / "jax")
    description = json.loads((tmp_path / "jax" / "cotnet.json").read_text())
    assert description["model"] == "cotnet_tiny"
    assert description["num_classes"] == CLASSES
    assert description["weights"] == "ema"
    assert description["num_batches_tracked"] == 1000
    assert description["source"] == {
        "file": "tiny.pth.tar",
        "format": "zip",
        "epoch": 349,
        "metric": 81.3,
        "sha256": files.sha256(checkpoint),
    }
    assert description["default_cfg"]["input_size"] == [32, 32, 3]
    assert description["versions"]["jax"] == jax.__version__
    assert sorted(os.listdir(tmp_path)) == ["jax", "tiny.pth.tar"]


def test_finds_every_model_with_goldens():
    """The others are found in the round trips."""
    for file in (golden.GOLDENS / "state_dict").glob("*.json"):
        found = identify.matching_models(golden.state_dict_shapes(file.stem))
        sharing = [name for name, other in golden.STATE_DICTS.items() if other == file.stem]
        assert found == [file.stem, *sharing]


def headless_152(tmp_path, arch):
    """The names and shapes of SE-CoTNetD-152, all of them views of one storage."""
    zeros = np.zeros(1, np.float32)
    shapes = golden.state_dict_shapes("se_cotnetd_152")
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    zeros = np.zeros(largest, np.float32)
    entries = {
        name: build.tensor(
            "0",
            shape,
            elements=largest if not name.endswith("tracked") else 1,
            kind="FloatStorage",
        )
        for name, shape in shapes.items()
        if not name.endswith("tracked")
    }
    value = {"state_dict": build.dict_of(entries)}
    if arch:
        value["arch"] = build.text(arch)
    path = tmp_path / "152.pth.tar"
    path.write_bytes(build.zip_file(build.dict_of(value), {"0": zeros.tobytes()}))
    return path


@pytest.mark.parametrize(
    ("arch", "model", "found", "note"),
    [
        (None, None, "se_cotnetd_152", "they fit another model too: --model=se_cotnetd_152_L"),
        ("se_cotnetd_152_L", None, "se_cotnetd_152_L", "named in the file"),
        ("resnet50", None, "se_cotnetd_152", "by names and shapes"),
        (None, "se_cotnetd_152_L", "se_cotnetd_152_L", "as requested"),
    ],
)
def test_models_that_share_their_names(tmp_path, monkeypatch, arch, model, found, note):
    # Mapping the 152 layers is tested elsewhere and takes seconds.
    head = {"kernel": np.zeros((2048, 1000), np.float32)}
    variables = {"params": {"head": head}, "batch_stats": {}}
    monkeypatch.setattr(loading, "from_torch_state_dict", lambda name, tensors: variables)
    read = loading.read_weights(headless_152(tmp_path, arch), model=model)
    assert read.model == found
    assert note in "\n".join(read.notes)
    assert read.settings["image_size"] == {"se_cotnetd_152": 256, "se_cotnetd_152_L": 320}[found]


def test_all_problems_in_one_report(tmp_path, state_dicts):
    state_dict = dict(state_dicts["ema"])
    state_dict["layer1.0.bn1.wait"] = state_dict.pop("layer1.0.bn1.weight")
    del state_dict["layer2.0.conv2.bn.bias"]
    state_dict["layer3.0.extra.weight"] = np.zeros((2, 3), np.float32)
    state_dict["layer4.0.conv3.weight"] = np.zeros((1, 2, 3, 4), np.float32)
    path = tmp_path / "bad.pth"
    path.write_bytes(build.training_checkpoint(state_dict, None))
    with pytest.raises(WeightsError) as error:
        convert_quietly(path, tmp_path / "out")
    message = str(error.value)
    assert message.startswith(f"{path}: the state dict does not fit 'cotnet_tiny', 5 problems")
    for part in (
        "missing: layer1.0.bn1.weight (nearest: layer1.0.bn1.wait)",
        "missing: layer2.0.conv2.bn.bias",
        "unexpected: layer1.0.bn1.wait",
        "unexpected: layer3.0.extra.weight (2, 3)",
        "misshapen: layer4.0.conv3.weight is (1, 2, 3, 4), should be",
    ):
        assert part in message
    assert os.listdir(tmp_path) == ["bad.pth"]


def test_wrong_model_names_the_right_one(tmp_path, checkpoint):
    with pytest.raises(WeightsError, match=r"does not fit 'cotnet50'(.|\n)*--model=cotnet_tiny"):
        convert_quietly(checkpoint, tmp_path / "out", model="cotnet50")
    with pytest.raises(ValueError, match="unknown model 'cotnet_tin': did you mean"):
        convert_quietly(checkpoint, tmp_path / "out", model="cotnet_tin")
    assert os.listdir(tmp_path) == ["tiny.pth.tar"]


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    layer = {"layer1.0.conv1.weight": np.zeros((4, 4, 1, 1), np.float32)}
    path.write_bytes(build.training_checkpoint(layer, None))
    with pytest.raises(WeightsError, match=r"layer1.0.conv1.weight.*not those of a CoTNet"):
        convert_quietly(path, tmp_path / "out")


def test_a_missing_block_is_reported_for_the_nearest_model(tmp_path, state_dicts):
    state_dict = {k: v for k, v in state_dicts["ema"].items() if not k.startswith("layer4.")}
    path = tmp_path / "cut.pth"
    path.write_bytes(build.training_checkpoint(state_dict, None))
    with pytest.raises(WeightsError, match=r"does not fit 'cotnet_tiny'(.|\n)*layer4.0.bn1.bias"):
        convert_quietly(path, tmp_path / "out")


def test_weights_that_are_not_finite(tmp_path, state_dicts):
    state_dict = dict(state_dicts["ema"])
    state_dict["fc.bias"] = np.full(CLASSES, np.inf, np.float32)
    path = tmp_path / "nan.pth"
    path.write_bytes(build.training_checkpoint(state_dict, None))
    with pytest.raises(WeightsError, match=r"fc.bias: 10 of 10 values are infinite"):
        convert_quietly(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["nan.pth"]


def test_nan_in_the_middle_of_the_network(tmp_path, state_dicts):
    """XLA's code for CPUs gives finite logits for it."""
    state_dict = dict(state_dicts["ema"])
    name = "layer2.0.conv2.key_embed.0.weight"
    state_dict[name] = state_dict[name].copy()
    state_dict[name][1, 2, 0, 1] = np.nan
    path = tmp_path / "nan.pth"
    path.write_bytes(build.training_checkpoint(state_dict, None))
    with pytest.raises(WeightsError, match=rf"nan.pth: 1 array .*\n  {name}: 1 of .* is NaN, at"):
        convert_quietly(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["nan.pth"]


def test_finite_weights_that_overflow(tmp_path, state_dicts):
    state_dict = dict(state_dicts["ema"])
    state_dict["fc.weight"] = np.full_like(state_dict["fc.weight"], 3e38)
    path = tmp_path / "large.pth"
    path.write_bytes(build.training_checkpoint(state_dict, None))
    with pytest.raises(WeightsError, match=r"10 of 10 logits are not finite.*overflow"):
        convert_quietly(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["large.pth"]


@pytest.mark.parametrize("fails", ["write", "publish", "read_arrays", "damage"])
def test_a_failure_leaves_nothing(tmp_path, checkpoint, monkeypatch, no_forward_pass, fails):
    def fail(*_):
        raise OSError(28, "No space left on device")

    if fails == "damage":
        original = convert.read_arrays

        def changed(path):
            variables = original(path)
            variables["params"]["head"]["bias"] = variables["params"]["head"]["bias"] + 1
            return variables

        monkeypatch.setattr(convert, "read_arrays", changed)
    elif fails == "read_arrays":
        monkeypatch.setattr(convert, fails, fail)
    else:
        monkeypatch.setattr(NewFolder, fails, fail)
    with pytest.raises((OSError, WeightsError), match=r"No space|differs in 1 arrays.*head/bias"):
        convert_quietly(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["tiny.pth.tar"]


def test_existing_output_is_kept(tmp_path, checkpoint, no_forward_pass):
    (tmp_path / "out").mkdir()
    convert_quietly(checkpoint, tmp_path / "out")
    before = (tmp_path / "out" / "cotnet.json").read_bytes()
    with pytest.raises(WeightsError, match="exists: delete it"):
        convert_quietly(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "cotnet.json").read_bytes() == before
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"kept")
    with pytest.raises(WeightsError, match="exists: delete it"):
        convert.convert_to_torch(tmp_path / "out", target)
    assert target.read_bytes() == b"kept"
    with pytest.raises(WeightsError, match=r"must end in .safetensors"):
        convert.convert_to_torch(tmp_path / "out", tmp_path / "w.pth")


def test_damaged_folder_is_noticed(tmp_path, checkpoint, no_forward_pass):
    folder = tmp_path / "out"
    convert_quietly(checkpoint, folder)
    largest = max((folder / "weights").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(WeightsError, match=f"damaged, 1 of .*{largest.name}"):
        loading.load(folder)
    largest.unlink()
    with pytest.raises(WeightsError, match="damaged, 1 of"):
        loading.load(folder)
    (folder / "cotnet.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cotnet.json: cannot be read"):
        loading.load(folder)


def run_command(*arguments):
    return run_python({"script": "convert_torch_weights.py"}, *arguments, cwd=ROOT)


def test_command_errors_are_one_line(checkpoint):
    result = run_command(f"--weights={checkpoint}", f"--output={checkpoint}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (f"error: {checkpoint} exists: delete it or give another --output\n")


def test_former_options_are_named():
    result = run_command("--input=tiny.pth", "--to-torch", "--output=x")
    assert result.returncode == 1
    assert result.stderr == (
        "error: --input is called --weights=PATH now; --to-torch is called --to_torch now\n"
    )
    result = run_command("--weights=ema", "--output=x")
    assert result.stderr == (
        "error: --weights: must be the path of the weights; choose their kind by --kind=ema\n"
    )


def test_command_says_all_that_is_missing(tmp_path):
    result = run_command("tiny.pth")
    assert result.returncode == 1
    message, *examples = result.stderr.splitlines()
    assert message == (
        "error: unknown argument tiny.pth; --weights=PATH is missing; --output=PATH is missing"
    )
    assert [line.split()[1] for line in examples[1:]] == ["convert_torch_weights.py"] * 3


def test_what_is_converted_already_or_missing(tmp_path, checkpoint, no_forward_pass):
    convert_quietly(checkpoint, tmp_path / "jax")
    with pytest.raises(FileNotFoundError, match=r"no file .*none.pth; give a .pth.tar"):
        convert_quietly(tmp_path / "none.pth", tmp_path / "out")
    with pytest.raises(WeightsError, match=r"already holds weights for JAX.*--to_torch"):
        convert_quietly(tmp_path / "jax", tmp_path / "out")


def golden_checkpoint(tmp_path, model, seed):
    """A training checkpoint whose EMA weights are the golden ones, and raw ones zero."""
    shapes = golden.state_dict_shapes(model)
    ema = golden.state_dict(shapes, seed)
    raw = {name: np.zeros_like(array) for name, array in ema.items()}
    path = tmp_path / f"{model}.pth.tar"
    path.write_bytes(build.training_checkpoint(raw, ema, build.text(model)))
    return path


def relative_error_of_logits(folder, expected, dtype):
    with jax.enable_x64(dtype == "float64"):
        dtype = jnp.dtype(dtype)
        model, variables = loading.load(folder, dtype=dtype, param_dtype=dtype)
        images = golden.images(int(expected["seed"]) + 1, expected["input_shape"]).astype(dtype)
        logits = jax.jit(model.apply)(variables, images)
        return golden.relative_error(logits, expected["logits"])


# Linux keeps the peak of the process itself there; getrusage's is at least that of its parent.
MEASURED = """
import pathlib, runpy, sys, time
start = time.perf_counter()
sys.argv = ["convert_torch_weights.py", *sys.argv[1:]]
try:
    runpy.run_path("convert_torch_weights.py", run_name="__main__")
finally:
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = [int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")]
    print("measured", *peak or [0], time.perf_counter() - start)
"""


def test_cotnet50_by_the_command(tmp_path):
    """Also in under 650 MB, where that can be measured."""
    with np.load(golden.GOLDENS / "forward" / "cotnet50_224x224.npz") as file:
        expected = dict(file)
    path = golden_checkpoint(tmp_path, "cotnet50", int(expected["seed"]))
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, f"--weights={path}", f"--output={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stderr) == (0, "")
    *report, measured = result.stdout.splitlines()
    assert "449 arrays of parameters (22,222,416 in all) and 234 of batch" in "".join(report)
    megabytes, seconds = map(float, measured.split()[1:])
    assert megabytes < 650
    print(f"{megabytes:.0f} MB, {seconds:.1f} s")
    assert relative_error_of_logits(tmp_path / "out", expected, "float32") <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("file", golden.golden_files("forward"), ids=lambda file: file.stem)
def test_logits_of_every_golden(tmp_path, file):
    with np.load(file) as arrays:
        expected = dict(arrays)
    model = golden.model_of(file)
    path = golden_checkpoint(tmp_path, model, int(expected["seed"]))
    convert_quietly(path, tmp_path / "out")
    assert loading.read_weights(tmp_path / "out").model == model
    assert relative_error_of_logits(tmp_path / "out", expected, "float32") <= 5e-6
    assert relative_error_of_logits(tmp_path / "out", expected, "float64") <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("model", ["se_cotnetd_200", "se_cotnetd_270"])
def test_round_trip_of_models_without_goldens(tmp_path, model):
    state_dict = golden.state_dict(name_map.torch_shapes(model), 0)
    path = tmp_path / "w.safetensors"
    torch_files.write_safetensors(path, state_dict)
    report = convert_quietly(path, tmp_path / "out")
    assert f"model     {model}, by names and shapes" in report
    convert.convert_to_torch(tmp_path / "out", tmp_path / "back.safetensors")
    back = torch_files.read_torch_checkpoint(tmp_path / "back.safetensors").arrays()
    assert {k for k in back if not k.endswith("tracked")} == state_dict.keys()
    assert all(np.array_equal(back[name], array) for name, array in state_dict.items())


def test_file_written_by_torch(tmp_path, state_dicts, no_forward_pass):
    torch = pytest.importorskip("torch")
    ema = {name: torch.from_numpy(array.copy()) for name, array in state_dicts["ema"].items()}
    raw = {f"module.{name}": 0 * tensor for name, tensor in ema.items()}
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth.tar"
        torch.save(
            {"arch": "cotnet_tiny", "state_dict": raw, "state_dict_ema": ema},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        convert_quietly(path, tmp_path / str(legacy))
        expected = cotnet_jax.from_torch_state_dict("cotnet_tiny", state_dicts["ema"])
        assert trees_equal(loading.load(tmp_path / str(legacy))[1], expected)
