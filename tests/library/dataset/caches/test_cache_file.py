from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.dataset.caches import cache_file
from library.dataset.caches.cache_file import (
    CacheEntry,
    Verdict,
    Wanted,
    broken_tensors,
    check_header,
    checksum,
    clean_left_overs,
    tensor_bytes,
    tensors_named,
    unreadable,
    write_cache_file,
)
from library.dataset.image_records import SourceHashes
from library.errors import CheckpointError, DatasetError
from library.files.safetensors_file import TensorFile, read_header, save_safetensors

INGREDIENTS = {"arch": "tiny", "model": "m1", "dtype": "bfloat16", "bucket": [64, 64], "crop": [0, 0], "interpolation": ""}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"any bytes do: the cache never decodes")
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "a mask.png"
    path.write_bytes(b"white")
    return path


@pytest.fixture
def cached(image: Path, mask: Path) -> Path:
    path = image.with_name("a.png.64x64.tiny-latents.safetensors")
    tensors = {"latents": torch.arange(6).reshape(2, 3).to(torch.bfloat16), "mask": torch.ones(1, 1)}
    sources = {"image": SourceHashes().identity(image), "mask": SourceHashes().identity(mask)}
    write_cache_file(path, tensors, ingredients=INGREDIENTS, sources=sources)
    return path


def check(path: Path, image: Path, *, mask: Path | str | None = None, **changes: object) -> Verdict:
    sources = {"image": image, **({"mask": mask} if isinstance(mask, Path) else {})}
    ingredients = {**INGREDIENTS, **({"mask": mask} if isinstance(mask, str) else {}), **changes}
    tensors = ("latents",) if mask is None else ("latents", "mask")
    try:
        with TensorFile(path) as file:
            file.tensors()
            wanted = Wanted(ingredients=ingredients, sources=sources, tensors=tensors)
            return check_header(file, wanted, identify=SourceHashes().identity)
    except CheckpointError as error:
        return unreadable(path, error)


def test_what_was_written_is_valid_and_keeps_its_dtype(image: Path, cached: Path, mask: Path) -> None:
    assert check(cached, image).valid
    assert check(cached, image, mask=mask).valid
    with CacheEntry(cached, tensors_named(cached, {"values": "latents"})) as entry:
        assert entry.layout == {"values": (torch.bfloat16, (2, 3))}
        tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
        entry.read_into("values", tensor_bytes(tensor))
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "m2"}, "model changed"),
        ({"dtype": "float32"}, "dtype changed"),
        ({"bucket": [64, 128]}, "size changed"),
        ({"crop": [0, 1]}, "size changed"),
        ({"arch": "other"}, "made for another architecture"),
        ({"interpolation": "area"}, "resize interpolation changed"),
        ({"mask": "alpha"}, "mask changed"),
    ],
)
def test_a_changed_ingredient_is_named(image: Path, cached: Path, change: dict[str, object], reason: str) -> None:
    assert check(cached, image, **change) == Verdict("stale", reason)  # type: ignore[arg-type]


def test_an_image_with_other_bytes_is_stale(image: Path, cached: Path) -> None:
    image.write_bytes(image.read_bytes().swapcase())  # same size
    os.utime(image, ns=(1, 1))
    assert check(cached, image).reason == "image changed"
    image.write_bytes(b"other size")
    assert check(cached, image).reason == "image changed"


def test_a_mask_with_other_bytes_is_stale_only_where_it_is_wanted(image: Path, cached: Path, mask: Path) -> None:
    mask.write_bytes(b"black")
    os.utime(mask, ns=(1, 1))
    assert check(cached, image, mask=mask) == Verdict("stale", "mask changed")
    assert check(cached, image).valid


def test_a_mask_that_was_not_stored_is_asked_for_by_name(image: Path, cached: Path, mask: Path) -> None:
    write_cache_file(
        cached, {"latents": torch.ones(2)}, ingredients=INGREDIENTS, sources={"image": SourceHashes().identity(image)}
    )
    for wanted in (mask, "alpha"):
        assert check(cached, image, mask=wanted) == Verdict("stale", "has no mask")
    assert check(cached, image, mask="alpha", model="m2") == Verdict("stale", "model changed")


def test_a_mask_of_the_alpha_channel_is_not_one_of_a_file(image: Path, cached: Path, mask: Path) -> None:
    identity = {"image": SourceHashes().identity(image)}
    write_cache_file(
        cached, {"latents": torch.ones(2), "mask": torch.ones(1)}, ingredients={**INGREDIENTS, "mask": "alpha"}, sources=identity
    )
    assert check(cached, image, mask="alpha").valid
    assert check(cached, image, mask=mask) == Verdict("stale", "mask changed")


