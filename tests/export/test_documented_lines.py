"""The lines of docs/export.md that load a file do what cotnet-predict does."""

import re
from pathlib import Path

import pytest
from helpers import exporting
from PIL import Image

from cotnet_jax.export import to_onnx, to_stablehlo

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = pytest.mark.end_to_end

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"


def test_documented_lines(tiny, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    Path("cotnet50.onnx").write_bytes(to_onnx(tiny, preprocess=True))
    Path("cotnet50.stablehlo").write_bytes(to_stablehlo(tiny, preprocess=True))
    upright = Image.fromarray(exporting.smooth_images(1, 61, 90)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("cat.jpg", exif=exif)
    (expected,) = tiny.classify(tiny.prepare("cat.jpg")[None])
    wanted = [f"{100 * each['probability']:6.2f} %  {each['name']}" for each in expected]
    for block in blocks:
        exec(block, {})
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("%")[1] for line in lines] == [line.split("%")[1] for line in wanted]
        for line, other in zip(lines, wanted, strict=True):
            assert float(line.split("%")[0]) == pytest.approx(float(other.split("%")[0]), abs=0.2)
