"""The version of the package; pyproject.toml reads it from here."""

__version__ = "0.1.0"


def versions() -> str:
    """Return the versions that a report of an error needs, in one line."""
    import importlib.metadata
    import platform

    jax, flax = (importlib.metadata.version(name) for name in ("jax", "flax"))
    return f"cotnet_jax {__version__}, JAX {jax}, Flax {flax}, Python {platform.python_version()}"
