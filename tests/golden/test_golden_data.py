"""Buckets, captions and resizing against the recorded behaviour of the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from golden_files import load_golden, load_golden_json
from library.dataset.augment import told_crop
from library.dataset.buckets import Buckets, bucket_problems, bucket_sizes, rounded_limits
from library.dataset.captions import Moment, caption_for
from library.dataset.images import load_picture
from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.dataset.resizing import resize
from library.errors import DatasetError

SUBSET = SubsetSettings(place="golden", image_dir=None)
BUCKET_SETTINGS = range(8)
CAPTIONS = range(28)
RESIZED = range(10)


def dataset_settings(recorded: dict) -> DatasetSettings:
    keys = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
    return DatasetSettings(place="golden", resolution_wh=tuple(recorded["resolution"]), enable_bucket=True, subsets=(SUBSET,),
                           **{key: recorded[key] for key in keys})  # fmt: skip


@pytest.mark.parametrize("number", BUCKET_SETTINGS)
def test_bucket_of_every_image(number: int):
    recorded = load_golden_json("data/buckets.json")["settings"][number]
    settings = dataset_settings(recorded)
    if "assertion" in recorded:
        assert any(recorded["assertion"].split()[0] in problem for problem in bucket_problems(settings, bucket_step=16))
        return
    assert not list(bucket_problems(settings, bucket_step=16))
    limits = rounded_limits(settings.min_bucket_reso, settings.max_bucket_reso, settings.bucket_reso_steps)
    assert list(limits) == recorded["adjusted_min_max"]
    buckets = Buckets(settings)
    if "predefined" in recorded:
        assert [list(size) for size in buckets.sizes] == recorded["predefined"]
    assert len(recorded["images"]) == 40
    for image in recorded["images"]:
        if "exception" in image or 0 in image["bucket"]:
            with pytest.raises(DatasetError, match="too small"):
                buckets.place(tuple(image["size"]))
            continue
        placed = buckets.place(tuple(image["size"]))
        actual = (placed.bucket_wh, placed.resized_wh, placed.crop_left_top)
        assert actual == (tuple(image["bucket"]), tuple(image["resized"]), tuple(image["crop_offset_xy"])), image
        # The model is told the crop that was made; "sdxl" and "crop_ltrb" hold the reference's, which were not.
        left, top = image["crop_offset_xy"]
        assert told_crop(placed, flipped=False) == (left, top)
        assert told_crop(placed, flipped=True) == (image["resized"][0] - image["bucket"][0] - left, top)


def test_every_recorded_case_is_run():
    recorded = load_golden_json("data/buckets.json")
    assert len(recorded["settings"]) == len(BUCKET_SETTINGS) and len(recorded["make_bucket_resolutions"]) == 3
    assert sum("assertion" in settings for settings in recorded["settings"]) == 2
    images = [image for settings in recorded["settings"] for image in settings.get("images", ())]
    refused = [image for image in images if "exception" in image or 0 in image["bucket"]]
    assert len(images) == 240 and len(refused) > 3
    assert all(image["covers_bucket"] for image in images if image not in refused)
    assert len(load_golden("data/resize_crop.safetensors").about["cases"]) == len(RESIZED)


def test_bucket_lists():
    for case in load_golden_json("data/buckets.json")["make_bucket_resolutions"]:
        sizes = bucket_sizes(
            tuple(case["max_reso"]), smallest=case["min_size"], largest=case["max_size"], steps=case["divisible"]
        )
        assert [list(size) for size in sizes] == case["result"]


@pytest.mark.parametrize("number", CAPTIONS)
def test_caption(number: int):
    case = load_golden_json("data/captions.json")["cases"][number]
    if case["replacements"]:
        pytest.skip("replacements come from textual inversion, which is not part of this project")
    subset = SubsetSettings(place="golden", image_dir=None, **case["options"])
    item = golden_item(Path("x.png"), size_wh=(64, 64), bucket_wh=(64, 64), resized_wh=(64, 64), subset=subset)
    item = replace(item, caption=case["caption"])
    moment = Moment(case["current_step"], case["max_train_steps"])
    for seed in range(3):
        assert caption_for(item, seed=seed, epoch=case["current_epoch"], occurrence=0, moment=moment) == case["result"]


@pytest.mark.parametrize("number", RESIZED)
def test_resize_and_crop(number: int, tmp_path: Path):
    from PIL import Image

    golden = load_golden("data/resize_crop.safetensors")
    case = golden.about["cases"][number]
    path = tmp_path / "picture.png"
    Image.fromarray(golden.inputs[f"{number}/image_hwc"].numpy()).save(path)
    item = golden_item(
        path,
        size_wh=tuple(case["size_wh"]),
        bucket_wh=tuple(case["bucket_wh"]),
        resized_wh=tuple(case["resized_wh"]),
        subset=SubsetSettings(place="golden", image_dir=None, resize_interpolation=case["interpolation"]),
    )
    expected = golden.outputs[f"{number}/image_hwc"].numpy()
    difference = np.abs(load_picture(item).pixels.astype(int) - expected.astype(int)).max()
    assert difference <= (0 if case["interpolation"] == "nearest" or case["size_wh"] == case["resized_wh"] else 1)
    assert np.array_equal(load_picture(item, flipped=True).pixels, load_picture(item).pixels[:, ::-1])


def test_pixel_values_of_the_model():
    from PIL import Image

    golden = load_golden("data/resize_crop.safetensors")
    pixels = resize(Image.fromarray(golden.inputs["9/image_hwc"].numpy()), (48, 32), interpolation=None).copy()
    assert torch.allclose(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, golden.outputs["last_as_tensor"], atol=1e-6)


def golden_item(path: Path, *, size_wh, bucket_wh, resized_wh, subset: SubsetSettings) -> Item:
    left_top = ((resized_wh[0] - bucket_wh[0]) // 2, (resized_wh[1] - bucket_wh[1]) // 2)
    return Item(
        index=0,
        key=f"0:0:{path.name}",
        path=path,
        caption="",
        dataset_index=0,
        subset=subset,
        repeats=1,
        size_wh=size_wh,
        bucket_wh=bucket_wh,
        resized_wh=resized_wh,
        crop_left_top=left_top,
    )
