"""What the tests of the page share: items on real pictures, and a tokenizer that counts words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from library.dataset.clock import Clock, Moments
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.page.showings import Showings
from library.dataset.token_use import TokenUse

WORDS = 6  # that the small encoder sees


def make_item(folder: Path, name: str = "a.png", caption: str = "a house, a tree", **changes) -> Item:
    """An image of 64x96 that is resized to 64x96 and cropped to 64x64, unless ``changes`` say otherwise."""
    subset = changes.pop("subset", SubsetSettings(place="here", image_dir=folder))
    item = Item(
        index=0,
        key=f"0:0:{name}",
        path=folder / name,
        caption=caption,
        dataset_index=0,
        subset=subset,
        repeats=1,
        size_wh=(64, 96),
        bucket_wh=(64, 64),
        resized_wh=(64, 96),
        crop_left_top=(0, 16),
    )
    return replace(item, **changes)


def save_picture(item: Item, colour=(200, 40, 40)) -> Item:
    """Gives the item its file: the left half of ``colour``, the right half black."""
    picture = Image.new("RGB", item.size_wh)
    picture.paste(colour, (0, 0, item.size_wh[0] // 2, item.size_wh[1]))
    picture.save(item.path)
    return item


def training_set(items, validation=(), *, batch_size=2, datasets=None, **more) -> TrainingSet:
    everything = [replace(item, index=index) for index, item in enumerate((*items, *validation))]
    subsets = tuple(dict.fromkeys(item.subset for item in everything))
    settings = DatasetSettings(place="my.toml, [[datasets]] 1", resolution_wh=(64, 64), batch_size=batch_size, subsets=subsets)
    return TrainingSet(
        datasets=datasets or (settings,),
        items=tuple(everything[: len(items)]),
        validation=tuple(everything[len(items) :]),
        **more,
    )


def showings_of(data: TrainingSet, *, variants=None, epochs=4) -> Showings:
    """Of a run with seed 7 whose steps are single batches, 8 in all."""
    return Showings(
        seed=7,
        variants=variants,
        moments=Moments(data, Clock(accumulation=1, total_steps=8), seed=7, processes=1),
        validation_from=len(data.items),
        steps_per_epoch=2,
        epochs=epochs,
        total_steps=8,
    )


def count_words(text: str) -> tuple[TokenUse, TokenUse]:
    """ "small" sees WORDS words, "large" a thousand."""
    words = text.split()
    cut_at = len(" ".join(words[:WORDS])) if len(words) > WORDS else None
    return TokenUse("small", len(words), WORDS, cut_at), TokenUse("large", len(words), 1000, None)
