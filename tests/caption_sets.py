"""Training sets that are nothing but captions."""

from __future__ import annotations

from pathlib import Path

from library.dataset.items import Item, SubsetSettings, TrainingSet


def captions(*texts: str, **settings) -> TrainingSet:
    """Of images 0.png, 1.png ...; ``settings`` are the subset's."""
    subset = SubsetSettings(place="here", image_dir=None, **settings)
    sizes = {"size_wh": (64, 64), "bucket_wh": (64, 64), "resized_wh": (64, 64), "crop_left_top": (0, 0)}
    items = [
        Item(
            index=index,
            key=str(index),
            path=Path(f"{index}.png"),
            caption=text,
            dataset_index=0,
            subset=subset,
            repeats=1,
            **sizes,
        )
        for index, text in enumerate(texts)
    ]
    return TrainingSet(datasets=(), items=tuple(items))
