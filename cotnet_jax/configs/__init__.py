"""The configurations that come with the package, each a module with ``get_config``.

``--config=cotnet50`` names one. A file of your own starts from one and changes what differs::

    from cotnet_jax.configs import cotnet50


    def get_config():
        config = cotnet50.get_config()
        config.batch_size = 256
        return config
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
# What the others start from: it has no data and no run of its own.
_BASE = "default"


def names() -> list[str]:
    """Return the names that ``--config`` takes, sorted."""
    return sorted({file.stem for file in _FOLDER.glob("*.py")} - {"__init__", _BASE})


def path(name: str = _BASE) -> Path:
    """Return the file of a configuration; by default the one that explains every field."""
    return _FOLDER / f"{name}.py"
