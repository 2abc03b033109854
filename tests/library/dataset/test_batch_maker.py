"""A batch from caches is what its images are one by one, and its files are read once."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset import batch_maker
from library.dataset.batch import Batch
from library.dataset.batch_maker import BatchMaker
from library.dataset.caches import text_cache as text_cache_module
from library.dataset.captions import caption_variant
from library.dataset.items import Item, TrainingSet
from library.dataset.showing import FixedShowing
from library.errors import DatasetError
from library.files.safetensors_file import TensorFile
from tests.library.dataset.caches.cache_parts import (
    TinyTextEncoder,
    TinyVae,
    latent_cache,
    make_training_set,
    mask_of,
    text_cache,
    with_masks,
)


def some_masked(folder: Path) -> TrainingSet:
    """Five images of two sizes, of which a.png and d.png have masks."""
    training_set = with_masks(make_training_set(folder, flip_aug=True))
    items = [item if item.index % 3 == 0 else replace(item, mask_path=None) for item in training_set.items]
    return replace(training_set, items=tuple(items))


def filled_maker(training_set: TrainingSet, *, on_disk: bool = True) -> BatchMaker:
    latents, texts = latent_cache(training_set, on_disk=on_disk), text_cache(training_set, on_disk=on_disk)
    latents.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    texts.fill(TinyTextEncoder(), batch_size=2, progress=False)
    return BatchMaker(datasets=training_set.datasets, latent_cache=latents, text_cache=texts)


def showings(training_set: TrainingSet) -> list[FixedShowing]:
    """Of a.png, c.png and e.png, which have one size."""
    a, _, c, _, e = training_set.items
    return [
        FixedShowing(item=a, is_flipped=True),
        FixedShowing(item=c, is_caption_dropped=True),
        FixedShowing(item=a),
        FixedShowing(item=e, is_flipped=True),
    ]


def made(maker: BatchMaker, shown: list[FixedShowing]) -> Batch:
    return maker.batch(shown, positions=tuple(range(len(shown))), global_size=len(shown))


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_batch_is_its_images_one_by_one(tmp_path: Path, on_disk: bool) -> None:
    training_set = some_masked(tmp_path)
    maker = filled_maker(training_set, on_disk=on_disk)
    latents, texts = maker.latent_cache, maker.text_cache
    assert latents is not None
    assert texts is not None
    shown = showings(training_set)
    for _ in range(3):  # from files, and from what was kept of them
        batch = made(maker, shown)
        alone = [latents.load(one.item, flipped=one.is_flipped) for one in shown]
        assert batch.latents is not None
        assert batch.mask is not None
        assert torch.equal(batch.latents, torch.stack(alone))
        masks = [mask_of(latents, one.item, flipped=one.is_flipped) for one in shown]
        assert [mask is None for mask in masks] == [False, True, False, True]
        expected = [torch.ones(8, 8) if mask is None else mask for mask in masks]
        assert torch.equal(batch.mask, torch.stack(expected)[:, None])
        captions = ["" if one.is_caption_dropped else one.item.caption for one in shown]
        assert batch.captions == tuple(captions)
        conditioning: Any = batch.text
        text: Any = type(conditioning).stack([TinyTextEncoder.one(caption) for caption in captions])
        assert torch.equal(conditioning.embeds, text.embeds)
        assert torch.equal(conditioning.mask, text.mask)
    assert made(maker, shown[1:2]).mask is None


def test_each_file_is_opened_once_and_each_caption_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = some_masked(tmp_path)
    maker = filled_maker(training_set)
    opened: list[str] = []
    rendered: list[str] = []
    open_file = TensorFile.__init__

    def count_open(self: TensorFile, path: str) -> None:
        opened.append(Path(path).name)
        open_file(self, path)

    def count_rendered(item: Item, variant: int) -> str:
        rendered.append(item.path.name)
        return caption_variant(item, variant)

    monkeypatch.setattr(TensorFile, "__init__", count_open)
    monkeypatch.setattr(text_cache_module, "caption_variant", count_rendered)
    made(maker, showings(training_set)[1:])
    latents, texts = "png.64x64.tiny-latents.safetensors", "png.tiny-text.safetensors"
    assert opened == [
        *(f"{letter}.{latents}" for letter in ("blaue Blüte", "a", "e")),
        "atelier.tiny-prompts.safetensors", *(f"{letter}.{texts}" for letter in ("a", "e")),
    ]  # fmt: skip
    assert rendered == ["a.png", "e.png"]


def test_the_image_of_several_that_cannot_be_made_ready_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = some_masked(tmp_path)
    maker = filled_maker(training_set, on_disk=False)
    assert maker.latent_cache is not None
    entries = maker.latent_cache._memory
    monkeypatch.setattr(
        maker.latent_cache, "_memory", {path: one for path, one in entries.items() if "/e.png" not in Path(path).as_posix()}
    )
    with pytest.raises(RuntimeError, match=r"^\S*[\\/]e\.png could not be made ready for training") as caught:
        made(maker, showings(training_set))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_damaged_file_of_several_is_named(tmp_path: Path) -> None:
    training_set = some_masked(tmp_path)
    maker = filled_maker(training_set)
    path = tmp_path / "e.png.64x64.tiny-latents.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"e\.png\.64x64.*damaged \(truncated\)"):
        made(maker, showings(training_set))


def test_threads_take_turns_but_do_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = some_masked(tmp_path)
    maker = filled_maker(training_set)
    shown = showings(training_set)
    slow, go_on = threading.Event(), threading.Event()
    open_file = TensorFile.__init__

    def stall(self: TensorFile, path: str) -> None:
        if threading.current_thread().name == "slow":
            slow.set()
            assert go_on.wait(20)
        open_file(self, path)

    monkeypatch.setattr(TensorFile, "__init__", stall)
    thread = threading.Thread(target=made, args=(maker, shown), name="slow")
    thread.start()
    assert slow.wait(20)
    made(maker, shown)  # while the other waits
    monkeypatch.setattr(batch_maker, "TURN_S", 20)
    waiting = threading.Thread(target=made, args=(maker, shown))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # it is the other's turn
    go_on.set()
    for one in (thread, waiting):
        one.join(20)
        assert not one.is_alive()
