"""Exported files of all published variants."""

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from helpers import golden

from cotnet_jax.tools import check_export, exported_models

MODELS = exported_models.find(golden.GOLDENS)


def test_every_published_variant_is_there():
    published = {golden.model_of(path) if path else name for name, path in MODELS.items()}
    assert len(published) == 10 and "cotnet_tiny" not in published


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize("name", MODELS)
def test_files_give_the_originals_logits(name):
    model = exported_models.build(name, MODELS[name], max(check_export.BATCH_SIZES))
    lines = list(check_export.check(model))
    assert len(lines) == 12
    assert all(error <= check_export.TOLERANCE for _, errors in lines for error in errors)
