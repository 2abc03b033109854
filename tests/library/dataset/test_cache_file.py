from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.dataset import cache_file
from library.dataset.cache_check import broken_tensors
from library.dataset.cache_file import (
    DamagedCacheError,
    SourceHashes,
    Wanted,
    cache_path,
    check,
    clean_left_overs,
    load_cache_tensors,
    note_source,
    read_cache_tensors,
    write_cache_file,
)
from library.errors import DatasetError
from library.files.safetensors_file import read_header, save_safetensors

INGREDIENTS = {"arch": "tiny", "model": "m1", "dtype": "bfloat16", "bucket": (64, 64), "crop": (0, 0), "interpolation": ""}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"any bytes do: the cache never decodes")
    return path


@pytest.fixture
def cached(image: Path) -> Path:
    path = cache_path(image, "64x64.tiny-latents", None)
    tensors = {"latents": torch.arange(6).reshape(2, 3).to(torch.bfloat16)}
    write_cache_file(path, tensors, ingredients=INGREDIENTS, source=SourceHashes().identity(image))
    return path


def wanted(image: Path, **changes: object) -> Wanted:
    return Wanted(ingredients={**INGREDIENTS, **changes}, source=image, tensors=("latents",))


def test_what_was_written_is_valid_and_keeps_its_dtype(image: Path, cached: Path) -> None:
    assert cached.name == "a.png.64x64.tiny-latents.safetensors"
    assert check(cached, wanted(image)).kind == "valid"
    tensor = read_cache_tensors(cached, ["latents"])["latents"]
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "m2"}, "model changed"),
        ({"dtype": "float32"}, "dtype changed"),
        ({"bucket": (64, 128)}, "size changed"),
        ({"crop": (0, 1)}, "size changed"),
        ({"arch": "other"}, "made for another architecture"),
        ({"interpolation": "area"}, "resize interpolation changed"),
    ],
)
def test_a_changed_ingredient_is_named(image: Path, cached: Path, change: dict[str, object], reason: str) -> None:
    verdict = check(cached, wanted(image, **change))
    assert (verdict.kind, verdict.reason) == ("stale", reason)


def test_an_image_with_other_bytes_is_stale(image: Path, cached: Path) -> None:
    image.write_bytes(image.read_bytes().swapcase())  # same size
    os.utime(image, ns=(1, 1))
    assert check(cached, wanted(image)).reason == "image changed"
    image.write_bytes(b"other size")
    assert check(cached, wanted(image)).reason == "image changed"


def test_a_touched_image_stays_valid_and_its_new_time_can_be_noted(image: Path, cached: Path) -> None:
    before = read_cache_tensors(cached, ["latents"])["latents"]
    os.utime(image, ns=(5, 5))
    verdict = check(cached, wanted(image))
    assert verdict.valid
    assert verdict.touched
    note_source(cached, SourceHashes().identity(image))
    assert not check(cached, wanted(image)).touched
    assert torch.equal(read_cache_tensors(cached, ["latents"])["latents"], before)


