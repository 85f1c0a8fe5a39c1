"""Settings of the documentation; ``make docs`` builds it."""

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

html_theme = "furo"
html_title = f"cotnet_jax {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Attributes become a list in the class, not entries that clash with its annotated fields.
napoleon_use_ivar = True

# What Flax adds to the signature of each module.
_FLAX = re.compile(r", (parent|name): [^=]*= ((<[^>]*>)|None)")


def _shorten(app, what, name, obj, options, signature, return_annotation):
    return signature and _FLAX.sub("", signature), return_annotation


def setup(app):
    app.connect("autodoc-process-signature", _shorten)
