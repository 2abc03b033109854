from __future__ import annotations

import json
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

import pytest
import torch

from library.dataset.caches import text_files
from library.dataset.caches.text_cache import TextCache, default_variants, text_hash
from library.dataset.caches.text_files import PROMPT_MARK
from library.dataset.captions import caption_variant
from library.dataset.items import TrainingSet
from library.errors import DatasetError
from library.files.safetensors_file import read_header
from tests.library.dataset.caches.cache_parts import (
    NAMES,
    TEXT_RECIPE,
    TinyConditioning,
    TinyTextEncoder,
    changed,
    make_training_set,
    text_cache,
)

REPOSITORY = Path(__file__).parents[4]
A_FILE = "a.png.tiny-text.safetensors"
PROMPTS_FILE = "atelier.tiny-prompts.safetensors"


def fill(cache: TextCache, encoder: Any = None, **settings: Any) -> TinyTextEncoder:
    encoder = encoder or TinyTextEncoder()
    cache.fill(encoder, **{"batch_size": 2, "progress": False, **settings})
    return encoder


def seen(encoder: TinyTextEncoder) -> list[str]:
    return [text for group in encoder.seen for text in group]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.embeds, other.embeds) and torch.equal(one.mask, other.mask) and one.embeds.dtype == other.embeds.dtype


def cache_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_texts_from_names_of_files_that_are_no_text_have_hashes() -> None:
    assert len({text_hash(text) for text in ("caf\udce9", "caf\xe9", "caf\ud800", "caf")}) == 4
    assert text_hash("caf\xe9") == "850f7dc43910ff89"


@pytest.mark.parametrize("on_disk", [True, False])
def test_filled_text_is_that_of_the_encoder(tmp_path: Path, on_disk: bool) -> None:
    training_set = make_training_set(tmp_path)
    cache = text_cache(training_set, on_disk=on_disk, extra_texts=("a prompt",))
    assert cache.state().missing == 7  # five captions, the empty one, a prompt
    fill(cache)
    assert cache.state().is_complete
    for item in training_set.items:
        assert same(cache.load(item, 0), TinyTextEncoder.one(item.caption))
    assert same(cache.load_text("a prompt"), TinyTextEncoder.one("a prompt"))
    assert cache.load_text("").mask.shape == (1, 0)


def test_only_valid_rows_are_stored_in_their_dtype(tmp_path: Path) -> None:
    training_set = changed(make_training_set(tmp_path, 2), 0, caption="short")
    fill(text_cache(training_set))  # both captions are padded to the longer one by the encoder
    header = read_header(tmp_path / A_FILE)
    (embeds,) = [info for name, info in header.tensors.items() if name.endswith("/embeds")]
    assert embeds.shape == (5, 2)
    assert embeds.dtype == "BF16"


def test_a_warm_start_encodes_nothing(tmp_path: Path) -> None:
    fill(text_cache(make_training_set(tmp_path), extra_texts=("a prompt",)))
    warm = text_cache(make_training_set(tmp_path), extra_texts=("a prompt",))
    assert warm.state().is_complete
    assert fill(warm).seen == []


