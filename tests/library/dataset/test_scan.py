"""Scanning real folders: what is found, placed and counted, and what stops the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.images import load_pixels
from library.dataset.items import DatasetSettings, SubsetSettings, TrainingSet
from library.dataset.scan import scan
from library.errors import DatasetError

ROOT = Path(__file__).parents[3]


def picture(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = "a, b") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


LARGE = {"enable_bucket": True, "resolution_wh": (1024, 1024), "min_bucket_reso": 512, "max_bucket_reso": 2048}


def subset(folder: Path, **settings) -> SubsetSettings:
    return SubsetSettings(
        **{"place": f"my.toml, subset {folder.name}", "image_dir": folder, "caption_extension": ".txt"} | settings
    )


def dataset(*subsets: SubsetSettings, **settings) -> DatasetSettings:
    values = {"place": "my.toml, [[datasets]] 1", "resolution_wh": (64, 64), "subsets": subsets, "bucket_reso_steps": 16,
              "min_bucket_reso": 32, "max_bucket_reso": 128}  # fmt: skip
    return DatasetSettings(**values | settings)


def problems(*datasets: DatasetSettings, **options) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        scan(datasets, **options)
    return list(caught.value.problems)


def repeats_of(data: TrainingSet) -> dict[str, int]:
    return {item.path.name: item.repeats for item in data.items}


def test_items_have_size_bucket_caption_and_key(tmp_path: Path):
    picture(tmp_path / "a" / "日本.PNG", (100, 50), "赤, cat")
    picture(tmp_path / "a" / "b.jpg", (64, 64), None)
    data = scan((dataset(subset(tmp_path / "a", class_tokens="dog", num_repeats=3), enable_bucket=True),))
    first, second = data.items
    assert (first.index, first.key, first.caption, first.repeats) == (0, "0:0:b.jpg", "dog", 3)
    assert (second.index, second.key, second.caption, second.size_wh) == (1, "0:0:日本.PNG", "赤, cat", (100, 50))
    assert (second.bucket_wh, second.resized_wh, second.crop_left_top) == ((80, 48), (96, 48), (8, 0))
    assert load_pixels(second).shape == (48, 80, 3)


def test_size_is_that_of_the_upright_picture(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "a" / "x.jpg", exif=exif)
    (item,) = scan((dataset(subset(tmp_path / "a"), enable_bucket=True),)).items
    assert item.size_wh == (50, 100) and item.bucket_wh == (48, 80)
    assert load_pixels(item).shape == (80, 48, 3)


def bad_folder(folder: Path) -> Path:
    picture(folder / "good.png")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    truncated = picture(folder / "cut.jpg")
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    Image.new("L", (1, 1)).save(folder / "tiny.png")
    Image.new("L", (40_000, 20)).save(folder / "wide.png")
    Image.new("L", (30_000, 16)).save(folder / "narrow.png")
    picture(folder / "latin.png", caption=None)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def test_all_bad_images_and_captions_are_reported_together(tmp_path: Path):
    found = problems(dataset(subset(bad_folder(tmp_path / "a")), **LARGE))
    for words in ("empty.png cannot be read: the file is empty", "text.jpg cannot be read", "cut.jpg cannot be read",
                  "tiny.png is too small (1x1)", "wide.png is too large", "narrow.png is too narrow (30000x16)",
                  "latin.txt: byte 3 is not UTF-8"):  # fmt: skip
        assert sum(words in text for text in found) == 1, words
    assert found[-1].startswith("7 bad image(s) or caption(s)") and "--skip_bad_images" in found[-1]
    assert len(found) == 8


def test_bad_images_can_be_left_out(tmp_path: Path):
    settings = dataset(subset(bad_folder(tmp_path / "a")), **LARGE)
    data = scan((settings,), skip_bad_images=True)
    assert [item.path.name for item in data.items] == ["good.png"]
    assert len(data.skipped) == 7 and any("tiny.png" in text for text in data.skipped)


def test_long_lists_are_cut(tmp_path: Path):
    picture(tmp_path / "a" / "good.png")
    for number in range(30):
        (tmp_path / "a" / f"bad{number:02}.png").touch()
    found = problems(dataset(subset(tmp_path / "a")))
    assert len(found) == 22 and found[-2:][0] == "and 10 more" and found[-1].startswith("30 bad")


def test_image_too_small_for_no_upscale(tmp_path: Path):
    picture(tmp_path / "a" / "x.png", (60, 200))
    settings = dataset(
        subset(tmp_path / "a"), enable_bucket=True, bucket_no_upscale=True, bucket_reso_steps=64, resolution_wh=(512, 512)
    )
    assert "x.png is too small (60x200) for bucket_no_upscale" in problems(settings)[0]
    found = problems(settings, skip_bad_images=True)
    assert found[0] == "my.toml, [[datasets]] 1: none of its images can be trained"


def test_empty_folder(tmp_path: Path):
    (tmp_path / "a").mkdir()
    picture(tmp_path / "b" / "x.png")
    found = problems(dataset(subset(tmp_path / "a"), subset(tmp_path / "b")))
    assert found[0].startswith(f"my.toml, subset a: no images in {tmp_path / 'a'}: looked for .png, .jpg")
    assert len(found) == 1
    assert "no images in" in problems(dataset(subset(tmp_path / "a")), skip_bad_images=True)[0]


def test_folder_that_vanished(tmp_path: Path):
    assert "cannot be read" in problems(dataset(subset(tmp_path / "gone")))[0]


def test_metadata_subset(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"x.png": {"caption": "one", "tags": "t"}, "gone.png": {"caption": "two"}, "bad": 3}))
    settings = dataset(subset(tmp_path / "a", metadata_file=meta, num_repeats=2))
    found = problems(settings)
    assert any("gone.png cannot be read: the file is not there" in text for text in found)
    assert any("meta.json, bad: the entry must be an object" in text for text in found)
    (item,) = scan((settings,), skip_bad_images=True).items
    assert (item.key, item.caption, item.repeats) == ("0:0:x.png", "one,t", 2)


def test_image_in_two_subsets_belongs_to_the_later_one(tmp_path: Path):
    path = picture(tmp_path / "a" / "x.png")
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps({str(path): {"caption": name}}))
    subsets = [subset(tmp_path / "a", metadata_file=tmp_path / f"{name}.json") for name in ("one", "two")]
    data = scan((dataset(*subsets),))
    assert [(item.key.split(":")[1], item.caption) for item in data.items] == [("1", "two")]
    assert any("1 images are in two subsets" in text for text in data.warnings)


def test_two_datasets_share_images(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    data = scan((dataset(subset(tmp_path / "a")), dataset(subset(tmp_path / "a"), resolution_wh=(32, 32))))
    assert [(item.key, item.dataset_index, item.bucket_wh) for item in data.items] == [
        ("0:0:x.png", 0, (64, 64)), ("1:0:x.png", 1, (32, 32))]  # fmt: skip


@pytest.mark.parametrize(
    ("train", "train_repeats", "reg", "reg_repeats", "expected"),
    [
        (2, 5, 3, 1, [4, 3, 3]),  # T = 10: one each, then one more in order until 10
        (2, 1, 4, 1, [1, 1]),  # surplus is unused
        (3, 1, 4, 2, [2, 2]),  # the one that reaches T is the last
        (1, 1, 1, 1, [1]),
        (1, 7, 2, 3, [4, 3]),
    ],
)
def test_regularisation_images_fill_up_to_the_others(
    train: int, train_repeats: int, reg: int, reg_repeats: int, expected: list[int], tmp_path: Path
):
    for number in range(train):
        picture(tmp_path / "train" / f"t{number}.png")
    for number in range(reg):
        picture(tmp_path / "reg" / f"r{number}.png")
    settings = dataset(
        subset(tmp_path / "reg", is_reg=True, num_repeats=reg_repeats), subset(tmp_path / "train", num_repeats=train_repeats)
    )
    repeats = repeats_of(scan((settings,)))
    assert [count for name, count in repeats.items() if name.startswith("r")] == expected
    assert sum(count for name, count in repeats.items() if name.startswith("t")) == train * train_repeats


def test_regularisation_images_alone_are_refused(tmp_path: Path):
    picture(tmp_path / "reg" / "r.png")
    assert "regularisation images (is_reg) only" in problems(dataset(subset(tmp_path / "reg", is_reg=True)))[0]


def test_warnings(tmp_path: Path):
    picture(tmp_path / "a" / "small.png", (20, 20))
    picture(tmp_path / "a" / "wide.png", (128, 64), None)
    settings = replace(dataset(subset(tmp_path / "a"), enable_bucket=True, batch_size=2), warnings=("from the settings",))
    warnings = scan((settings,)).warnings
    assert warnings[0] == "from the settings"
    text = "\n".join(warnings)
    assert "1 of 2 images have no .txt caption file (such as wide.png)" in text
    assert "2 of 2 buckets have fewer images (with repeats) than batch_size 2" in text and "64x64 (1)" in text
    assert "1 images are enlarged more than 2x and will train blurred (such as small.png, 3.2x)" in text
    assert len(warnings) == 4


def test_captions_under_another_extension_are_pointed_out(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    (warning,) = scan((dataset(subset(tmp_path / "a", caption_extension=".caption")),)).warnings
    assert "1 .txt files beside them are NOT read" in warning and "--caption_extension .txt" in warning


@pytest.mark.parametrize("workers", [0, 1, 7])
def test_workers_change_nothing(workers: int, tmp_path: Path):
    for number in range(12):
        picture(tmp_path / "a" / f"{number}.png", (64 + number, 64))
    settings = (dataset(subset(tmp_path / "a"), enable_bucket=True),)
    assert scan(settings, workers=workers) == scan(settings, workers=3)


def test_scan_needs_no_torch(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    code = (
        "import sys; from pathlib import Path\n"
        "from library.dataset import captions, order, scan, toml_config, items\n"
        f"subset = items.SubsetSettings(place='p', image_dir=Path({str(tmp_path / 'a')!r}))\n"
        "data = scan.scan((items.DatasetSettings(place='p', resolution_wh=(64, 64), subsets=(subset,)),))\n"
        "assert order.batches_per_epoch(data, processes=1) == 1\n"
        "print(sorted({'torch', 'cv2', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_bucket_counts(tmp_path: Path):
    for number, size in enumerate([(64, 64), (64, 64), (128, 64), (64, 128)]):
        picture(tmp_path / "a" / f"{number}.png", size)
    data = scan((dataset(subset(tmp_path / "a"), enable_bucket=True),))
    assert Counter(item.bucket_wh for item in data.items) == {(64, 64): 2, (80, 48): 1, (48, 80): 1}
