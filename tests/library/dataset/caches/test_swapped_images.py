"""From scan to cache: images that became others under the old names, sizes and times."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, SubsetSettings, TrainingSet
from library.dataset.scan import scan
from tests.library.dataset.caches.cache_parts import TinyVae, latent_cache, settle, watch_hashing

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there ctime is the time of creation")
NAMES = ("a.bmp", "b.bmp", "c.bmp")


@pytest.fixture(params=["notes", "no notes"])
def folder(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of one size in pixels and bytes and of one time, with their masks, and their cache: filled, and checked or not."""
    if request.param == "notes":
        settle(monkeypatch)
    for seed, name in enumerate(NAMES):
        draw(tmp_path / "images" / name, seed)
        draw(tmp_path / "masks" / name, 100 + seed)
    fill(tmp_path)
    return tmp_path


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    os.utime(path, ns=(10**18, 10**18))


def start(folder: Path) -> TrainingSet:
    """What a new process finds."""
    settings = SubsetSettings(place="here", image_dir=folder / "images", conditioning_data_dir=folder / "masks")
    return scan((DatasetSettings(place="here", resolution_wh=(64, 64), subsets=(settings,)),), records=ImageRecords())


def fill(folder: Path) -> list[torch.Tensor]:
    """Fills the cache; each image's latents."""
    training_set = start(folder)
    cache = latent_cache(training_set)
    cache.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    return [cache.load(item) for item in training_set.items]


def stale(folder: Path) -> dict[str, str]:
    """The next start's verdicts, by image."""
    state = latent_cache(start(folder)).state(refresh=True)
    assert state.missing == 0
    return {path.name.partition(".64x64")[0]: reason for path, reason in state.stale}


@pytest.mark.parametrize(("kind", "reason"), [("images", "image changed"), ("masks", "mask changed")])
def test_two_files_that_swap_their_names(kind: str, reason: str, folder: Path) -> None:
    before = fill(folder)
    time.sleep(0.02)  # past the clock's step
    first, second = (folder / kind / name for name in NAMES[:2])
    first.rename(folder / "held")
    second.rename(first)
    (folder / "held").rename(second)
    assert stale(folder) == {"a.bmp": reason, "b.bmp": reason}
    after = fill(folder)
    if kind == "images":
        assert torch.equal(after[0], before[1])
        assert torch.equal(after[1], before[0])
    assert stale(folder) == {}


@pytest.mark.parametrize(("kind", "reason"), [("images", "image changed"), ("masks", "mask changed")])
def test_a_file_that_is_overwritten_is_made_again_once(kind: str, reason: str, folder: Path) -> None:
    time.sleep(0.02)  # past the clock's step
    draw(folder / kind / "b.bmp", 50)
    assert stale(folder) == {"b.bmp": reason}
    fill(folder)
    assert stale(folder) == {}
    assert stale(folder) == {}


def test_what_was_not_touched_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = watch_hashing(monkeypatch)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read") if self.suffix == ".bmp" else read(self))
    assert stale(folder) == {}
    assert hashed == []


def read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read()