def test_the_conditioning_type_can_come_later(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    cache = TextCache(training_set, TEXT_RECIPE, on_disk=True)
    with pytest.raises(ValueError, match="conditioning_type"):
        cache.load(training_set.items[0])
    fill(cache)
    assert cache.conditioning_type is TinyConditioning
    warm = TextCache(training_set, TEXT_RECIPE, on_disk=True)
    warm.conditioning_type = TinyConditioning
    assert same(warm.load(training_set.items[0]), cache.load(training_set.items[0]))


def test_equal_captions_are_encoded_once(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    training_set = replace(training_set, items=tuple(replace(item, caption="a dog") for item in training_set.items))
    cache = text_cache(training_set)
    assert seen(fill(cache)) == ["a dog", ""]
    assert all(same(cache.load(item, 0), TinyTextEncoder.one("a dog")) for item in training_set.items)


@pytest.mark.parametrize("on_disk", [True, False])
def test_every_variant_is_cached(tmp_path: Path, on_disk: bool) -> None:
    training_set = make_training_set(tmp_path, 2, shuffle_caption=True)
    cache = text_cache(training_set, variants=6, on_disk=on_disk)
    fill(cache)
    for item in training_set.items:
        texts = [caption_variant(item, variant) for variant in range(6)]
        assert len(set(texts)) > 2
        for variant, text in enumerate(texts):
            assert same(cache.load(item, variant), TinyTextEncoder.one(text))


def test_more_variants_keep_the_ones_that_are_there(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1, shuffle_caption=True)
    item = training_set.items[0]
    fill(text_cache(training_set, variants=2))
    more = text_cache(training_set, variants=12)
    assert {reason for _, reason in more.state().stale} == {"caption settings or variants changed"}
    there = {caption_variant(item, variant) for variant in range(2)}
    new = {caption_variant(item, variant) for variant in range(12)} - there
    assert new
    assert set(seen(fill(more, batch_size=1))) == new
    assert text_cache(training_set, variants=12).state().is_complete


def test_a_changed_caption_is_encoded_again_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training_set = make_training_set(tmp_path)
    fill(text_cache(training_set))
    edited = changed(training_set, 0, caption="something else")
    cache = text_cache(edited)
    assert cache.state().stale == ((tmp_path / A_FILE, "caption changed"),)
    assert cache.state().valid == 5
    with caplog.at_level(logging.INFO):
        assert seen(fill(cache, batch_size=1)) == ["something else"]
    lines = [record.getMessage() for record in caplog.records if "caption changed" in record.getMessage()]
    assert lines == [f"text cache: 1 made again, caption changed ({tmp_path / A_FILE})"]
    assert same(cache.load(edited.items[0], 0), TinyTextEncoder.one("something else"))
    assert text_cache(training_set).state().is_complete  # the old text is kept: going back costs nothing


def test_unused_texts_are_kept_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "KEEP_UNUSED", 8)
    training_set = make_training_set(tmp_path, 1)
    for number in range(12):
        fill(text_cache(changed(training_set, 0, caption=f"caption {number}")))
    texts = list(json.loads(read_header(tmp_path / A_FILE).metadata["texts"]).values())
    assert texts == [f"caption {number}" for number in range(11, 2, -1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"encoder_fingerprint": "e2"}, "model changed"),
        ({"dtype": "float32"}, "dtype changed"),
        ({"settings": {"max_tokens": 512}}, "encoder settings changed"),
    ],
)
def test_another_recipe_makes_every_text_again(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    training_set = make_training_set(tmp_path)
    fill(text_cache(training_set))
    cache = text_cache(training_set, recipe=replace(TEXT_RECIPE, **change))
    assert [found for _, found in cache.state().stale] == [reason] * 6
    assert len(seen(fill(cache))) == 6
    trusting = text_cache(training_set, skip_check=True)
    assert trusting.state().is_complete
    assert not text_cache(training_set).state().is_complete


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    fill(text_cache(training_set), batch_size=1)
    whole = cache_bytes(tmp_path)
    (tmp_path / A_FILE).write_bytes(whole[A_FILE][:-4])
    cache = text_cache(training_set)
    assert cache.state().stale == ((tmp_path / A_FILE, "damaged: truncated"),)
    assert seen(fill(cache, batch_size=1)) == [training_set.items[0].caption]
    assert cache_bytes(tmp_path) == whole


def test_flipped_bits_in_a_file_that_gets_more_texts_are_mended(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    fill(text_cache(training_set, extra_texts=("one",)))
    data = bytearray((tmp_path / PROMPTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / PROMPTS_FILE).write_bytes(data)
    cache = text_cache(training_set, extra_texts=("one", "two"))
    assert sorted(seen(fill(cache, batch_size=1))) == ["one", "two"]
    assert same(cache.load_text("one"), TinyTextEncoder.one("one"))


def test_damaged_text_is_found_at_the_start_and_encoded_again_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training_set = make_training_set(tmp_path, 1, shuffle_caption=True)
    fill(text_cache(training_set, variants=3), batch_size=1)
    whole = cache_bytes(tmp_path)
    header = read_header(tmp_path / A_FILE)
    last = max(header.tensors, key=lambda name: header.tensors[name].end).partition("/")[0]
    (tmp_path / A_FILE).write_bytes(whole[A_FILE][:-1] + bytes([whole[A_FILE][-1] ^ 1]))
    assert text_cache(training_set, variants=3, skip_check=True).state().is_complete
    cache = text_cache(training_set, variants=3)
    reason = "damaged: the bytes of its tensors are not those that were written"
    assert cache.state().stale == ((tmp_path / A_FILE, reason),)
    with caplog.at_level(logging.INFO):
        assert seen(fill(cache, batch_size=1)) == [json.loads(header.metadata["texts"])[last]]
    lines = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert lines == [f"text cache: 1 made again, {reason} ({tmp_path / A_FILE})"]
    assert text_cache(training_set, variants=3).state().is_complete


def test_a_file_damaged_during_training_is_named_and_made_again_at_the_next_start(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    cache = text_cache(training_set)
    fill(cache)
    whole = (tmp_path / A_FILE).read_bytes()
    for damaged in (b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / A_FILE).write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"a\.png\.tiny-text.*will be made again at the next start"):
            cache.load(training_set.items[0], 0)
        again = text_cache(training_set)
        assert again.state().missing == 1
        fill(again)
        assert (tmp_path / A_FILE).read_bytes() == whole
    with pytest.raises(DatasetError, match='no entry for the text "unheard"'):
        cache.load_text("unheard")


def test_the_image_itself_does_not_matter(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    fill(text_cache(training_set))
    training_set.items[0].path.write_bytes(b"other")
    assert text_cache(training_set).state().is_complete


@pytest.mark.parametrize("on_disk", [True, False])
def test_text_that_is_not_finite_stops_with_caption_and_image(tmp_path: Path, on_disk: bool) -> None:
    training_set = changed(make_training_set(tmp_path), 3, caption="poison")

    def broken(captions: list[str]) -> TinyConditioning:
        out = TinyTextEncoder()(captions)
        out.embeds[[position for position, text in enumerate(captions) if text == "poison"]] = float("inf")
        return out

    with pytest.raises(DatasetError, match="poison") as caught:
        fill(text_cache(training_set, on_disk=on_disk), broken, batch_size=1)
    assert "d.png" in str(caught.value)
    assert text_cache(training_set).state().valid == (3 if on_disk else 0)


def test_a_cache_folder_holds_all_files(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path / "pictures")
    fill(text_cache(training_set, cache_dir=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*-text.safetensors"))) == 5
    assert (tmp_path / "cache" / PROMPTS_FILE).is_file()
    assert not list((tmp_path / "pictures").glob("*.safetensors"))


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_fill_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight_set = big_set(straight)
    shutil.copytree(straight, killed, copy_function=shutil.copy2)
    fill(text_cache(straight_set, variants=3))
    process = start_fill(killed, delay_s=0.1)
    time.sleep(0.35)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(cache_bytes(killed)) < len(cache_bytes(straight))
    assert fill(text_cache(big_set(killed), variants=3)).seen
    assert cache_bytes(killed) == cache_bytes(straight)


def test_two_processes_fill_their_shares_and_read_all(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    training_set = big_set(together)
    shutil.copytree(together, alone, copy_function=shutil.copy2)
    processes = [start_fill(together, delay_s=0, rank=rank, processes=2) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    fill(text_cache(big_set(alone), variants=3))
    assert cache_bytes(together) == cache_bytes(alone)
    cache = text_cache(training_set, variants=3)
    assert all(cache.load(item, variant).mask.all() for item in training_set.items for variant in range(3))


def test_in_memory_two_processes_share_through_gather(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path)
    shares: list[Any] = []
    first = fill(
        text_cache(training_set, on_disk=False), rank=1, processes=2, gather=lambda value: shares.append(value) or [value]
    )
    cache = text_cache(training_set, on_disk=False)
    answers = iter(shares)
    second = fill(cache, rank=0, processes=2, gather=lambda value: [value, next(answers)])
    assert len(seen(first)) + len(seen(second)) == 6
    assert cache.state().is_complete
    assert all(same(cache.load(item, 0), TinyTextEncoder.one(item.caption)) for item in training_set.items)


def test_default_variants_are_enough_for_the_run_and_bounded(tmp_path: Path) -> None:
    fixed = make_training_set(tmp_path)
    assert default_variants(fixed, epochs=10) == 1
    assert default_variants(make_training_set(tmp_path, shuffle_caption=True), epochs=3) == 3
    assert default_variants(make_training_set(tmp_path, shuffle_caption=True, num_repeats=5), epochs=3) == 15
    assert default_variants(make_training_set(tmp_path, shuffle_caption=True), epochs=1000) == 24  # orders of four tags
    wild = changed(make_training_set(tmp_path, enable_wildcard=True), 0, caption="{a|b|c|d|e|f} {1|2|3|4|5|6|7}")
    assert default_variants(wild, epochs=1000) == 32


def test_validation_captions_are_cached_in_one_variant(tmp_path: Path) -> None:
    whole = make_training_set(tmp_path, 3, shuffle_caption=True)
    split = replace(whole, items=whole.items[:2], validation=whole.items[2:])
    cache = text_cache(split, variants=4)
    fill(cache)
    texts = json.loads(read_header(tmp_path / "blaue Blüte.png.tiny-text.safetensors").metadata["texts"])
    assert list(texts.values()) == [caption_variant(split.validation[0], 0)]
    assert same(cache.load(split.validation[0]), TinyTextEncoder.one(caption_variant(split.validation[0], 0)))
    assert text_cache(split, variants=4).state().is_complete
    assert default_variants(replace(split, items=make_training_set(tmp_path, 2).items), epochs=9) == 1  # only what is trained


def test_one_image_in_two_datasets_has_one_file_with_both_texts(tmp_path: Path) -> None:
    training_set = make_training_set(tmp_path, 1)
    other = replace(training_set.items[0], index=1, caption="another caption", dataset_index=1)
    training_set = replace(training_set, items=(*training_set.items, other))
    cache = text_cache(training_set)
    fill(cache)
    assert len(list(tmp_path.glob("*-text.safetensors"))) == 1
    assert [same(cache.load(item), TinyTextEncoder.one(item.caption)) for item in training_set.items] == [True, True]
    assert cache.state().total == 3


def big_set(folder: Path) -> TrainingSet:
    """What the script of cache_parts fills."""
    return make_training_set(folder, len(NAMES), flip_aug=True, shuffle_caption=True)


def start_fill(folder: Path, *, delay_s: float, rank: int = 0, processes: int = 1) -> subprocess.Popen[str]:
    arguments = [str(folder), "text", str(rank), str(processes), str(delay_s)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.library.dataset.caches.cache_parts", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "filling\n"
    return process


@pytest.mark.parametrize("on_disk", [True, False])
def test_marked_prompts_are_encoded_alone_and_apart_from_captions(tmp_path, on_disk):
    training_set, asked = make_training_set(tmp_path), []

    def encode(texts: list[str]) -> TinyConditioning:
        asked.append(texts)
        return TinyTextEncoder()(texts)

    fill(
        text_cache(training_set, on_disk=on_disk, extra_texts=(PROMPT_MARK + "one", PROMPT_MARK + "two", "plain")),
        encode,
        batch_size=3,
    )
    assert [PROMPT_MARK + "one"] in asked and [PROMPT_MARK + "two"] in asked
    assert all(len(texts) == 1 or not any(text.startswith(PROMPT_MARK) for text in texts) for texts in asked)
    assert any("plain" in texts for texts in asked)
