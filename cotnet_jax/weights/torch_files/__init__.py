"""Read files of PyTorch weights without PyTorch, and without running anything in them."""

from cotnet_jax.weights.torch_files.budget import LIMITS, Limits
from cotnet_jax.weights.torch_files.checkpoint import Kind, TorchCheckpoint, read_torch_checkpoint
from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.reader import (
    TorchFile,
    files_of,
    is_unpacked,
    read_torch_file,
)
from cotnet_jax.weights.torch_files.safetensors_format import find_index, write_safetensors

__all__ = [
    "LIMITS",
    "Kind",
    "Limits",
    "TorchCheckpoint",
    "TorchFile",
    "TorchFileError",
    "files_of",
    "find_index",
    "is_unpacked",
    "read_torch_checkpoint",
    "read_torch_file",
    "write_safetensors",
]
