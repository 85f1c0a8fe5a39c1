"""Conversions between files of PyTorch and folders of weights; both check what they wrote."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import pathlib

import jax
import numpy as np

from cotnet_jax.models.cotnet import create_model
from cotnet_jax.weights.folder import (
    NewFolder,
    WeightsError,
    array_digests,
    differing,
    read_arrays,
)
from cotnet_jax.weights.load import is_converted_or_trained, read_weights
from cotnet_jax.weights.name_map import to_torch_state_dict
from cotnet_jax.weights.torch_files import Kind, read_torch_checkpoint, write_safetensors

# Side of the random image that the written copy must give finite logits for: any size will do.
CHECKED_SIZE = 64
_CHUNK = 2**20
Path = str | os.PathLike


def convert_torch_file(
    input: Path, output: Path, model: str | None = None, weights: Kind | None = None
) -> None:
    """Turns a file of PyTorch into a folder of weights, whole or not at all; prints a report.

    The written copy is read back and compared with the file array by array, and must give finite
    logits.

    Args:
      input: a .pth.tar, .pth or .safetensors file.
      output: folder to be made; ``folder`` has its layout.
      model: its name; None finds it by the names and shapes of the tensors.
      weights: which ones; None takes the EMA where the file has them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, its weights do not fit, or the output exists.
    """
    input = pathlib.Path(input)
    if is_converted_or_trained(input):
        raise WeightsError(
            f"{input} holds weights for JAX already, to use as they are; --to-torch writes them as "
            "a file for PyTorch"
        )
    if not input.exists():
        raise FileNotFoundError(f"no file {input}; give a .pth.tar, .pth or .safetensors file")
    with NewFolder(output) as folder:
        read = read_weights(input, weights, model)
        print(*read.notes, sep="\n", flush=True)
        net = create_model(read.model, num_classes=read.num_classes)
        folder.write(
            read.variables,
            {
                "model": read.model,
                "num_classes": read.num_classes,
                "input_channels": read.input_channels,
                "parameters": read.parameter_count(),
                "weights": read.kind,
                "source": {**read.source, "sha256": sha256(input)},
                "default_cfg": net.default_cfg,
                "num_batches_tracked": read.batches,
            },
        )
        digests = array_digests(read.variables)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), read.variables
        )
        # Never more than one copy of the weights at a time, and none beside the compiler.
        del read
        _give_memory_back()
        logits_of = _compile_forward_pass(net, shapes)
        _give_memory_back()
        written = read_arrays(folder.unfinished)
        _require_same(digests, array_digests(written), output)
        _require_finite(logits_of(written), output)
        folder.publish()
    print(f"wrote     {folder.path}")
    print(
        f"checked   {len(digests)} arrays read back equal bit by bit; finite logits for a random "
        f"image of {CHECKED_SIZE} x {CHECKED_SIZE}"
    )


def convert_to_torch(
    input: Path, output: Path, model: str | None = None, weights: Kind | None = None
) -> None:
    """Writes weights as a .safetensors file with PyTorch's names, and prints a report.

    ``model.load_state_dict(safetensors.torch.load_file(output))`` takes it in PyTorch.

    Args:
      input: a folder of weights, a training run's workdir, or a file of PyTorch.
      output: the .safetensors file to be made.
      model, weights: as of ``convert_torch_file``.

    Raises:
      FileNotFoundError: nothing at ``input``.
      ValueError: the input cannot be read, or the output exists or is named otherwise.
    """
    output = pathlib.Path(output)
    if output.suffix != ".safetensors":
        raise WeightsError(f"--output={output} must end in .safetensors")
    if output.exists():
        raise WeightsError(f"{output} exists already: delete it or give another --output")
    read = read_weights(input, weights, model)
    print(*read.notes, sep="\n", flush=True)
    state_dict = to_torch_state_dict(
        read.model, read.variables, num_classes=read.num_classes, **read.attributes
    )
    for name, tensor in state_dict.items():
        if name.endswith("num_batches_tracked"):
            state_dict[name] = np.full_like(tensor, read.batches)
    metadata = {"model": read.model, "weights": read.kind, "format": "pt"}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(output, state_dict, metadata)
    except OSError as error:
        raise WeightsError(f"cannot write to {output.parent}: {error}") from None
    try:
        written = read_torch_checkpoint(output).arrays()
        _require_same(array_digests(state_dict), array_digests(written), output)
    except BaseException:
        output.unlink()
        raise
    print(f"wrote     {output}: {len(state_dict)} tensors of {read.model}, {read.kind} weights")
    print("checked   all tensors read back equal bit by bit")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(functools.partial(file.read, _CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _give_memory_back():
    """Keeps the peak a seventh lower: glibc holds on to what many threads freed piece by piece."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _require_same(read, written, output):
    different = differing(read, written)
    if different:
        raise WeightsError(
            f"{output}: the written copy differs in {len(different)} arrays, so it was removed: "
            f"{', '.join(different[:5])}; is the disk sound?"
        )


def _compile_forward_pass(net, shapes):
    """A function of the variables that gives the logits of a random image, on a CPU."""
    channels = shapes["params"]["stem"]["conv1"]["kernel"].shape[-2]
    image = np.random.default_rng(0).standard_normal((1, CHECKED_SIZE, CHECKED_SIZE, channels))
    image = image.astype(np.float32)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        lowered = jax.jit(net.apply).lower(shapes, image)
        # For a single call: optimised code would take three times as long to make.
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return lambda variables: np.asarray(compiled(*jax.device_put((variables, image), cpu)))


def _require_finite(logits, output):
    wrong = np.sum(~np.isfinite(logits))
    if wrong:
        raise WeightsError(
            f"{output}: the weights give {wrong} logits of {logits.size} that are not finite, so "
            "nothing was written; they hold NaN or infinity, or are not the published kind"
        )
