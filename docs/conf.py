"""Settings of the documentation; ``make docs`` builds it."""

import dataclasses
import importlib.metadata
import os
import re
import sys
from pathlib import Path

# Importing the package must not look for accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

project = "cotnet_jax"
author = "The cotnet_jax authors"
copyright = f"2026, {author}"
release = importlib.metadata.version("cotnet_jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["performance/*"]
myst_heading_anchors = 3
# ```math is an equation, on GitHub as well.
myst_fence_as_directive = ["math"]

html_theme = "furo"
html_title = f"cotnet_jax {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Attributes become a list in the class, not entries that clash with its annotated fields.
napoleon_use_ivar = True

# What Flax adds to the signature of each module, and how dataclasses print their defaults.
_FLAX = re.compile(r", (parent|name): [^=]*= ((<[^>]*>)|None)")
_DEFAULT = re.compile(r"<(?:class|function) '?(?:\w+\.)*(\w+)'?[^>]*>")


def _shorten_signature(app, what, name, obj, options, signature, return_annotation):
    if signature:
        signature = _DEFAULT.sub(r"\1", _FLAX.sub("", signature))
    return signature, return_annotation


def _prepare_docstring(app, what, name, obj, options, lines):
    """Adapt a docstring to napoleon, which reads it after this."""
    # The attributes of a dataclass, such as a Flax module, are its arguments.
    if dataclasses.is_dataclass(obj) and "Args:" not in lines:
        lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]
    # Types are in annotations: no text before a colon is one.
    for index, line in enumerate(lines[:-1]):
        if line in ("Returns:", "Yields:"):
            indent, text = re.match(r"( *)(.*)", lines[index + 1]).groups()
            lines[index + 1] = f"{indent}: {text}"


def setup(app):
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=100)
