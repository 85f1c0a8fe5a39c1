"""NumPy's files, written row by row, for arrays that need not fit into memory."""

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np

from cotnet_jax.files.whole import writing_whole


@contextlib.contextmanager
def writing_rows(path: str | os.PathLike) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a row to a .npy file, which is there whole or not at all.

    Rows have one shape and one dtype; there must be at least one.

    Raises:
      OSError: it could not be written.
      ValueError: no row was appended.
    """
    count, row_format = 0, None

    def append(row: np.ndarray) -> None:
        nonlocal count, row_format
        if row_format is None:
            row_format = row.shape, row.dtype
            _write_header(file, 0, *row_format)
        assert (row.shape, row.dtype) == row_format
        file.write(np.ascontiguousarray(row).tobytes())
        count += 1

    with writing_whole(path) as unfinished, unfinished.open("wb") as file:
        yield append
        if row_format is None:
            raise ValueError(f"{path}: there is no row to write")
        start = file.tell() - count * row_format[1].itemsize * int(np.prod(row_format[0]))
        file.seek(0)
        _write_header(file, count, *row_format)
        # NumPy leaves room for any number of rows.
        assert file.tell() == start


def _write_header(file, count, shape, dtype):
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count, *shape),
    }
    np.lib.format.write_array_header_1_0(file, header)
