"""The EXIF orientation of JPEGs.

Pillow takes longer to find it than decoding 64 x 64 pixels takes, so it is asked about odd files
alone.
"""

from typing import Literal

_EXIF = b"Exif\0\0"
_FILL, _APP1, _SCAN, _END = 0xFF, 0xE1, 0xDA, 0xD9
# Markers that stand for themselves, without a segment.
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_ORIENTATION, _SHORT = 0x0112, 3


def jpeg_orientation(data: bytes) -> int | None:
    """Return the EXIF orientation of a JPEG, and 1, upright, without one.

    Returns:
      None where Pillow should look: damaged files, XMP, and unusual types.
    """
    at = 2
    try:
        while data[at] == _FILL:
            code = data[at + 1]
            if code in (_SCAN, _END):
                return 1
            if code == _FILL:
                at += 1
                continue
            if code in _ALONE:
                at += 2
                continue
            end = at + 2 + (data[at + 2] << 8 | data[at + 3])
            if code == _APP1:
                found = _orientation(data[at + 4 : end])
                if found != 0:
                    return found
            at = end
    except IndexError:
        pass
    return None


def _orientation(segment: bytes) -> int | None:
    """Return what a segment of metadata says, 0 for nothing, None where Pillow should look."""
    tiff = segment.removeprefix(_EXIF)
    order = _ORDERS.get(tiff[:4])
    if not segment.startswith(_EXIF) or order is None:
        return None
    start = int.from_bytes(tiff[4:8], order)
    end = start + 2 + 12 * int.from_bytes(tiff[start : start + 2], order)
    if end > len(tiff):
        return None
    tag, usual = _ORIENTATION.to_bytes(2, order), _SHORT.to_bytes(2, order) + (1).to_bytes(4, order)
    for entry in range(start + 2, end, 12):
        if tiff[entry : entry + 2] == tag:
            value = int.from_bytes(tiff[entry + 8 : entry + 10], order)
            return value if value and tiff[entry + 2 : entry + 8] == usual else None
    return 0
