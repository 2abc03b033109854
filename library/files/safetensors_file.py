"""Safetensors files: the header without torch, the tensors one by one, and deterministic atomic writing.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}, __metadata__: {str: str}},
then the tensors' bytes. Reading goes through plain file reads instead of a memory map, so that a checkpoint never counts
twice against memory: once as mapped pages, once as the model.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from library.errors import CheckpointError
from library.files.atomic import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
# sizes in bytes; the names are the format's
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
               "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
HEAD_BYTES = 4096  # of a small file's header, and more: one read
METADATA = b'{"__metadata__":'
METADATA_END = b'},"'  # metadata holds only texts, and in a text a quotation mark is escaped: the first of these is its end
FINGERPRINT_CHUNKS = 64
FINGERPRINT_CHUNK_BYTES = 65536


class TensorInfo(NamedTuple):
    """Where one tensor lies: ``start`` and ``end`` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Reads and checks the header; needs no torch. Raises CheckpointError for a missing, damaged or truncated file."""
    with TensorFile(path) as file:
        return SafetensorsHeader(path, file.tensors(), file.metadata)


class TensorFile:
    """An open safetensors file, for reading a few tensors of a small file with little effort: the header comes with one read,
    and only what is asked for is looked at. Needs no torch. Use with ``with``, in one thread.

    Raises CheckpointError for a missing, damaged or truncated file.
    """

    __slots__ = ("_data_start", "_entries", "_file", "_head", "_metadata", "_metadata_text", "path")

    def __init__(self, path: str | Path):
        self.path = path
        try:
            self._file = io.FileIO(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        self._metadata: dict[str, str] | None = None
        self._metadata_text = b""
        try:
            text = self._read_header()
            self._entries = self._parsed(text)
        except OSError as error:
            self._file.close()
            raise _unreadable(path, error) from error
        except BaseException:
            self._file.close()
            raise
        self._data_start = 8 + len(text)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def metadata(self) -> dict[str, str]:
        if self._metadata is None:
            self._metadata = _json_object(self.path, self._metadata_text) if self._metadata_text else {}
        return self._metadata

    def note(self, key: str) -> str:
        """``metadata[key]``, found without taking all of it apart. Raises KeyError."""
        if self._metadata is None:
            mark = b'"%b":"' % key.encode("utf-8")
            start = self._metadata_text.find(mark) + len(mark)
            value = self._metadata_text[start : self._metadata_text.find(b'"', start)]
            if start >= len(mark) and b"\\" not in value:
                return value.decode("utf-8", "replace")
        return self.metadata[key]

    def names(self) -> list[str]:
        return list(self._entries)

    def info(self, name: str) -> TensorInfo:
        """Raises KeyError where there is no such tensor. Whether the file is long enough shows when it is read."""
        entry = self._entries[name]
        try:
            return _tensor_info(self.path, name, entry, self._data_start)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path) from error

    def tensors(self) -> dict[str, TensorInfo]:
        """All of them, each checked."""
        try:
            found = {name: _tensor_info(self.path, name, entry, self._data_start) for name, entry in self._entries.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path) from error
        expected = max((info.end for info in found.values()), default=self._data_start)
        if expected > self._size():
            raise _truncated(self.path, self._size(), expected)
        return found

    def read(self, infos: Sequence[TensorInfo]) -> list[memoryview]:
        """The bytes of each tensor; neighbours are read at once. Raises OSError, or CheckpointError for too short a file."""
        start = min((info.start for info in infos), default=0)
        end = max((info.end for info in infos), default=0)
        if end - start > sum(info.end - info.start for info in infos):
            return [self._read_range(info.start, info.end) for info in infos]
        data = self._read_range(start, end)
        return [data[info.start - start : info.end - start] for info in infos]

    def _read_range(self, start: int, end: int) -> memoryview:
        import numpy as np

        data = np.empty(end - start, np.uint8).data  # unlike a bytearray not filled with zeros first
        self.read_into(start, data)
        return data

    def read_into(self, start: int, place: memoryview) -> None:
        """Fills ``place`` with the file's bytes from ``start`` on. Raises as ``read`` does."""
        head = self._head[start : start + len(place)]
        place[: len(head)] = head
        if len(head) == len(place):
            return
        rest = place[len(head) :]
        self._file.seek(start + len(head))
        if self._file.readinto(rest) != len(rest):
            if start + len(place) > self._size():
                raise _truncated(self.path, self._size(), start + len(place))
            self._file.seek(start + len(head))
            _read_fully(self._file, rest, self.path)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _read_header(self) -> bytes:
        path = self.path
        head = self._file.read(HEAD_BYTES) or b""
        if len(head) < 8:
            raise CheckpointError(f"{path} is not a safetensors file: it has only {len(head)} bytes")
        end = 8 + int.from_bytes(head[:8], "little")
        if end > 8 + MAX_HEADER_BYTES:
            raise _damaged(path)
        if len(head) < end:
            if end > self._size():
                raise CheckpointError(f"{path} is truncated inside its header; copy or download it again")
            rest = bytearray(end - len(head))
            _read_fully(self._file, memoryview(rest), path)
            head += rest
        self._head = head  # with the first bytes of the data, or all of a small file
        return head[8:end]

    def _parsed(self, text: bytes) -> dict:
        """The tensors' entries; the metadata, often most of the header, waits until it is asked for."""
        end = text.find(METADATA_END) if text.startswith(METADATA) else -1
        if end > 0:
            self._metadata_text = text[len(METADATA) : end + 1]
            return _json_object(self.path, b"{" + text[end + 2 :])
        entries = _json_object(self.path, text)
        self._metadata = entries.pop("__metadata__", {})
        if not isinstance(self._metadata, dict):
            raise _damaged(self.path)
        return entries


