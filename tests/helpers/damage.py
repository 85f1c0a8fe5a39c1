"""Ways to damage a checkpoint's folder."""

import shutil
from pathlib import Path


def largest_file(folder: Path) -> Path:
    return max(folder.glob("*/d/*"), key=lambda path: path.stat().st_size)


def truncate(folder: Path):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def remove(folder: Path):
    next(folder.glob("optimizer/d/*")).unlink()


def remove_item(folder: Path):
    shutil.rmtree(folder / "ema")


def flip_a_bit(folder: Path):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def spoil_the_metrics(folder: Path):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("0.02", "0.92"))
