"""The one error of this package."""


class TorchFileError(ValueError):
    """A file is damaged, is of another kind, or lacks what was asked for; says which."""
