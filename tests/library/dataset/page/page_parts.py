"""What the tests of the page share: items on real pictures, and a tokenizer that counts words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from library.dataset.clock import Clock, Moments
from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, Item, SubsetSettings, TrainingSet
from library.dataset.page.showings import Showings
from library.dataset.token_use import TokenUse
from library.dataset.verify import read_record

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


def with_masks(folder: Path) -> TrainingSet:
    """Four images as a scan has read them: one with a black mask, one that is transparent, one of each that is neither."""
    (alpha_only := folder / "alpha").mkdir()
    subset = SubsetSettings(place="here", image_dir=folder)
    transparent = SubsetSettings(place="there", image_dir=alpha_only, alpha_mask=True)
    items = []
    for name, value in (("black.png", 0), ("grey.png", 9)):
        item = save_picture(make_item(folder, name, subset=subset, mask_path=folder / f"mask of {name}"))
        Image.new("L", item.size_wh, value).save(item.mask_path)
        items.append(item)
    for name, value in (("clear.png", 0), ("solid.png", 255)):
        item = make_item(alpha_only, name, subset=transparent, has_alpha=True)
        Image.new("RGBA", item.size_wh, (9, 9, 9, value)).save(item.path)
        items.append(item)
    records = ImageRecords(reads=False, writes=False)
    for path in [item.path for item in items] + [item.mask_path for item in items if item.mask_path]:
        records.put(path, read_record(path))
    return training_set(items, records=records)


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
