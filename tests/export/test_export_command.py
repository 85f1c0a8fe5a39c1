"""cotnet-export: what it writes and reports, and what it refuses."""

import json

import numpy as np
import onnxruntime
import pytest
from helpers import exporting

from cotnet_jax.commands import export as command
from cotnet_jax.export import (
    ExportError,
    check,
    export_file,
    formats,
    to_onnx,
    to_stablehlo,
    write,
)
from cotnet_jax.weights import read_weights
from cotnet_jax.weights.name_map import to_torch_state_dict
from cotnet_jax.weights.torch_files import write_safetensors

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_safetensors(path, to_torch_state_dict("cotnet_tiny", tiny.variables, num_classes=10), {})
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder in which nothing else is written."""
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def failed(capsys, *arguments):
    """Run the command, which must fail, and return its error."""
    with pytest.raises(SystemExit) as stopped:
        command.main([*map(str, arguments)])
    return f"{stopped.value.code}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("format", formats.FORMATS)
def test_writes_a_file_and_checks_it(weights, folder, tmp_path, capsys, format):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(exporting.NAMES), encoding="utf-8")
    output = folder / f"tiny.{format}"
    arguments = ["--fold", "--preprocess", "--image_size=40", f"--classes={names}"]
    command.main([f"--weights={weights}", f"--output={output}", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [file.name for file in folder.iterdir()] == [output.name]
    steps = [line.split()[0] for line in lines]
    assert steps[-5:] == ["building", "checking", "checked", "checked", "wrote"]
    assert f"{output.stat().st_size:,} bytes" in lines[-1]
    assert lines[-3].startswith("checked   1 random image of 40 x 53: probabilities within ")
    assert ", resized: probabilities within " in lines[-2]
    if format == "onnx":
        session = onnxruntime.InferenceSession(output)
        metadata = session.get_modelmeta().custom_metadata_map
        assert tuple(json.loads(metadata["class_names"])) == exporting.NAMES
        assert metadata["image_size"] == "40" and metadata["fold"] == "true"


@pytest.fixture
def wrong_reference(monkeypatch):
    """Let the model have computed something else than the file will."""
    monkeypatch.setattr(check, "_probabilities", lambda _, pixels: np.ones((len(pixels), 10)) / 10)


def test_a_file_that_computes_something_else_is_not_written(
    weights, folder, capsys, wrong_reference
):
    error = failed(capsys, f"--weights={weights}", f"--output={folder / 'tiny.onnx'}")
    assert error.startswith("error: the file does not compute what the model does, so nothing was")
    assert not list(folder.iterdir())


def test_too_little_memory_to_run_the_file(weights, folder, capsys, monkeypatch):
    def no_memory(predictor, options):
        raise MemoryError("Unable to allocate 2.73 TiB")

    monkeypatch.setattr(check, "_random_images", no_memory)
    error = failed(capsys, f"--weights={weights}", f"--output={folder / 'tiny.onnx'}")
    assert error.startswith("error: too little memory to run the file, so nothing was written")
    assert not list(folder.iterdir())


def test_without_a_runtime(weights, folder, capsys, monkeypatch):
    monkeypatch.setattr(write, "runtime_of", lambda format: None)
    command.main([f"--weights={weights}", f"--output={folder / 'tiny.onnx'}", "--batch_size=1"])
    lines = capsys.readouterr().out.splitlines()
    assert "unchecked ONNX Runtime is not installed: pip install onnxruntime" in lines
    assert (folder / "tiny.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--output=a.pb"], "a.pb must end in .stablehlo or .onnx"),
        (["--output=a.onnx", "--format=stablehlo"], "a.onnx must end in .stablehlo"),
        (["--output=a.onnx", "--format=tflite"], "--format: must be stablehlo|onnx, not 'tflite'"),
        (["--output=a.onnx", "--batch_size=0"], "--batch_size: must be an integer of 1 or more"),
        (["--output=taken/a.onnx"], "cannot write to"),
        (["--output=a.onnx", "--weights=missing"], "no file or folder"),
    ],
)
def test_errors(arguments, error, weights, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "taken").touch()
    assert error in failed(capsys, f"--weights={weights}", *arguments)
    assert [file.name for file in folder.iterdir()] == ["taken"]


def test_all_that_is_wrong_with_the_output_is_one_error(weights, folder, capsys, monkeypatch):
    output = folder / "a.zip"
    output.touch()
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    error = failed(capsys, f"--weights={weights}", f"--output={output}", "--format=onnx")
    assert error.splitlines()[0] == (
        f"error: --output={output} must end in .onnx; {output} exists: delete it or give another "
        "--output; onnx needs the package onnx; type: pip install 'cotnet_jax[export]'"
    )


def test_wrong_arguments_in_python(tiny, weights, folder):
    for function in (to_onnx, to_stablehlo):
        for size in (0, -1, 2.5, "any", True):
            with pytest.raises(ExportError, match="batch_size must be an integer of 1 or more"):
                function(tiny, batch_size=size)
        with pytest.raises(TypeError, match=r"give a Predictor, such as .*, not a str"):
            function("weights/cotnet50")
    with pytest.raises(ExportError, match="image_size must be an integer of 1 or more"):
        export_file(weights, folder / "a.onnx", image_size=-5)
    with pytest.raises(ExportError, match="format must be stablehlo or onnx, not 'tflite'"):
        export_file(weights, folder / "a.onnx", format="tflite")
    assert not list(folder.iterdir())


def test_an_exported_file_is_no_weights(tiny, folder):
    (folder / "tiny.onnx").write_bytes(to_onnx(tiny))
    with pytest.raises(ValueError, match="an exported ONNX file: give the weights"):
        read_weights(folder / "tiny.onnx")
