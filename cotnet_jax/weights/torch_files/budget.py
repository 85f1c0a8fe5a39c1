"""The work and memory that reading one file may take.

A file decides what its reader does, so every operation is charged in proportion to what it costs.
All limits are here; ``read_torch_checkpoint(path, limits=Limits(steps=...))`` changes them.
"""

import dataclasses

from cotnet_jax.weights.torch_files.errors import TorchFileError

# Steps that a tensor costs until it is an array.
TENSOR_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one file may take. Steps and bytes held are estimates, on the safe side.

    The largest model of the family with EMA and momentum needs 1.9 million steps, 1 MiB of pickle
    and a zip directory of 0.9 MiB; 600,000 numbers of a loss log need 1.8 million steps in a list,
    4.8 as a dictionary by step, and 8.7 in dictionaries of two numbers.

    Attributes:
      pickle_bytes: size of the pickles of a file.
      steps: steps of any file; a step is about a tenth of a microsecond.
      base_steps, steps_per_byte: steps of a small file: so many, and so many more for each byte
        of its pickle.
      held_bytes: memory of the values of the pickles, without those of the tensors.
      globals: distinct classes and functions that a file names.
      name_length: characters of such a name.
      int_bits: size of an integer.
      dimensions: of a tensor.
      expanded_elements: elements of a tensor that repeats the elements of a smaller storage.
      array_bytes, array_factor: size of all distinct arrays of one state dict together: so many
        bytes, and so many times those of the storages.
      directory_bytes: size of the directory of a zip file.
      inflated_bytes, inflated_factor: size of all compressed members of a zip file together: so
        many bytes, or so many times what they take in the file, whichever is more.
      header_bytes: size of the header of a safetensors file, and of an index of shards.
      shards: files of a state dict in shards.
    """

    pickle_bytes: int = 16 * 2**20
    steps: int = 9_500_000
    base_steps: int = 2_700_000
    steps_per_byte: float = 1.2
    held_bytes: int = 128 * 2**20
    globals: int = 1000
    name_length: int = 2000
    int_bits: int = 1024
    dimensions: int = 32
    expanded_elements: int = 2**20
    array_bytes: int = 32 * 2**20
    array_factor: int = 4
    directory_bytes: int = 2 * 2**20
    inflated_bytes: int = 16 * 2**20
    inflated_factor: int = 20
    header_bytes: int = 4 * 2**20
    shards: int = 1000


LIMITS = Limits()


class Budget:
    """What is left of the limits while a file is read, its arrays included."""

    def __init__(self, limits: Limits = LIMITS):
        self.limits = limits
        self._allowed = min(limits.steps, limits.base_steps)
        self._steps = 0
        self._held = 0
        self._arrays = 0
        self._array_bytes = limits.array_bytes

    def allow_pickle(self, nbytes: int) -> None:
        """Grant the steps of a pickle of this size."""
        more = int(self.limits.steps_per_byte * nbytes)
        self._allowed = min(self.limits.steps, self._allowed + more)

    def allow_arrays(self, storage_bytes: int) -> None:
        """Grant the arrays of storages of this size."""
        self._array_bytes += self.limits.array_factor * storage_bytes

    def spend(self, steps: int, held: int = 0) -> None:
        """Charge work, and bytes of memory that are held until the file is read.

        Raises:
          TorchFileError: nothing is left.
        """
        self._steps += steps
        self._held += held
        if self._steps > self._allowed:
            raise TorchFileError(
                f"needs more than {self._allowed:,} steps, as no file of weights does; if you "
                "trust it, save its state dict alone, or raise Limits.steps and base_steps"
            )
        if self._held > self.limits.held_bytes:
            raise TorchFileError(
                f"would take more than {self.limits.held_bytes:,} bytes of memory beside its "
                "tensors; if you trust it, save its state dict alone, or raise Limits.held_bytes"
            )

    def claim_arrays(self, tensors) -> None:
        """Charge tensors that are about to become arrays; those with one identity share theirs.

        Raises:
          TorchFileError: they are too large together, as expanded or overlapping ones can be.
        """
        distinct = {}
        for tensor in tensors:
            self.spend(TENSOR_STEPS)
            distinct[tensor.identity] = tensor.nbytes
        self._arrays += sum(distinct.values())
        if self._arrays > self._array_bytes:
            raise TorchFileError(
                f"its tensors claim {self._arrays:,} bytes, more than {self._array_bytes:,} for "
                "storages of its size; if you trust it, raise Limits.array_bytes"
            )
