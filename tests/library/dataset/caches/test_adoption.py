"""Entries of another program become ordinary ones, or are refused with a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.dataset.caches.adoption import Adoption, misfit
from library.dataset.items import Item
from library.errors import OutputError
from tests.library.dataset.caches.cache_parts import (
    TinyConditioning,
    TinyTextEncoder,
    TinyVae,
    changed,
    latent_cache,
    make_training_set,
    mask_of,
    text_cache,
    with_masks,
)


def foreign_latents(item: Item, names: tuple[str, ...]) -> dict[str, Tensor] | str:
    width, height = item.bucket_wh
    return {name: torch.full((4, height // 8, width // 8), item.index + 0.5 * place) for place, name in enumerate(names)}


def foreign_text(item: Item, text: str) -> dict[str, Tensor]:
    return {"embeds": torch.full((3, 2), float(item.index)), "mask": torch.ones(3, dtype=torch.bool)}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "taken over" in record.getMessage()]


@pytest.mark.parametrize("on_disk", [True, False])
def test_foreign_latents_become_entries_and_the_rest_is_encoded(
    tmp_path: Path, on_disk: bool, caplog: pytest.LogCaptureFixture
) -> None:
    training_set = make_training_set(tmp_path, flip_aug=True)
    reasons = {1: "older than the image", 3: "older than the image", 4: ""}
    cache = latent_cache(training_set, on_disk=on_disk)
    with caplog.at_level(logging.INFO):
        cache.adopt(lambda item, names: reasons.get(item.index, foreign_latents(item, names)), progress=False)
    assert lines(caplog) == [f"latent cache: 2 taken over, 2 not: 2 older than the image ({tmp_path / 'b.PNG'})"]
    assert cache.state().valid == 2
    assert cache.load(training_set.items[2]).dtype == torch.bfloat16
    assert cache.load(training_set.items[2], flipped=True).unique().tolist() == [2.5]
    vae = TinyVae()
    cache.fill(vae, batch_size=1, workers=1, progress=False)
    assert len(vae.batches) == 6  # three images and their mirrored ones
    assert cache.load(training_set.items[2]).unique().tolist() == [2]
    if on_disk:
        assert latent_cache(training_set).state().is_complete


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found: {**found, "latents": found["latents"][:, :-1]}, "with latents of another shape"),
        (lambda found: {"latents": found["latents"]}, "without latents flipped"),
        (lambda found: {**found, "latents": found["latents"] * float("nan")}, "with latents that are not finite"),
        (lambda found: {**found, "latents_flipped": found["latents"] + 1e39}, "with latents flipped that are not finite"),
        (lambda found: {**found, "latents": found["latents"].int()}, "with latents that are whole numbers"),
    ],
)
def test_latents_that_do_not_fit_are_not_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str
) -> None:
    cache = latent_cache(make_training_set(tmp_path, 1, flip_aug=True))
    with caplog.at_level(logging.INFO):
        cache.adopt(lambda item, names: spoil(foreign_latents(item, names)), progress=False)  # type: ignore[arg-type]
    assert lines(caplog) == [f"latent cache: 0 taken over, 1 not: 1 {reason} ({tmp_path / 'a.png'})"]
    assert cache.state().missing == 1


def test_only_what_is_missing_stale_or_damaged_is_asked_for(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 4)
    latent_cache(training_set).fill(TinyVae(), batch_size=2, workers=1, progress=False)
    (tmp_path / "a.png.64x64.tiny-latents.safetensors").unlink()
    (tmp_path / "b.PNG.96x64.tiny-latents.safetensors").write_bytes(b"damaged")
    asked: list[int] = []
    cache = latent_cache(changed(training_set, 2, crop_left_top=(1, 0)))
    cache.adopt(lambda item, names: asked.append(item.index) or "", progress=False)
    assert sorted(asked) == [0, 1, 2]


def test_masks_of_foreign_latents_are_made_here(tmp_path: Path) -> None:
    training_set = with_masks(make_training_set(tmp_path, 2))
    asked: list[tuple[str, ...]] = []
    cache = latent_cache(training_set)
    cache.adopt(lambda item, names: asked.append(names) or foreign_latents(item, names), progress=False)
    assert asked == [("latents",)] * 2
    straight = latent_cache(training_set, on_disk=False)
    straight.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    for item in training_set.items:
        mask = mask_of(cache, item)
        assert mask is not None
        assert torch.equal(mask, mask_of(straight, item))


def test_processes_take_over_their_shares_and_one_tells_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training_set = make_training_set(tmp_path, 5)
    said: list[Any] = []
    other = latent_cache(training_set)
    with caplog.at_level(logging.INFO):
        other.adopt(lambda item, _: "too old", rank=1, processes=2, gather=lambda value: said.append(value) or [value])
        latent_cache(training_set).adopt(foreign_latents, processes=2, gather=lambda value: [value, *said], progress=False)
    assert lines(caplog)[-1] == f"latent cache: 3 taken over, 2 not: 2 too old ({tmp_path / 'b.PNG'})"
    assert latent_cache(training_set).state().valid == 3


def test_in_memory_processes_share_what_they_took_over(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 4)
    said: list[Any] = []
    latent_cache(training_set, on_disk=False).adopt(
        foreign_latents, rank=1, processes=2, gather=lambda value: said.append(value) or [value], progress=False
    )
    answers = iter(said)
    cache = latent_cache(training_set, on_disk=False)
    cache.adopt(foreign_latents, processes=2, gather=lambda value: [value, next(answers)], progress=False)
    assert cache.state().is_complete
    assert [cache.load(item).float().mean() for item in training_set.items] == [0, 1, 2, 3]


@pytest.mark.parametrize("on_disk", [True, False])
def test_foreign_text_becomes_entries(tmp_path: Path, on_disk: bool, caplog: pytest.LogCaptureFixture) -> None:
    training_set = make_training_set(tmp_path, 4)
    cache = text_cache(training_set, on_disk=on_disk, extra_texts=("a prompt",))
    spoilt = {1: "for another caption", 2: {"embeds": torch.full((1, 2), float("inf"))}}
    with caplog.at_level(logging.INFO):
        cache.adopt(lambda item, text: spoilt.get(item.index, foreign_text(item, text)), progress=False)  # type: ignore[arg-type]
    (line,) = lines(caplog)
    assert line.startswith("text cache: 2 taken over, 2 not: ")
    assert f"1 for another caption ({tmp_path / 'b.PNG'})" in line
    assert f"1 with embeds that are not finite ({tmp_path / 'blaue Blüte.png'})" in line
    assert (cache.state().valid, cache.state().missing) == (2, 4)  # two captions, the empty text and the prompt
    loaded = cache.load(training_set.items[3])
    assert isinstance(loaded, TinyConditioning)
    assert (loaded.embeds.dtype, loaded.embeds.unique().tolist()) == (torch.bfloat16, [3])
    encoder = TinyTextEncoder()
    cache.fill(encoder, batch_size=1, progress=False)
    assert len(encoder.seen) == 4
    assert cache.load(training_set.items[3]).embeds.unique().tolist() == [3]


def test_a_text_of_two_images_is_asked_for_once_in_memory(tmp_path: Path) -> None:
    training_set = changed(changed(make_training_set(tmp_path, 2), 0, caption="a dog"), 1, caption="a dog")
    asked: list[int] = []
    cache = text_cache(training_set, on_disk=False)
    cache.adopt(lambda item, text: asked.append(item.index) or foreign_text(item, text), progress=False)
    assert asked == [0]
    assert cache.load(training_set.items[1]).embeds.unique().tolist() == [0]


def test_in_memory_processes_share_the_text_they_took_over(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 3)
    said: list[Any] = []
    text_cache(training_set, on_disk=False).adopt(
        foreign_text, rank=1, processes=2, gather=lambda value: said.append(value) or [value], progress=False
    )
    answers = iter(said)
    cache = text_cache(training_set, on_disk=False)
    cache.adopt(foreign_text, processes=2, gather=lambda value: [value, next(answers)], progress=False)
    assert cache.state().missing == 1  # the empty text
    assert [cache.load(item).embeds.float().mean() for item in training_set.items] == [0, 1, 2]


def test_variants_are_asked_for_with_their_own_item(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 2, shuffle_caption=True)
    cache = text_cache(training_set, variants=3)
    asked: list[tuple[int, str]] = []
    cache.adopt(lambda item, text: asked.append((item.index, text)) or "", progress=False)
    assert set(asked) == {(item.index, cache.text_of(item, variant)) for item in training_set.items for variant in range(3)}


def test_a_folder_that_cannot_be_written_stops_with_the_flag(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    (tmp_path / "a.png.64x64.tiny-latents.safetensors").mkdir()
    with pytest.raises(OutputError, match="--cache_dir"):
        latent_cache(training_set).adopt(foreign_latents, progress=False)


def test_nothing_to_tell_is_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Adoption().report("text")
    assert lines(caplog) == ["text cache: 0 taken over"]


def test_what_fits() -> None:
    assert misfit({"latents": torch.zeros(4, 8, 8), "more": torch.ones(1)}, {"latents": (4, 8, 8)}) is None
