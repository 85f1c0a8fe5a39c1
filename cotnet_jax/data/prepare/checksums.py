"""Compare the official tar files with their published sizes and SHA-256 checksums."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cotnet_jax import files
from cotnet_jax.data import imagenet


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
    bar = tqdm(
        desc=f"checksum of {path.name}",
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
    )
    with bar:
        return files.sha256(path, after_read=bar.update)