def test_other_bytes_under_the_old_size_and_time_are_seen(image: Path, cached: Path) -> None:
    time_ns = image.stat().st_mtime_ns
    image.write_bytes(image.read_bytes().swapcase())
    os.utime(image, ns=(time_ns, time_ns))
    assert check(cached, image) == Verdict("stale", "image changed")


def test_a_touched_image_stays_valid(image: Path, cached: Path) -> None:
    os.utime(image, ns=(5, 5))
    assert check(cached, image).valid


def test_a_vanished_image_is_named(image: Path, cached: Path) -> None:
    image.unlink()
    with pytest.raises(DatasetError, match=r"a\.png.*moved or deleted"):
        check(cached, image)


def test_an_image_of_another_size_is_not_read(image: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the image was hashed")

    monkeypatch.setattr(SourceHashes, "identity", refuse)
    image.write_bytes(image.read_bytes() + b"more")
    assert check(cached, image) == Verdict("stale", "image changed")


def test_truncated_garbage_and_foreign_files(image: Path, cached: Path) -> None:
    data = cached.read_bytes()
    cached.write_bytes(data[:-3])
    assert check(cached, image).line == "damaged: truncated"
    cached.write_bytes(data[:40])
    assert check(cached, image).line == "damaged: truncated"
    cached.write_bytes(b"")
    assert check(cached, image).line == "damaged: not a readable cache file"
    cached.write_bytes(b"\xff" * 100)
    assert check(cached, image).line == "damaged: not a readable cache file"
    save_safetensors(cached, {"latents": torch.zeros(1)})
    assert check(cached, image).reason == "made by another version of this program"


def test_a_description_that_does_not_match_its_fingerprint_is_damaged(image: Path, cached: Path) -> None:
    header = read_header(cached)
    edited = {**json.loads(header.metadata["ingredients"]), "model": "m2"}
    save_safetensors(cached, {"latents": torch.zeros(1)}, {**header.metadata, "ingredients": json.dumps(edited)})
    assert check(cached, image, model="m2").line == "damaged: its description is broken"
    save_safetensors(cached, {"latents": torch.zeros(1)}, {**header.metadata, "recipe": "0123456789abcdef"})
    assert check(cached, image).line == "damaged: its description is broken"


@pytest.mark.parametrize("count", [0, 3, 257, 258, 2 * 257, 20 * 257 + 5])
def test_every_flipped_bit_and_every_moved_block_changes_the_checksum(count: int) -> None:
    rng = random.Random(count)
    data = bytearray(rng.randbytes(8 * count + count % 8))
    before = checksum(data)
    assert checksum(bytes(data)) == before
    for _ in range(min(len(data), 200)):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        assert checksum(data) != before
        data[place] ^= bit
    if count > 1000:
        assert checksum(data[4096:8192] + data[:4096] + data[8192:]) != before  # two pages of a disk
        assert checksum(data[8:16] + data[:8] + data[16:]) != before
        assert checksum(bytes(4096) + data[4096:]) != before


def test_the_checksum_of_a_tensor_is_that_of_its_bytes() -> None:
    tensor = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    assert checksum(tensor_bytes(tensor.T)) == checksum(struct.pack("<12h", *tensor.T.flatten().tolist()))


def test_the_damaged_tensor_is_found_by_name(tmp_path: Path) -> None:
    path, names = tmp_path / "a.safetensors", ("latents", "latents_flipped")
    tensors = {name: torch.arange(6000, dtype=torch.int32) + place for place, name in enumerate(names)}
    write_cache_file(path, tensors, ingredients={"arch": "tiny"})
    with TensorFile(path) as file:
        assert broken_tensors(file, names) == {}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with TensorFile(path) as file:
        assert broken_tensors(file, names) == {"latents_flipped": cache_file.CHANGED_BYTES}
        assert broken_tensors(file, ["latents"]) == {}
        path.write_bytes(data[:-10])
        assert broken_tensors(file, ["latents_flipped"]) != {}
        file.metadata["checksum latents"] = "other"
        assert broken_tensors(file, ["latents"]) == {"latents": cache_file.CHANGED_BYTES}
        del file.metadata["checksum latents"]
        assert broken_tensors(file, ["latents"]) == {"latents": "its description is broken"}


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
    code = "import sys, library.dataset.caches.latent_cache, library.dataset.caches.text_cache, library.dataset.loader; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4]).returncode == 0


@pytest.mark.parametrize("found", ["latents'", "other"])
def test_a_tensor_under_another_name_is_damage(image: Path, cached: Path, found: str) -> None:
    header = read_header(cached)
    save_safetensors(cached, {found: torch.zeros(1)}, header.metadata)
    assert check(cached, image).line == "damaged: its description is broken"