def test_an_unchanged_image_is_not_read_again(image: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the image was hashed")

    monkeypatch.setattr(SourceHashes, "identity", refuse)
    assert check(cached, wanted(image)).valid


def test_missing_truncated_garbage_and_foreign_files(image: Path, cached: Path) -> None:
    assert check(cached.with_name("nothing"), wanted(image)).kind == "missing"
    data = cached.read_bytes()
    cached.write_bytes(data[:-3])
    assert check(cached, wanted(image)).line == "damaged: truncated"
    cached.write_bytes(data[:40])
    assert check(cached, wanted(image)).line == "damaged: truncated"
    cached.write_bytes(b"")
    assert check(cached, wanted(image)).line == "damaged: not a readable cache file"
    cached.write_bytes(b"\xff" * 100)
    assert check(cached, wanted(image)).line == "damaged: not a readable cache file"
    save_safetensors(cached, {"latents": torch.zeros(1)})
    assert check(cached, wanted(image)).reason == "made by another version of this program"


def test_a_description_that_does_not_match_its_fingerprint_is_damaged(image: Path, cached: Path) -> None:
    header = read_header(cached)
    edited = {**json.loads(header.metadata["ingredients"]), "model": "m2"}
    save_safetensors(cached, {"latents": torch.zeros(1)}, {**header.metadata, "ingredients": json.dumps(edited)})
    assert check(cached, wanted(image, model="m2")).line == "damaged: its description is broken"


@pytest.fixture
def with_flipped_bit(cached: Path) -> Path:
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.write_bytes(data)
    return cached


def test_flipped_bits_are_found_when_the_tensor_is_read(image: Path, with_flipped_bit: Path) -> None:
    assert check(with_flipped_bit, wanted(image)).valid  # the header alone cannot tell
    verdict = check(with_flipped_bit, wanted(image), broken=broken_tensors)
    assert verdict.line == "damaged: the bytes of its tensors are not those that were written"
    with pytest.raises(DamagedCacheError, match="the bytes of latents are not those"):
        read_cache_tensors(with_flipped_bit, ["latents"])
    assert with_flipped_bit.is_file()


def test_training_deletes_a_damaged_file_and_says_so(image: Path, with_flipped_bit: Path) -> None:
    with pytest.raises(DatasetError, match="deleted and will be made again at the next start") as caught:
        load_cache_tensors(with_flipped_bit, ["latents"])
    assert str(with_flipped_bit) in str(caught.value)
    assert check(with_flipped_bit, wanted(image)).kind == "missing"


def test_a_damaged_file_that_cannot_be_deleted_is_left_to_the_user(
    with_flipped_bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("in use")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DatasetError, match="damaged .*: delete it and start again"):
        load_cache_tensors(with_flipped_bit, ["latents"])


def test_what_is_not_damaged_is_not_deleted(cached: Path) -> None:
    with pytest.raises(DatasetError, match="lacks latents_flipped"):
        load_cache_tensors(cached, ["latents_flipped"])
    assert cached.is_file()


@pytest.mark.parametrize(("number", "damaged"), [(errno.EIO, True), (errno.EMFILE, False)])
def test_a_failing_disk_damages_a_file_and_too_many_open_files_do_not(
    cached: Path, monkeypatch: pytest.MonkeyPatch, number: int, damaged: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_file, "read_tensors", fail)
    with pytest.raises(DatasetError, match=os.strerror(number)):
        load_cache_tensors(cached, ["latents"])
    assert cached.is_file() != damaged


def test_a_vanished_file_is_named_when_it_is_read(cached: Path) -> None:
    cached.unlink()
    with pytest.raises(DatasetError, match=r"a\.png\.64x64"):
        read_cache_tensors(cached, ["latents"])


def test_an_empty_tensor_survives(tmp_path: Path) -> None:
    write_cache_file(tmp_path / "x.safetensors", {"rows": torch.empty(0, 4)}, ingredients=INGREDIENTS)
    assert read_cache_tensors(tmp_path / "x.safetensors", ["rows"])["rows"].shape == (0, 4)


def test_a_cache_folder_keeps_equal_names_of_two_folders_apart(tmp_path: Path) -> None:
    paths = [cache_path(tmp_path / folder / "a.png", "64x64.tiny-latents", tmp_path / "cache") for folder in ("one", "two")]
    assert paths[0] != paths[1]
    assert {path.parent for path in paths} == {tmp_path / "cache"}


def test_a_very_long_name_is_shortened_and_stays_unique(tmp_path: Path) -> None:
    long = [cache_path(tmp_path / ("ü" * 120 + f"{n}.png"), "1024x1024.tiny-latents", None) for n in (1, 2)]
    assert long[0] != long[1]
    write_cache_file(long[0], {"latents": torch.zeros(2)}, ingredients=INGREDIENTS)
    assert read_cache_tensors(long[0], ["latents"])["latents"].shape == (2,)


def test_only_dead_processes_left_overs_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    now = time.time()
    ages = {f"a.safetensors.tmp-{dead.pid}": 3600, f"fresh.safetensors.tmp-{dead.pid}": 0, "notes.tmp-1": 1e6,
            f"b.safetensors.tmp-{os.getpid()}": 3600, f"old.safetensors.tmp-{os.getpid()}": 90_000, "c.safetensors": 1e6}  # fmt: skip
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (now - age, now - age))
    clean_left_overs([tmp_path, tmp_path / "absent"])
    left = {path.name for path in tmp_path.iterdir()}
    gone = {f"old.safetensors.tmp-{os.getpid()}"} | ({f"a.safetensors.tmp-{dead.pid}"} if os.name != "nt" else set())
    assert left == set(ages) - gone


def test_the_state_of_a_cache_is_told_without_torch() -> None:
    code = "import sys, library.dataset.latent_cache, library.dataset.text_cache, library.dataset.loader; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
