"""Batches are read from cache files straight into their rows, whatever the files' lengths, and nothing damaged gets through."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from library.dataset.caches import rows
from library.dataset.caches.cache_file import DamagedCacheError, tensors_named, write_cache_file
from library.dataset.caches.hot_tensors import HotTensors
from library.dataset.caches.rows import MemoryEntry, RowReader, RowSource, read_row, stacked
from library.errors import DatasetError
from library.files.safetensors_file import TensorFile

LENGTHS = (3, 0, 5, 1)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    path = tmp_path / "a.png.64x64.tiny-latents.safetensors"
    write_cache_file(path, {"latents": torch.arange(6).reshape(2, 3).to(torch.bfloat16)}, ingredients={})
    return path


@pytest.fixture
def with_flipped_bit(cached: Path) -> Path:
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.write_bytes(data)
    return cached


def source(path: Path, name: str = "latents") -> RowSource:
    return RowSource(str(path), (str(path), name), tensors_named(path, {"latents": name}))


def write_rows(folder: Path, lengths: Sequence[int] = LENGTHS) -> tuple[list[RowSource], list[dict[str, torch.Tensor]]]:
    """Files of tensors of these lengths; longer ones are more than what a header's read brings along."""
    sources, tensors = [], []
    for number, length in enumerate(lengths):
        path = folder / f"{number}.safetensors"
        one = {"rows": torch.randn(length, 700).to(torch.bfloat16), "ids": torch.randint(1, 99, (length + 1,)).to(torch.int32)}
        write_cache_file(path, one, ingredients={})
        sources.append(RowSource(str(path), number, tensors_named(path, {"rows": "rows", "ids": "ids"})))
        tensors.append(one)
    return sources, tensors


def assert_holds(columns: dict[str, rows.Column], tensors: Sequence[dict[str, torch.Tensor]]) -> None:
    assert set(columns) == set(tensors[0])
    for name, column in columns.items():
        parts = [one[name] for one in tensors]
        assert column.lengths == [len(part) for part in parts]
        assert column.tensor.dtype == parts[0].dtype
        assert torch.equal(column.tensor, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))


def test_rows_of_files_are_padded_with_zeros(tmp_path: Path) -> None:
    sources, tensors = write_rows(tmp_path)
    assert_holds(RowReader().load(sources), tensors)
    assert_holds(RowReader().load(sources[1:2]), tensors[1:2])  # nothing but an empty one
    assert_holds(RowReader().load([sources[2], sources[2]]), [tensors[2], tensors[2]])
    assert all(torch.equal(found, tensors[0][name]) for name, found in read_row(sources[0].path, sources[0].pick).items())


def test_memory_files_and_what_was_kept_give_the_same(tmp_path: Path) -> None:
    sources, tensors = write_rows(tmp_path)
    memory = stacked([MemoryEntry("-", one) for one in tensors])
    assert_holds(memory, tensors)
    reader = RowReader()
    for _ in range(2):
        columns = reader.load(sources[:3])
        columns["rows"].tensor.fill_(7)  # what is done to a batch does not reach what is kept
    for one in sources[:3]:
        Path(one.path).unlink()
    assert_holds(reader.load(sources), tensors)


def test_entries_without_a_tensor_have_no_row_in_its_column(tmp_path: Path) -> None:
    columns = stacked([MemoryEntry("-", {"a": torch.ones(1), **({"b": torch.full((2,), n)} if n % 2 else {})}) for n in range(4)])
    assert columns["a"].entries == [0, 1, 2, 3]
    assert columns["b"].entries == [1, 3]
    assert columns["b"].tensor.tolist() == [[1, 1], [3, 3]]


def test_no_more_files_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, tensors = write_rows(tmp_path)
    monkeypatch.setattr(rows, "OPEN_AT_ONCE", 2)
    left, most = [0], [0]
    open_file, close = TensorFile.__init__, TensorFile.close

    def count_open(self: TensorFile, path: str) -> None:
        open_file(self, path)
        left[0] += 1
        most[0] = max(most[0], left[0])

    def count_close(self: TensorFile) -> None:
        close(self)
        left[0] -= 1

    monkeypatch.setattr(TensorFile, "__init__", count_open)
    monkeypatch.setattr(TensorFile, "close", count_close)
    assert_holds(RowReader().load(sources), tensors)
    assert (left, most) == ([0], [3])


