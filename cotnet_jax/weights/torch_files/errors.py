"""The one error of this package."""


class TorchFileError(ValueError):
    """A file is damaged, has another format, or lacks what was requested; see its message."""
