"""The one error of this package."""

import contextlib
from collections.abc import Iterator

from cotnet_jax.weights.torch_files.inert import printable


class TorchFileError(ValueError):
    """A file is damaged, has another format, or lacks what was requested; see its message."""


@contextlib.contextmanager
def errors_of(path) -> Iterator[None]:
    """Raise whatever a damaged file causes as a TorchFileError that begins with its path.

    Errors of the operating system, such as a missing permission, pass.
    """
    try:
        yield
    except TorchFileError as error:
        message = str(error)
        raise TorchFileError(
            message if message.startswith(f"{path}: ") else f"{path}: {message}"
        ) from None
    except OSError:
        raise
    except Exception as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise TorchFileError(f"{path}: damaged ({what})") from error