def test_many_threads_read_what_one_does(tmp_path: Path) -> None:
    sources, tensors = write_rows(tmp_path, (9, 4, 0, 7, 2, 8))
    reader = RowReader()
    with ThreadPoolExecutor(8) as pool:
        for columns in pool.map(lambda _: reader.load(sources), range(60)):
            assert_holds(columns, tensors)


def test_what_does_not_fit_into_one_batch_is_named(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        write_cache_file(tmp_path / str(number), {"latents": torch.ones(2, 3, dtype=dtype)}, ingredients={})
    write_cache_file(tmp_path / "2", {"latents": torch.ones(2, 4)}, ingredients={})
    for other in ("1", "2"):
        with pytest.raises(DatasetError, match=r"latents of .*0 \(torch.float32, \[2, 3\]\).*without --skip_cache_check"):
            RowReader().load([source(tmp_path / "0"), source(tmp_path / other)])
    assert (tmp_path / "2").exists()


def test_flipped_bits_are_found_when_the_tensor_is_read(with_flipped_bit: Path) -> None:
    with pytest.raises(DamagedCacheError, match=r"a\.png\.64x64.*damaged \(the bytes of latents are not"):
        read_row(with_flipped_bit, tensors_named(with_flipped_bit, {"latents": "latents"}))
    assert with_flipped_bit.is_file()
    with pytest.raises(DatasetError, match="deleted and will be made again at the next start"):
        RowReader().load([source(with_flipped_bit)])
    assert not with_flipped_bit.exists()


def test_the_damaged_one_of_a_batch_is_deleted_alone(tmp_path: Path) -> None:
    sources, _ = write_rows(tmp_path)
    path = Path(sources[2].path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"2\.safetensors is damaged \(truncated\)"):
        RowReader().load(sources)
    assert [Path(one.path).exists() for one in sources] == [True, True, False, True]


def test_every_flipped_byte_of_a_file_is_found(tmp_path: Path) -> None:
    """Those of the data, by whichever read they come in."""
    (one, *_), _ = write_rows(tmp_path, (4,))
    path = Path(one.path)
    whole = path.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    for place in (data_start, data_start + 1, 4095, 4096, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DatasetError, match="made again at the next start"):
            RowReader().load([one])


def test_a_damaged_file_that_cannot_be_deleted_is_left_to_the_user(
    with_flipped_bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("in use")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DatasetError, match="damaged .*: delete it and start again"):
        RowReader().load([source(with_flipped_bit)])


def test_what_is_not_damaged_is_not_deleted(cached: Path) -> None:
    with pytest.raises(DatasetError, match="lacks latents_flipped"):
        RowReader().load([source(cached, "latents_flipped")])
    assert cached.is_file()


@pytest.mark.parametrize(("number", "damaged"), [(errno.EIO, True), (errno.EMFILE, False)])
def test_a_failing_disk_damages_a_file_and_too_many_open_files_do_not(
    cached: Path, monkeypatch: pytest.MonkeyPatch, number: int, damaged: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(TensorFile, "read_into", fail)
    with pytest.raises(DatasetError, match=os.strerror(number)):
        RowReader().load([source(cached)])
    assert cached.is_file() != damaged


def test_a_vanished_file_is_named_when_it_is_read(cached: Path) -> None:
    cached.unlink()
    with pytest.raises(DatasetError, match=r"a\.png\.64x64"):
        RowReader().load([source(cached)])


def test_memory_that_is_full_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, tensors = write_rows(tmp_path)
    reader = RowReader()
    monkeypatch.setattr(reader, "_hot", HotTensors(room_bytes=0))
    for _ in range(3):
        assert_holds(reader.load(sources), tensors)