def _json_object(path: str | Path, text: bytes) -> dict:
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _unreadable(path: str | Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {error.strerror}")


def _truncated(path: str | Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: it has {size:,} bytes of {expected:,}; copy or download it again")


def _damaged(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{path} is not a safetensors file, or its header is damaged; copy or download it again")


def _tensor_info(path: str | Path, name: str, entry: dict, data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(map(int, entry["shape"]))
    if entry["dtype"] not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {entry['dtype']}")
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * DTYPE_BYTES[entry["dtype"]]:
        raise ValueError(name)
    return TensorInfo(entry["dtype"], shape, data_start + begin, data_start + end)


def read_tensors(header: SafetensorsHeader, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, CPU tensor in the file's dtype) in the order of the file, one at a time.

    The caller casts and moves each before it asks for the next: peak memory is the model plus one tensor.
    """
    import torch

    dtypes = torch_dtypes()
    wanted = set(header.tensors if names is None else names)
    in_file_order = sorted((info.start, name) for name, info in header.tensors.items() if name in wanted)
    with io.FileIO(header.path) as file:
        for start, name in in_file_order:
            info = header.tensors[name]
            buffer = torch.empty(info.end - info.start, dtype=torch.uint8)  # aligned, which a bytearray need not be
            file.seek(start)
            _read_fully(file, memoryview(buffer.numpy()), header.path)  # type: ignore[arg-type]  # arrays are buffers
            yield name, buffer.view(dtypes[info.dtype]).reshape(info.shape)


def _read_fully(file: io.RawIOBase, view: memoryview, path: str | Path) -> None:
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise CheckpointError(f"{path} ended while it was read: was it replaced or truncated?")
        done += got


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """The format's dtype names -> torch dtypes."""
    import torch

    return {"F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "F32": torch.float32, "I32": torch.int32,
            "U32": torch.uint32, "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16, "U16": torch.uint16,
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
            "BOOL": torch.bool}  # fmt: skip


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file. Equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    ordered = dict(sorted(metadata.items())) if metadata else None
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _sorted_metadata(save(contiguous, metadata=ordered))


def _sorted_metadata(data: bytes) -> bytes:
    # the format's writer keeps metadata in a hash map, whose order differs from process to process
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" not in header:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes atomically. Raises OutputError when the disk is full or the folder cannot be written."""
    data = serialize(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


def file_fingerprint(path: Path) -> str:
    """32 hex digits that change when a model file changes, without reading all of it.

    Covers the size and 64 chunks of 64 KiB spread evenly from the first byte to the last; fine-tuned weights differ in all
    of them. Independent of name and place, so that moving a model keeps the caches. A folder counts with all its files.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file_path in files:
        if path.is_dir():
            digest.update(str(file_path.relative_to(path).as_posix()).encode("utf-8"))
        _digest_chunks(digest, file_path)
    return digest.hexdigest()


def _digest_chunks(digest: hashlib.blake2b, path: Path) -> None:
    size = path.stat().st_size
    digest.update(struct.pack("<Q", size))
    last = max(size - FINGERPRINT_CHUNK_BYTES, 0)
    with path.open("rb") as file:
        for offset in sorted({last * i // (FINGERPRINT_CHUNKS - 1) for i in range(FINGERPRINT_CHUNKS)}):
            file.seek(offset)
            digest.update(file.read(FINGERPRINT_CHUNK_BYTES))
