"""Convert files of PyTorch, Keras and the Hub to folders of weights, and back to PyTorch.

What is written is read back and compared.
"""

import contextlib
import ctypes
import gc
import os

import jax
import numpy as np

from cotnet_jax import files
from cotnet_jax.models.cotnet import create_model
from cotnet_jax.weights.folder import (
    NewFolder,
    WeightsError,
    array_digests,
    differing,
    lock_output,
    read_arrays,
)
from cotnet_jax.weights.loading import is_converted_or_trained, read_weights
from cotnet_jax.weights.torch_files import (
    Kind,
    files_of,
    read_torch_checkpoint,
    write_safetensors,
)

# Side of the random image, in pixels; any size will do.
CHECKED_SIZE = 64
Path = str | os.PathLike


def convert_torch_file(
    path: Path, output: Path, model: str | None = None, kind: Kind | None = None
) -> None:
    """Convert a file of PyTorch or Keras to a folder of weights, and print a report.

    All values are checked before anything is written, as in ``load``. The written copy is read
    back, must equal the file array by array and must give finite logits. On an error nothing is
    left of it.

    Args:
      path: a .pth.tar, .pth, .safetensors or .h5 file, or ``hf-hub:OWNER/NAME``, as in ``load``.
      output: the folder to create, laid out as ``folder`` documents.
      model: name of the model; None identifies it by the names and shapes of the tensors.
      kind: "ema" or "raw"; None chooses the EMA if the file has one.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      ValueError: the file cannot be read, its weights do not fit, or ``output`` exists.
    """
    path = path if files.is_hub(path) else _existing_file(path)
    with NewFolder(output) as folder:
        read = read_weights(path, kind, model)
        print(*read.notes, sep="\n", flush=True)
        net = create_model(read.model, num_classes=read.num_classes, **read.attributes)
        folder.write(
            read.variables,
            {
                "model": read.model,
                "num_classes": read.num_classes,
                "input_channels": read.input_channels,
                "parameters": read.parameter_count(),
                "weights": read.kind,
                "source": _with_checksum(read.source, path),
                "default_cfg": net.default_cfg,
                "settings": read.settings,
                "attributes": read.attributes,
                "class_names": read.class_names,
                "num_batches_tracked": read.batches,
            },
        )
        digests = array_digests(read.variables)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), read.variables
        )
        # Hold one copy of the weights at a time, and none while XLA compiles.
        del read
        _release_memory()
        logits_of = _compile_forward_pass(net, shapes)
        _release_memory()
        written = read_arrays(folder.unfinished)
        _require_same(digests, array_digests(written), output)
        _require_finite(logits_of(written), output)
        folder.publish()
    print(f"wrote     {folder.path}")
    print(
        f"checked   {len(digests)} arrays read back bitwise equal; finite logits for a random "
        f"image of {CHECKED_SIZE} x {CHECKED_SIZE}"
    )


def _existing_file(path):
    path = files.local(path)
    if is_converted_or_trained(path):
        raise WeightsError(
            f"{path} already holds weights for JAX, ready to use; --to_torch writes them as a file "
            "for PyTorch"
        )
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; give a .pth.tar, .pth, .safetensors or .h5 file")
    return path


def _with_checksum(source, path):
    # Weights of the Hub come with theirs, which was compared.
    return source if "sha256" in source else {**source, "sha256": files.sha256(*files_of(path))}


def convert_to_torch(
    path: Path, output: Path, model: str | None = None, kind: Kind | None = None
) -> None:
    """Write weights to a .safetensors file with PyTorch's names, and print a report.

    In PyTorch, load it by ``model.load_state_dict(safetensors.torch.load_file(output))``.

    Args:
      path: whatever ``load`` takes.
      output: the .safetensors file to create.
      model, kind: as in ``convert_torch_file``.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      ValueError: the weights cannot be read, or ``output`` exists or has another suffix.
    """
    output = files.local(output)
    if output.suffix != ".safetensors":
        raise WeightsError(f"--output={output} must end in .safetensors")
    if output.exists():
        raise WeightsError(f"{output} exists: delete it or give another --output")
    with lock_output(output):
        _write_torch_file(path, output, model, kind)


def _write_torch_file(path, output, model, kind) -> None:
    read = read_weights(path, kind, model)
    print(*read.notes, sep="\n", flush=True)
    state_dict = read.torch_state_dict()
    metadata = {"model": read.model, "weights": read.kind, "format": "pt"}
    try:
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
    print("checked   all tensors read back bitwise equal")


def _release_memory():
    """Return freed memory to the system: glibc keeps what threads freed, a seventh of the peak."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _require_same(read, written, output):
    different = differing(read, written)
    if different:
        raise WeightsError(
            f"{output}: the written copy differs in {len(different)} arrays and was removed: "
            f"{', '.join(different[:5])}. Check the disk."
        )


def _compile_forward_pass(net, shapes):
    """Compile the function from variables to the logits of a random image, on a CPU."""
    channels = shapes["params"]["stem"]["conv1"]["kernel"].shape[-2]
    image = np.random.default_rng(0).standard_normal((1, CHECKED_SIZE, CHECKED_SIZE, channels))
    image = image.astype(np.float32)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        lowered = jax.jit(net.apply).lower(shapes, image)
        # It is called once, and optimised code takes three times as long to compile.
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    return lambda variables: np.asarray(compiled(*jax.device_put((variables, image), cpu)))


def _require_finite(logits, output):
    wrong = np.sum(~np.isfinite(logits))
    if wrong:
        raise WeightsError(
            f"{output}: {wrong} of {logits.size} logits are not finite, so nothing was written; "
            "the weights are all finite, but so large that the network's sums overflow"
        )
