from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.dataset.caches.latent_cache import LatentCache
from library.dataset.images import load_picture
from library.errors import DatasetError, OutputError
from library.files.safetensors_file import read_header
from tests.library.dataset.caches.cache_parts import (
    NAMES,
    TinyVae,
    all_files,
    changed,
    draw,
    latent_cache,
    make_training_set,
    settle,
    watch_hashing,
)

REPOSITORY = Path(__file__).parents[4]
NOTES = "atelier.tiny-latents.json"


def fill(cache: LatentCache, vae: Any = None, **settings: Any) -> TinyVae:
    vae = vae or TinyVae()
    cache.fill(vae, **{"batch_size": 2, "workers": 1, "progress": False, **settings})
    return vae


def all_latents(cache: LatentCache, training_set: Any, *, flipped: bool = False) -> list[Tensor]:
    return [cache.load(item, flipped=flipped) for item in training_set.items]


def cache_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("on_disk", [True, False])
def test_filled_latents_are_those_of_the_encoder(tmp_path: Path, on_disk: bool) -> None:
    training_set = make_training_set(tmp_path)
    cache = latent_cache(training_set, on_disk=on_disk)
    assert (cache.state().total, cache.state().missing, cache.state().is_complete) == (5, 5, False)
    vae = fill(cache)
    assert cache.state().is_complete
    assert cache.state().bytes_needed == 0
    assert all(batch.shape[0] <= 2 and batch.dtype == torch.float32 for batch in vae.batches)
    for item in training_set.items:
        pixels = torch.tensor(load_picture(item).pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = cache.load(item, flipped=False)
        assert latents.dtype == torch.bfloat16
        assert torch.equal(latents, TinyVae()(pixels)[0].to(torch.bfloat16))


def test_a_warm_start_encodes_nothing_and_loads_the_same(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    cold = latent_cache(training_set)
    fill(cold)
    warm = latent_cache(make_training_set(tmp_path))
    assert fill(warm).batches == []
    for one, other in zip(all_latents(cold, training_set), all_latents(warm, training_set), strict=True):
        assert torch.equal(one, other)


def test_memory_and_disk_hold_the_same(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True)
    caches = [latent_cache(training_set, on_disk=on_disk) for on_disk in (True, False)]
    for cache in caches:
        fill(cache)
    for flipped in (False, True):
        disk, memory = (all_latents(cache, training_set, flipped=flipped) for cache in caches)
        assert all(map(torch.equal, disk, memory))
    assert not list(tmp_path.glob("*.tmp-*"))


def test_flipped_latents_are_those_of_the_mirrored_image(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 2, flip_aug=True)
    cache = latent_cache(training_set)
    fill(cache)
    item = training_set.items[1]
    mirrored = torch.from_numpy(load_picture(item, flipped=True).pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.equal(cache.load(item, flipped=True), TinyVae()(mirrored)[0].to(torch.bfloat16))
    assert not torch.equal(cache.load(item, flipped=True), cache.load(item, flipped=False).flip(-1))


def test_switching_flip_on_makes_files_again_and_off_keeps_them(tmp_path: Path) -> None:
    fill(latent_cache(make_training_set(tmp_path)))
    with_flip = latent_cache(make_training_set(tmp_path, flip_aug=True))
    assert {reason for _, reason in with_flip.state().stale} == {"has no flipped latents"}
    before = all_latents(latent_cache(make_training_set(tmp_path)), make_training_set(tmp_path))
    fill(with_flip)
    assert all(map(torch.equal, before, all_latents(with_flip, make_training_set(tmp_path))))
    assert latent_cache(make_training_set(tmp_path)).state().is_complete


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vae_fingerprint": "v2"}, "model changed"),
        ({"dtype": "float32"}, "dtype changed"),
    ],
)
def test_another_recipe_makes_every_file_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, str], reason: str
) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    cache = latent_cache(training_set, **change)
    assert [reason for _, reason in cache.state().stale] == [reason] * 5
    with caplog.at_level(logging.INFO):
        fill(cache)
    lines = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert len(lines) == 1
    assert "5 made again" in lines[0]
    assert latent_cache(training_set, **change).state().is_complete


