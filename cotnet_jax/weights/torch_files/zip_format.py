"""The zip format of torch.save (since PyTorch 1.6): ``ROOT/data.pkl`` and ``ROOT/data/KEY``.

PyTorch stores its members uncompressed, so that a storage can be mapped where it lies.
"""

import io
import mmap
import struct
import weakref
import zipfile
import zlib
from typing import Any

import numpy as np

from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import printable
from cotnet_jax.weights.torch_files.pickle_machine import PickleMachine
from cotnet_jax.weights.torch_files.storage_ids import StorageIds
from cotnet_jax.weights.torch_files.tensors import Storage
from cotnet_jax.weights.torch_files.torch_globals import GLOBALS

# Members are inflated anew when their arrays are read again: so many times, at the limit's size.
_READINGS = 10
_ENCRYPTED = 0x1
_UTF8_NAME = 0x800


class _Directory(io.RawIOBase):
    """The mapped file as a stream for ``zipfile``, which reads only the directory."""

    def __init__(self, mapped: mmap.mmap, most: int):
        self._mapped = mapped
        self._most = most
        self._at = 0

    def seekable(self):
        return True

    def tell(self):
        return self._at

    def seek(self, offset, whence=io.SEEK_SET):
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._mapped)}[whence]
        if not 0 <= start + offset <= len(self._mapped):
            raise TorchFileError(f"refers to byte {start + offset:,} of {len(self._mapped):,}")
        self._at = start + offset
        return self._at

    def read(self, size=-1):
        if size is None or size < 0:
            size = len(self._mapped) - self._at
        if size > self._most:
            raise TorchFileError(f"a directory of {size:,} bytes, above {self._most:,}")
        data = self._mapped[self._at : self._at + size]
        self._at += len(data)
        return data


