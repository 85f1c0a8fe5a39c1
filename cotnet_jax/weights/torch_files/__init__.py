"""Read files of PyTorch weights without PyTorch, and without running anything in them."""

from cotnet_jax.weights.torch_files.checkpoint import Kind, TorchCheckpoint, read_torch_checkpoint
from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.reader import TorchFile, is_unpacked, read_torch_file
from cotnet_jax.weights.torch_files.safetensors_format import write_safetensors

__all__ = [
    "Kind",
    "TorchCheckpoint",
    "TorchFile",
    "TorchFileError",
    "is_unpacked",
    "read_torch_checkpoint",
    "read_torch_file",
    "write_safetensors",
]