def test_a_changed_image_is_made_again_alone(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    files = cache_bytes(tmp_path)
    draw(training_set.items[2].path, (64, 64), seed=99)
    cache = latent_cache(training_set)
    assert cache.state().stale == ((tmp_path / "blaue Blüte.png.64x64.tiny-latents.safetensors", "image changed"),)
    fill(cache)
    now = cache_bytes(tmp_path)
    assert [name for name in now if now[name] != files[name]] == ["blaue Blüte.png.64x64.tiny-latents.safetensors"]


def test_a_touched_image_is_hashed_once_more_and_then_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    settle(monkeypatch)
    assert latent_cache(training_set).state(refresh=True).is_complete
    os.utime(training_set.items[0].path, ns=(7, 7))
    before = all_files(tmp_path)
    hashed = watch_hashing(monkeypatch)
    assert latent_cache(training_set).state().is_complete
    assert all_files(tmp_path) == before  # a dry run writes nothing
    assert latent_cache(training_set).state(refresh=True).is_complete
    assert hashed == [training_set.items[0].path] * 2
    again = latent_cache(training_set)
    assert again.state().is_complete
    assert fill(again).batches == []
    assert len(hashed) == 2


def test_another_crop_is_another_size(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    other = changed(training_set, 0, resized_wh=(66, 64), crop_left_top=(1, 0))
    assert [reason for _, reason in latent_cache(other).state().stale] == ["size changed"]


def test_one_image_in_two_crops_has_two_files(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 2)
    twice = replace(training_set.items[0], index=2, resized_wh=(68, 68), crop_left_top=(2, 2))
    same = replace(training_set.items[0], index=3)
    training_set = replace(training_set, items=(*training_set.items, twice, same))
    cache = latent_cache(training_set)
    fill(cache)
    assert cache.state().total == 3
    loaded = all_latents(cache, training_set)
    assert not torch.equal(loaded[0], loaded[2])
    assert torch.equal(loaded[0], loaded[3])
    assert latent_cache(training_set).state().is_complete


def test_a_truncated_file_is_made_again_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    whole = cache_bytes(tmp_path)
    victim = tmp_path / "a.png.64x64.tiny-latents.safetensors"
    victim.write_bytes(whole[victim.name][:-10])
    with caplog.at_level(logging.INFO):
        fill(latent_cache(training_set))
    lines = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert lines == [f"latent cache: 1 made again, damaged: truncated ({victim})"]
    assert cache_bytes(tmp_path) == whole


def test_a_file_damaged_during_training_is_named(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    cache = latent_cache(training_set)
    fill(cache)
    victim = tmp_path / "a.png.64x64.tiny-latents.safetensors"
    whole = victim.read_bytes()
    for damaged in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1])):
        victim.write_bytes(damaged)
        with pytest.raises(DatasetError, match="deleted and will be made again at the next start") as caught:
            cache.load(training_set.items[0], flipped=False)
        assert str(victim) in str(caught.value)
        again = latent_cache(training_set)
        assert again.state().missing == 1
        fill(again)
        assert victim.read_bytes() == whole


def test_damaged_latents_are_found_at_the_start_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True)
    fill(latent_cache(training_set))
    whole = cache_bytes(tmp_path)
    victim = tmp_path / "a.png.64x64.tiny-latents.safetensors"
    data = bytearray(whole[victim.name])
    data[-1] ^= 1
    victim.write_bytes(data)
    assert latent_cache(training_set, skip_check=True).state().is_complete
    cache = latent_cache(training_set)
    reason = "damaged: the bytes of its tensors are not those that were written"
    assert cache.state().stale == ((victim, reason),)
    with caplog.at_level(logging.INFO):
        fill(cache)
    lines = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert lines == [f"latent cache: 1 made again, {reason} ({victim})"]
    assert cache_bytes(tmp_path) == whole


