"""Compare the official tar files with their published sizes and SHA-256 checksums."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cotnet_jax.data import imagenet

_BLOCK_BYTES = 1 << 24


def compare_checksums(archives: Sequence[Path]) -> list[str]:
    """Return a sentence for every archive that is not the official file of its name."""
    official = imagenet.checksums()
    differences = []
    for path in archives:
        expected_size, expected = official[path.name]
        size = path.stat().st_size
        if size != expected_size:
            differences.append(f"{path.name}: {size:,} bytes, the official file {expected_size:,}")
        elif (found := _sha256(path)) != expected:
            differences.append(f"{path.name}: SHA-256 {found}, the official file's is {expected}")
    return differences


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    bar = tqdm(
        desc=f"checksum of {path.name}",
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
    )
    with bar, open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
