"""Whatever happens to cache files, images and captions between two runs: it is noticed, named and mended."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.caches.cache_file import CacheState
from library.dataset.items import TrainingSet
from library.errors import DatasetError, OutputError
from tests.library.dataset.caches.cache_parts import (
    TEXT_RECIPE,
    TinyTextEncoder,
    TinyVae,
    changed,
    draw,
    latent_cache,
    make_item,
    make_training_set,
    settle,
    text_cache,
    watch_hashing,
    with_masks,
)

COUNT = 60  # images: 120 cache files and the prompts
DAMAGED = 100
CTIME_IS_CHANGE = pytest.mark.skipif(os.name == "nt", reason="there ctime is the time of creation")


def many(folder: Path, count: int = COUNT) -> TrainingSet:
    small = with_masks(make_training_set(folder, 1))
    items = []
    for index in range(count):
        path = folder / f"{index:03}.png"
        draw(path, (64, 64), seed=index)
        mask = small.items[0].mask_path if index % 3 == 0 else None
        items.append(make_item(path, index, small.items[0].subset, mask_path=mask))
    return replace(small, items=tuple(items))


def start(training_set: TrainingSet, **settings: Any) -> tuple[CacheState, CacheState]:
    """What the next start finds; its notes are saved."""
    latents = latent_cache(training_set, **{name: value for name, value in settings.items() if name != "recipe"})
    texts = text_cache(training_set, **{name: value for name, value in settings.items() if name == "recipe"})
    return latents.state(refresh=True), texts.state(refresh=True)


def fill(training_set: TrainingSet) -> None:
    latent_cache(training_set).fill(TinyVae(), batch_size=4, workers=1, progress=False)
    text_cache(training_set).fill(TinyTextEncoder(), batch_size=4, progress=False)


def cache_bytes(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def damages() -> dict[str, Callable[[bytes, random.Random], bytes]]:
    def overwrite(data: bytes, rng: random.Random, start: int, end: int) -> bytes:
        place = rng.randrange(start, end)
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]

    def header_end(data: bytes) -> int:
        return 8 + int.from_bytes(data[:8], "little")

    def zeroed(data: bytes, rng: random.Random) -> bytes:
        begin = rng.randrange(len(data) - 64)
        return data[:begin] + bytes(64) + data[begin + 64 :]

    return {
        "truncated": lambda data, rng: data[: rng.randrange(len(data))],
        "longer header length": lambda data, rng: (header_end(data) + rng.randrange(1, 9**9)).to_bytes(8, "little") + data[8:],
        "zeroed": zeroed,
        "all zeros": lambda data, rng: bytes(len(data)),
        "bit of the header": lambda data, rng: overwrite(data, rng, 8, header_end(data)),
        "bit of the data": lambda data, rng: overwrite(data, rng, header_end(data), len(data)),
        "empty": lambda data, rng: b"",
        "text": lambda data, rng: b"<html>404: not found</html>\n" * 20,
        "noise": lambda data, rng: rng.randbytes(len(data)),
        "another file": lambda data, rng: data[: header_end(data)] + rng.randbytes(len(data) - header_end(data)),
    }


@CTIME_IS_CHANGE
@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_hundred_damaged_files_are_all_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_time: bool, known: bool
) -> None:
    settle(monkeypatch)
    training_set = many(tmp_path)
    fill(training_set)
    assert all(state.is_complete for state in start(training_set))
    if not known:
        for notes in tmp_path.glob("atelier.*.json"):
            notes.unlink()
    whole = cache_bytes(tmp_path)
    rng = random.Random(1)
    victims = rng.sample(sorted(path for path in whole if "prompts" not in path.name), DAMAGED)
    kinds = list(damages().items())
    time.sleep(0.02)  # past the clock's step
    for number, path in enumerate(victims):
        times = path.stat()
        name, damage = kinds[number % len(kinds)]
        path.write_bytes(damage(whole[path], rng))
        assert path.read_bytes() != whole[path], name
        if keep_time:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    states = start(training_set)
    found = {path for state in states for path, _ in state.stale}
    harmless = {path for path in set(victims) - found if same_values(path, whole[path])}
    assert found | harmless == set(victims)  # a flipped bit in a note on the image's time, for example, changes nothing
    assert len(harmless) <= 3
    fill(training_set)
    assert {path: data for path, data in cache_bytes(tmp_path).items() if path not in harmless} == {
        path: data for path, data in whole.items() if path not in harmless
    }
    assert all(state.is_complete for state in start(training_set))


def same_values(path: Path, whole: bytes) -> bool:
    """Whether a file still holds the tensors of ``whole`` and says so."""
    from safetensors.torch import load

    now, before = load(path.read_bytes()), load(whole)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@CTIME_IS_CHANGE
def test_damage_of_a_cache_too_large_to_be_read_at_each_start_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    training_set = many(tmp_path, 6)
    fill(training_set)
    start(training_set)
    monkeypatch.setattr("library.dataset.caches.check.FULL_CHECK_BYTES", 0)
    victim = next(tmp_path.glob("003.png.*latents*"))
    times = victim.stat()
    time.sleep(0.02)
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xee")
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    latents, _ = start(training_set)
    assert [path for path, _ in latents.stale] == [victim]


def test_a_second_start_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    training_set = many(tmp_path, 6)
    fill(training_set)
    hashed = watch_hashing(monkeypatch)

    def refuse(*_: object) -> None:
        raise AssertionError("a cache file was opened")

    monkeypatch.setattr("library.dataset.caches.latent_cache.TensorFile", refuse)
    monkeypatch.setattr("library.dataset.caches.text_files.TensorFile", refuse)
    latents, texts = start(training_set)
    assert (latents.valid, texts.valid) == (6, 7)
    assert hashed == []


@CTIME_IS_CHANGE
@pytest.mark.parametrize("known", [True, False])
def test_changes_of_the_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    settle(monkeypatch)
    training_set = many(tmp_path, 6)
    fill(training_set)
    start(training_set)
    if not known:
        for notes in tmp_path.glob("atelier.*.json"):
            notes.unlink()
    draw(training_set.items[1].path, (64, 64), seed=77)
    latents, texts = start(training_set)
    assert [reason for _, reason in latents.stale] == ["image changed"]
    assert texts.is_complete
    latents, texts = start(changed(training_set, 2, caption="edited"))
    assert [reason for _, reason in texts.stale] == ["caption changed"]
    latents, _ = start(changed(training_set, 3, resized_wh=(80, 64), crop_left_top=(8, 0)))
    assert [reason for _, reason in latents.stale] == ["image changed", "size changed"]
    latents, _ = start(training_set, vae_fingerprint="v2")
    assert {reason for _, reason in latents.stale} == {"model changed"}
    _, texts = start(training_set, recipe=replace(TEXT_RECIPE, encoder_fingerprint="e2"))
    assert {reason for _, reason in texts.stale} == {"model changed"}


@CTIME_IS_CHANGE
@pytest.mark.parametrize("source", ["image", "mask"])
def test_pixels_changed_under_the_old_size_and_time_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    settle(monkeypatch)
    training_set = many(tmp_path, 2)
    fill(training_set)
    start(training_set)
    path = training_set.items[0].path if source == "image" else training_set.items[0].mask_path
    assert path is not None
    times, data = path.stat(), bytearray(path.read_bytes())
    time.sleep(0.02)
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    latents, _ = start(training_set)
    assert [reason for _, reason in latents.stale] == [f"{source} changed"]


@CTIME_IS_CHANGE
def test_files_with_new_times_and_the_old_bytes_stay_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    training_set = many(tmp_path, 4)
    fill(training_set)
    start(training_set)
    time.sleep(0.02)
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o640)
    hashed = watch_hashing(monkeypatch)
    assert all(state.is_complete for state in start(training_set))
    assert set(hashed) == {path for item in training_set.items for path in (item.path, item.mask_path) if path}
    hashed.clear()
    assert all(state.is_complete for state in start(training_set))
    assert hashed == []


def test_a_copied_cache_is_valid_without_its_notes(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    fill(many(here, 4))
    shutil.copytree(here, there, copy_function=shutil.copy2)
    copied = many_again(there, 4)
    assert all(state.is_complete for state in start(copied))


def many_again(folder: Path, count: int) -> TrainingSet:
    """The set of ``many`` where the images are there already."""
    small = with_masks(make_training_set(folder, 1))
    masks = [small.items[0].mask_path if index % 3 == 0 else None for index in range(count)]
    items = [make_item(folder / f"{i:03}.png", i, small.items[0].subset, mask_path=mask) for i, mask in enumerate(masks)]
    return replace(small, items=tuple(items))


def test_what_the_start_did_not_see_is_not_trained_on(tmp_path: Path) -> None:
    training_set = many(tmp_path, 4)
    fill(training_set)
    latents, texts = latent_cache(training_set), text_cache(training_set)
    assert latents.state().is_complete
    assert texts.state().is_complete
    rng = random.Random(2)
    for path, data in cache_bytes(tmp_path).items():
        end = 8 + int.from_bytes(data[:8], "little")
        place = rng.randrange(end, len(data)) if len(data) > end else None
        if place is not None:
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    for item in training_set.items:
        with pytest.raises(DatasetError, match="made again at the next start"):
            texts.load(item)
        with pytest.raises(DatasetError, match="made again at the next start"):
            latents.load(item)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with pictures on a file system that takes no writes; permissions do not keep root out."""
    folder = tmp_path / "pictures"
    make_training_set(folder)
    if shutil.which("mount") is None or os.name == "nt":
        pytest.skip("no mount here")
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_folder_asks_for_a_cache_folder_and_works_with_one(
    read_only: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training_set = make_training_set(read_only)
    with pytest.raises(OutputError, match="no permission.*--cache_dir"):
        latent_cache(training_set).fill(TinyVae(), batch_size=2, workers=1, progress=False)
    with pytest.raises(OutputError, match="no permission.*--cache_dir"):
        text_cache(training_set).fill(TinyTextEncoder(), batch_size=2, progress=False)
    where = {"cache_dir": tmp_path / "cache"}
    with caplog.at_level(logging.INFO):
        latent_cache(training_set, **where).fill(TinyVae(), batch_size=2, workers=1, progress=False)
    text_cache(training_set, **where).fill(TinyTextEncoder(), batch_size=2, progress=False)
    assert str(tmp_path / "cache") in caplog.text
    assert latent_cache(training_set, **where).state(refresh=True).is_complete
    assert text_cache(training_set, **where).state(refresh=True).is_complete


def test_full_caches_in_a_read_only_folder_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = many(tmp_path, 3)
    fill(training_set)
    for notes in tmp_path.glob("atelier.*.json"):
        notes.unlink()

    def refuse(*_: object) -> None:
        raise OutputError("read-only")

    monkeypatch.setattr("library.dataset.caches.notes.write_atomically", refuse)
    for _ in range(2):
        assert all(state.is_complete for state in start(training_set))
    assert not list(tmp_path.glob("atelier.*.json"))