def test_damage_that_the_start_did_not_look_for_is_found_by_training(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    victim = tmp_path / "a.png.64x64.tiny-latents.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    (tmp_path / NOTES).unlink(missing_ok=True)
    cache = latent_cache(training_set)
    cache.check.full_bytes = 0  # as if the cache were very large
    assert cache.state().is_complete
    with pytest.raises(DatasetError, match="at the next start"):
        cache.load(training_set.items[0])


def test_skipping_the_check_takes_any_file(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set))
    assert latent_cache(training_set, vae_fingerprint="v2", skip_check=True).state().is_complete
    assert not latent_cache(training_set, vae_fingerprint="v2").state().is_complete


def test_a_cache_folder_is_made_and_used(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path / "pictures")
    cache = latent_cache(training_set, cache_dir=tmp_path / "new" / "cache")
    fill(cache)
    assert len(list((tmp_path / "new" / "cache").glob("*.64x64.tiny-latents.safetensors"))) == 3
    assert not list((tmp_path / "pictures").glob("*.safetensors"))
    assert latent_cache(training_set, cache_dir=tmp_path / "new" / "cache").state().is_complete


@pytest.mark.parametrize("on_disk", [True, False])
def test_latents_that_are_not_finite_stop_with_the_image(tmp_path: Path, on_disk: bool) -> None:
    training_set = make_training_set(tmp_path)

    def broken(pixels: Tensor, seeds: object) -> Tensor:
        latents = TinyVae()(pixels)
        if pixels.shape[-1] == 96:
            latents[-1, 0, 0, 0] = float("nan")
        return latents

    cache = latent_cache(training_set, on_disk=on_disk)
    with pytest.raises(DatasetError, match=r"d\.png") as caught:
        fill(cache, broken)
    assert len(caught.value.problems) == 1
    if on_disk:  # what was good stays
        assert latent_cache(training_set).state().valid == 3


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    training_set.items[3].path.write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"d\.png"):
        fill(latent_cache(training_set))


def test_interrupted_by_the_user_what_is_written_stays(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    vae = TinyVae()

    def interrupted(pixels: Tensor, seeds: object) -> Tensor:
        if len(vae.batches) == 2:
            raise KeyboardInterrupt
        return vae(pixels)

    with pytest.raises(KeyboardInterrupt):
        fill(latent_cache(training_set), interrupted)
    assert latent_cache(training_set).state().valid == 3  # groups (0, 2) and (4)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("seconds", [0.05, 0.25])
def test_a_killed_fill_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path, seconds: float) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    training_set = make_training_set(straight, len(NAMES), flip_aug=True)
    shutil.copytree(straight, killed, copy_function=shutil.copy2)
    fill(latent_cache(training_set))
    process = start_fill(killed, delay_s=0.1)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(killed.glob("*.safetensors"))) < len(NAMES)
    fill(latent_cache(make_training_set(killed, len(NAMES), flip_aug=True)))
    assert len(cache_bytes(straight)) == len(NAMES)
    assert cache_bytes(killed) == cache_bytes(straight)


