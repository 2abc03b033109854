from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from library.dataset.caches.cache_file import tensor_bytes
from library.errors import CheckpointError
from library.files.safetensors_file import HEAD_BYTES, TensorFile, read_header, read_tensors, save_safetensors, torch_dtypes

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.int32),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(2.5),
}
AWKWARD = {
    "plain": "text",
    "quoted": 'a "quoted" },"b":{ text',
    "umlaut": "Blüte",
    "json": json.dumps({"k": ["},"]}),
    "back": "a\\b",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_safetensors(tmp_path / "x.safetensors", TENSORS, AWKWARD)
    return tmp_path / "x.safetensors"


def write(path: Path, header: object, data: bytes = b"", *, text: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_was_written_is_read(path: Path) -> None:
    with TensorFile(path) as file:
        assert set(file.names()) == set(TENSORS)
        infos = [file.info(name) for name in TENSORS]
        for name, info, data in zip(TENSORS, infos, file.read(infos), strict=True):
            assert (torch_dtypes()[info.dtype], info.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
            assert bytes(data) == tensor_bytes(TENSORS[name])
    assert {name: tensor.tolist() for name, tensor in read_tensors(read_header(path))} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def test_tensors_that_are_read_together_and_apart_are_the_same(path: Path) -> None:
    with TensorFile(path) as file:
        together = file.read([file.info("a"), file.info("b")])
        apart = [file.read([file.info(name)])[0] for name in ("a", "b")]
        far = file.read(sorted(file.tensors().values(), key=lambda info: info.start)[:: len(TENSORS) - 1])
        assert [bytes(part) for part in together] == [bytes(part) for part in apart]
        assert len(far) == 2
        assert file.read([]) == []


@pytest.mark.parametrize("key", AWKWARD)
def test_one_entry_of_the_metadata_is_found_alone(path: Path, key: str) -> None:
    with TensorFile(path) as file:
        assert file.note(key) == AWKWARD[key]
    with TensorFile(path) as file:
        assert file.metadata == AWKWARD
        assert file.note(key) == AWKWARD[key]


@pytest.mark.parametrize("key", ["absent", "k", "quoted\\", 'a "quoted'])
def test_what_looks_like_an_entry_is_none(path: Path, key: str) -> None:
    with TensorFile(path) as file, pytest.raises(KeyError):
        file.note(key)


def test_files_are_read_and_never_mapped_into_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --disable_mmap_load_safetensors asks for."""

    def mapped(*args: object, **settings: object) -> None:
        raise AssertionError("mapped into memory")

    monkeypatch.setattr(mmap, "mmap", mapped)
    monkeypatch.setattr(torch, "from_file", mapped)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", mapped)
    monkeypatch.setattr(safetensors, "safe_open", mapped)
    monkeypatch.setattr(safetensors.torch, "load_file", mapped)
    for name, tensor in read_tensors(read_header(path)):
        assert torch.equal(tensor, TENSORS[name])


def test_a_header_in_another_style_is_read_as_well(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    spaced = write(tmp_path / "spaced", {"__metadata__": {"k": "v"}, "x": entry}, b"ab")
    last = write(tmp_path / "last", {"x": entry, "__metadata__": {"k": "v"}}, b"ab")
    none = write(tmp_path / "none", {"x": entry}, b"ab")
    only = write(tmp_path / "only", None, text=b'{"__metadata__":{"k":"v"}}')
    for file_path, metadata, names in (
        (spaced, {"k": "v"}, ["x"]),
        (last, {"k": "v"}, ["x"]),
        (none, {}, ["x"]),
        (only, {"k": "v"}, []),
    ):
        with TensorFile(file_path) as file:
            assert (file.metadata, file.names()) == (metadata, names)


def test_a_long_header_is_read_to_its_end(tmp_path: Path) -> None:
    many = {f"tensor {number}": torch.full((3,), number) for number in range(300)}
    save_safetensors(tmp_path / "x", many, {"long": "y" * 5000})
    header = read_header(tmp_path / "x")
    assert set(header.tensors) == set(many)
    assert header.metadata == {"long": "y" * 5000}


@pytest.mark.parametrize(
    "entry",
    [
        "no entry",
        [1, 2],
        {},
        {"dtype": "U8", "shape": [2]},
        {"dtype": "U8", "shape": [3], "data_offsets": [0, 2]},
        {"dtype": "U8", "shape": "ab", "data_offsets": [0, 2]},
        {"dtype": "U8", "shape": [-2, -1], "data_offsets": [0, 2]},
        {"dtype": "U8", "shape": [2], "data_offsets": [-2, 0]},
        {"dtype": "U8", "shape": [2], "data_offsets": [0, 2, 4]},
        {"dtype": "U8", "shape": [2], "data_offsets": None},
        {"dtype": "U9", "shape": [2], "data_offsets": [0, 2]},
        {"dtype": ["U8"], "shape": [2], "data_offsets": [0, 2]},
    ],
)
def test_an_entry_that_cannot_be_is_named_as_damage(tmp_path: Path, entry: object) -> None:
    path = write(tmp_path / "x", {"x": entry}, b"ab")
    with pytest.raises(CheckpointError):
        read_header(path)
    with TensorFile(path) as file, pytest.raises(CheckpointError):
        file.info("x")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no json",
        b"[]",
        b"{",
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"a":"b"},"x"',
        b'{"__metadata__":{"a":},"x":{}}',
        b"[" * 90_000,
    ],
)
def test_a_header_that_is_none_is_damage(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged|not a safetensors"):
        read_header(write(tmp_path / "x", None, text=text))


def test_bytes_are_read_into_place_from_anywhere(tmp_path: Path) -> None:
    """From what came with the header, from behind it, and across."""
    save_safetensors(tmp_path / "x", {"a": torch.arange(3 * HEAD_BYTES, dtype=torch.int64)})
    whole = (tmp_path / "x").read_bytes()
    with TensorFile(tmp_path / "x") as file:
        for start, length in (
            (9, 20),
            (HEAD_BYTES - 5, 10),
            (HEAD_BYTES - 5, 5),
            (HEAD_BYTES, 7),
            (2 * HEAD_BYTES, 900),
            (50, 0),
        ):
            place = bytearray(length)
            file.read_into(start, memoryview(place))
            assert place == whole[start : start + length]
        with pytest.raises(CheckpointError, match="truncated"):
            file.read_into(len(whole) - 3, memoryview(bytearray(4)))


def test_a_truncated_file_says_so_at_every_length(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated" if length >= 8 else "not a safetensors file"):
            read_header(cut)


def test_a_file_that_gets_shorter_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    save_safetensors(path, {"a": torch.ones(HEAD_BYTES)})
    with TensorFile(path) as file:
        infos = list(file.tensors().values())
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="truncated"):
            file.read(infos)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for name in ("absent", "."):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_header(tmp_path / name)
