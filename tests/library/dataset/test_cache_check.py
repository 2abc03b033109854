from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from library.dataset import cache_check
from library.dataset.cache_check import CHANGED_BYTES, TensorCheck, broken_tensors
from library.dataset.cache_file import write_cache_file
from library.files.safetensors_file import read_header

NAMES = ("latents", "latents_flipped")


def write(path: Path) -> Path:
    tensors = {name: torch.arange(600 * 1024).reshape(2, -1).to(torch.int32) + place for place, name in enumerate(NAMES)}
    write_cache_file(path, tensors, ingredients={"arch": "tiny"})  # each longer than one read
    return path


def flip_bit(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def choose(check: TensorCheck, *paths: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        check.choose(paths, pool)


def test_the_damaged_tensor_is_found_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    assert broken_tensors(read_header(path), NAMES) == {}
    flip_bit(path)
    assert broken_tensors(read_header(path), NAMES) == {"latents_flipped": CHANGED_BYTES}
    assert broken_tensors(read_header(path), ["latents"]) == {}


def test_a_file_that_shrinks_or_vanishes_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert broken_tensors(header, NAMES) == {"latents_flipped": CHANGED_BYTES}
    path.unlink()
    assert set(broken_tensors(header, NAMES)) == set(NAMES)
    assert "cannot be read" in broken_tensors(header, NAMES)["latents"]


@pytest.mark.parametrize("noted", ["no json", "[]", '{"latents": 1}'])
def test_checksums_that_cannot_be_read_are_damage(tmp_path: Path, noted: str) -> None:
    header = read_header(write(tmp_path / "a.safetensors"))
    header.metadata["crc32"] = noted
    assert broken_tensors(header, NAMES)["latents_flipped"] in ("its description is broken", CHANGED_BYTES)


def test_a_file_is_read_once_as_long_as_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors")
    check, reads = TensorCheck(), []

    def counted(header: object, names: object) -> dict[str, str]:
        reads.append(header)
        return broken_tensors(header, names)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_check, "broken_tensors", counted)
    for _ in range(2):
        choose(check, path)
        assert check.broken(read_header(path), NAMES) == {}
    assert len(reads) == 1
    flip_bit(path)
    os.utime(path, ns=(5, 5))
    for _ in range(2):  # what is broken is not taken for seen
        choose(check, path)
        assert set(check.broken(read_header(path), NAMES)) == {"latents_flipped"}


def test_of_a_large_cache_a_share_is_read_and_a_part_of_it_no_less(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(400)]
    for path in paths:
        path.write_bytes(b"x" * 100)
    days = []
    for day in (1, 2):
        check = TensorCheck(full_bytes=10_000)
        check._day = day
        choose(check, *paths, tmp_path / "absent")
        of_all = set(check._due)
        assert 60 <= len(of_all) <= 140  # a quarter
        choose(check, *paths[::2])
        assert set(check._due) >= of_all.intersection(paths[::2])
        days.append(of_all)
    assert len(days[0] & days[1]) < 60  # other ones each day
    choose(check, *paths[:100])
    assert set(check._due) == set(paths[:100])  # not above the limit: all