def test_two_processes_fill_their_shares_and_read_all(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    training_set = make_training_set(together, len(NAMES), flip_aug=True)
    shutil.copytree(together, alone, copy_function=shutil.copy2)
    processes = [start_fill(together, delay_s=0, rank=rank, processes=2) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    fill(latent_cache(make_training_set(alone, len(NAMES), flip_aug=True)))
    assert cache_bytes(together) == cache_bytes(alone)
    assert len(all_latents(latent_cache(training_set), training_set, flipped=True)) == len(NAMES)


def test_in_memory_two_processes_share_through_gather(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    shares: list[Any] = []
    other = latent_cache(training_set, on_disk=False)
    vae = fill(other, rank=1, processes=2, gather=lambda value: shares.append(value) or [value])
    cache = latent_cache(training_set, on_disk=False)
    answers = iter(shares)
    vae_0 = fill(cache, rank=0, processes=2, gather=lambda value: [value, next(answers)])
    assert len(vae.batches) + len(vae_0.batches) == 3
    whole = latent_cache(training_set, on_disk=False)
    fill(whole)
    assert all(map(torch.equal, all_latents(cache, training_set), all_latents(whole, training_set)))


def test_groups_stay_the_same_when_a_part_is_missing(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    first = fill(latent_cache(training_set))
    (tmp_path / "a.png.64x64.tiny-latents.safetensors").unlink()
    again = fill(latent_cache(training_set))
    assert len(again.batches) == 1
    assert any(torch.equal(again.batches[0], batch) for batch in first.batches)


def test_left_overs_of_a_dead_process_are_cleaned(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    left_over = tmp_path / "a.png.64x64.tiny-latents.safetensors.tmp-99999999"
    left_over.write_bytes(b"half")
    os.utime(left_over, (1, 1))
    fill(latent_cache(training_set))
    assert not left_over.exists()


def test_a_full_disk_says_how_much_is_missing_and_keeps_what_is_done(small_disk: Path, tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    for item in training_set.items:  # 256 KiB of latents for each
        Image.fromarray(np.zeros((2048, 1024, 3), np.uint8)).save(item.path)
    sizes = {"size_wh": (1024, 2048), "bucket_wh": (1024, 2048), "resized_wh": (1024, 2048)}
    training_set = replace(training_set, items=tuple(replace(item, **sizes) for item in training_set.items))
    with pytest.raises(OutputError, match="the disk is full") as caught:
        fill(latent_cache(training_set, cache_dir=small_disk), batch_size=1)
    assert "--cache_dir" in str(caught.value)
    assert "stay valid; the other" in str(caught.value)
    state = latent_cache(training_set, cache_dir=small_disk).state()
    assert 0 < state.valid < 5
    assert f"{state.valid} of 5 latents are cached" in str(caught.value)
    assert not state.stale
    assert not list(small_disk.glob("*.tmp-*"))


def test_a_file_that_cannot_be_written_points_to_the_cache_folder(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    (tmp_path / "a.png.64x64.tiny-latents.safetensors").mkdir()
    with pytest.raises(OutputError, match="--cache_dir") as caught:
        fill(latent_cache(training_set))
    assert "a.png.64x64" in str(caught.value)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    with pytest.raises(DatasetError, match=r"cannot create the cache folder .*a\.png"):
        fill(latent_cache(training_set, cache_dir=training_set.items[0].path))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB; needs root on Linux."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_header_is_small_and_readable(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    fill(latent_cache(training_set))
    header = read_header(next(tmp_path.glob("*.safetensors")))
    assert header.tensors["latents"].dtype == "BF16"
    assert header.tensors["latents"].shape == (4, 8, 8)
    assert set(header.metadata) == {"format", "fingerprint", "ingredients", "recipe", "sources", "checksum latents"}


def start_fill(folder: Path, *, delay_s: float, rank: int = 0, processes: int = 1) -> subprocess.Popen[str]:
    arguments = [str(folder), "latents", str(rank), str(processes), str(delay_s)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.library.dataset.caches.cache_parts", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "filling\n"
    return process


def test_what_an_encoder_draws_depends_on_the_file_and_its_size_alone(tmp_path):
    """Not on the group that is encoded together, nor on which other files there are: cached and live latents are the same."""
    together, alone = TinyVae(), TinyVae()
    training_set = make_training_set(tmp_path)
    fill(latent_cache(training_set, on_disk=False), together, batch_size=3)
    fill(latent_cache(training_set, on_disk=False), alone, batch_size=1)
    assert (
        sorted(set(together.seeds)) == sorted(set(alone.seeds)) == sorted({item.latent_seed for item in training_set.all_items})
    )
    moved = replace(training_set.items[0], path=tmp_path / "elsewhere" / training_set.items[0].path.name)
    assert moved.latent_seed == training_set.items[0].latent_seed
    assert replace(moved, bucket_wh=(8, 8)).latent_seed != moved.latent_seed
