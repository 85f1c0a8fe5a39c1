"""The public face of the package."""

import pydoc
import re
from pathlib import Path

import cotnet_jax

ROOT = Path(__file__).parents[1]


def test_dir_and_help_show_everything_public():
    assert set(cotnet_jax.__all__) <= set(dir(cotnet_jax))
    text = pydoc.plain(pydoc.render_doc(cotnet_jax))
    for name in cotnet_jax.__all__:
        assert getattr(cotnet_jax, name) is not None
        assert re.search(rf"\b{name.strip('_')}\b", text, re.IGNORECASE), name
    assert f"VERSION\n    {cotnet_jax.__version__}" in text


def test_the_version_is_in_one_place():
    assert f"version: {cotnet_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{cotnet_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