class _Archive:
    """Members of a zip file, without the root folder's name."""

    def __init__(self, mapped: mmap.mmap, budget: Budget):
        self._mapped = mapped
        try:
            with zipfile.ZipFile(_Directory(mapped, budget.limits.directory_bytes)) as archive:
                infos = archive.infolist()
                end = archive.start_dir
        except TorchFileError:
            raise
        except Exception as error:
            raise TorchFileError(
                f"the zip directory is damaged or cut off ({printable(str(error))}); "
                "is the download complete?"
            ) from None
        self.members: dict[str, zipfile.ZipInfo] = {}
        roots = [i.filename[: -len("data.pkl")] for i in infos if i.filename.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            names = ", ".join(printable(info.filename) for info in infos[:5])
            raise TorchFileError(
                f"a zip file of {len(infos)} members ({names}, ...) with {len(roots)} data.pkl in "
                "a folder of the first level; torch.save writes exactly one"
            )
        for info in infos:
            name = info.filename.removeprefix(roots[0])
            if name in self.members:
                raise TorchFileError(f"two members are called {printable(name)}")
            self.members[name] = info
        self._check_places(infos, end)
        self._inflatable = self._check_inflated(infos, budget.limits)
        self._verified: set[str] = set()
        # The member that was inflated last: tensors that share it come one after the other.
        self._inflated: tuple[str, memoryview] | None = None
        budget.allow_arrays(
            sum(
                info.compress_size if info.compress_type == zipfile.ZIP_STORED else info.file_size
                for info in infos
            )
        )
        # torch.serialization.set_crc32_options(False) leaves them all 0.
        self.has_checksums = any(info.CRC for info in infos)
        self._check_fingerprint(infos)

    def _check_places(self, infos, end):
        """Refuse members that share bytes: a small file could claim any number of large arrays."""
        following = end
        for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
            header = self._mapped[info.header_offset : info.header_offset + 30]
            names = sum(struct.unpack("<HH", header[26:])) if len(header) == 30 else 0
            if info.header_offset + 30 + names + info.compress_size > following:
                raise TorchFileError(
                    f"member {printable(info.filename)} overlaps what follows it: the file is "
                    "damaged, get it again"
                )
            following = info.header_offset

    def _check_inflated(self, infos, limits):
        """Return how many bytes may be inflated in all; refuse members that claim too much."""
        deflated = [info for info in infos if info.compress_type != zipfile.ZIP_STORED]
        claimed = stored = 0
        for info in deflated:
            claimed += info.file_size
            stored += info.compress_size
            for what, size, within in (
                (f"member {printable(info.filename)} claims", info.file_size, info.compress_size),
                ("compressed members claim", claimed, stored),
            ):
                if size > max(limits.inflated_bytes, limits.inflated_factor * within):
                    raise TorchFileError(f"{what} {size:,} bytes in {within:,}")
        return _READINGS * max(limits.inflated_bytes, limits.inflated_factor * stored)

    def _check_fingerprint(self, infos):
        """Detect exchanged members: PyTorch 2.1 and later write a hash of all checksums.

        Source of the hash: PyTorchStreamWriter in caffe2/serialize/inline_container.cc.
        """
        if ".data/serialization_id" not in self.members:
            return
        written = self.read(".data/serialization_id", 64)[-20:]
        mask = 2**64 - 1
        value = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            if info.file_size and not info.filename.endswith("/.data/serialization_id"):
                shifted = (value << 6 & mask) + (value >> 2)
                value ^= (info.CRC + 0x9E3779B9 + shifted) & mask
        if written != b"%020d" % value:
            raise TorchFileError(
                "its members are not those that it was written with (serialization_id does not "
                "fit); if the file was only packed anew, save it again with torch.save"
            )

    def _locate(self, name):
        """Return (start, stored size, size, deflated) of a member, checked against its header."""
        info = self.members.get(name)
        if info is None:
            raise TorchFileError(f"member {printable(name)} is missing")
        shown = printable(name)
        header = self._mapped[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise TorchFileError(f"member {shown} has no header where the directory says")
        name_size, extra_size = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name_size + extra_size
        encoding = "utf-8" if info.flag_bits & _UTF8_NAME else "cp437"
        local_name = self._mapped[info.header_offset + 30 : info.header_offset + 30 + name_size]
        if local_name != info.orig_filename.encode(encoding):
            raise TorchFileError(f"member {shown} has another name in its own header")
        if info.flag_bits & _ENCRYPTED:
            raise TorchFileError(f"member {shown} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TorchFileError(
                f"member {shown} is compressed by method {info.compress_type}; stored and "
                "deflated members can be read"
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if start + info.compress_size > len(self._mapped):
            raise TorchFileError(
                f"member {shown} should end at byte {start + info.compress_size:,}, the file has "
                f"{len(self._mapped):,}"
            )
        if not deflated and info.compress_size != info.file_size:
            raise TorchFileError(f"member {shown} is stored but has two sizes")
        return start, info.compress_size, info.file_size, deflated

    def _contents(self, name) -> memoryview:
        if self._inflated and self._inflated[0] == name:
            return self._inflated[1]
        start, stored, size, deflated = self._locate(name)
        data = memoryview(self._mapped)[start : start + stored]
        if deflated:
            data = self._inflate(name, data, size)
        # Once: thousands of tensors can share a member.
        if self.has_checksums and name not in self._verified:
            if zlib.crc32(data) != self.members[name].CRC:
                raise TorchFileError(
                    f"member {printable(name)} does not fit its checksum: the file is damaged, "
                    "get it again"
                )
            self._verified.add(name)
        if deflated:
            self._inflated = name, data
        return data

    def _inflate(self, name, data, size) -> memoryview:
        self._inflatable -= size
        if self._inflatable < 0:
            raise TorchFileError(
                f"member {printable(name)} is compressed and read too often; save the file again "
                "with torch.save, which does not compress"
            )
        try:
            # One byte more than claimed shows a larger member.
            data = memoryview(zlib.decompressobj(-15).decompress(data, size + 1))
        except zlib.error:
            raise TorchFileError(f"member {printable(name)} is damaged") from None
        if len(data) != size:
            raise TorchFileError(f"member {printable(name)} has another size than it claims")
        return data

    def read(self, name, limit) -> bytes:
        size = self._locate(name)[2]
        if size > limit:
            raise TorchFileError(f"member {printable(name)} has {size:,} bytes, above {limit:,}")
        return bytes(self._contents(name))

    def attach(self, storage: Storage):
        """Connect a storage to the member ``data/KEY``, which is read and checked when used."""
        name = f"data/{storage.key}"
        size = self._locate(name)[2]
        if size != storage.nbytes:
            raise TorchFileError(
                f"storage {printable(storage.key)} should have {storage.nbytes:,} bytes, "
                f"has {size:,}"
            )
        cached = None

        def read():
            nonlocal cached
            values = cached and cached()
            if values is None:
                values = np.frombuffer(self._contents(name), np.uint8)
                # Arrays that share the member share its memory, as long as one of them is in use.
                cached = weakref.ref(values)
            return values

        storage.read = read


def read_zip(mapped: mmap.mmap, budget: Budget) -> tuple[Any, tuple[str, ...]]:
    """Return (value, names of inert globals) of a file in the zip format.

    Raises:
      TorchFileError: the file is damaged, not written by torch.save, or claims more than it has.
    """
    archive = _Archive(mapped, budget)
    if "constants.pkl" in archive.members:
        raise TorchFileError(
            "a TorchScript program; save the weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    order = b"little"
    if "byteorder" in archive.members:
        order = archive.read("byteorder", 16)
    if order not in (b"little", b"big"):
        raise TorchFileError(f"byte order {order!r}")

    def prepare(storage):
        archive.attach(storage)
        storage.swapped = order == b"big"

    machine = PickleMachine(GLOBALS, StorageIds(prepare, with_view=False), budget)
    stream = io.BytesIO(archive.read("data.pkl", budget.limits.pickle_bytes))
    budget.allow_pickle(len(stream.getbuffer()))
    return machine.load(stream), tuple(machine.inert)
