"""Checksums of files."""

import hashlib

import pytest

from cotnet_jax import files


@pytest.mark.parametrize("sizes", [(0,), (1,), (2**18,), (2**18 + 1, 0, 5)])
def test_sha256_of_files_one_after_the_other(tmp_path, sizes):
    parts = [bytes([index]) * size for index, size in enumerate(sizes)]
    paths = [tmp_path / str(index) for index in range(len(sizes))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    counts: list[int] = []
    found = files.sha256(*paths, after_read=counts.append)
    assert found == hashlib.sha256(b"".join(parts)).hexdigest()
    assert sum(counts) == sum(sizes)
    with pytest.raises(FileNotFoundError):
        files.sha256(tmp_path / "none")
