"""The error of exporting."""


class ExportError(ValueError):
    """A file cannot be made, or does not compute what the model does; the message says why."""
