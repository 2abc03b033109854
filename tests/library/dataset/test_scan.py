"""Scanning real folders: what is found, placed and counted, and what stops the run."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset import verify
from library.dataset.image_records import RECORDS_NAME, ImageRecords
from library.dataset.images import load_picture
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
    assert load_picture(second).pixels.shape == (48, 80, 3)


def test_size_is_that_of_the_upright_picture(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "a" / "x.jpg", exif=exif)
    (item,) = scan((dataset(subset(tmp_path / "a"), enable_bucket=True),)).items
    assert item.size_wh == (50, 100) and item.bucket_wh == (48, 80)
    assert load_picture(item).pixels.shape == (80, 48, 3)


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
    assert found[1].startswith("(left out with --skip_bad_images: 1 bad image(s) or caption(s), such as: ") and len(found) == 2


def test_what_is_skipped_need_not_be_mended(tmp_path: Path):
    bad_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    settings = dataset(subset(tmp_path / "a"), subset(tmp_path / "b"), **LARGE)
    assert len(problems(settings)) == 9
    empty, left_out = problems(settings, skip_bad_images=True)
    assert empty.startswith("my.toml, subset b: no images in") and left_out.startswith("(left out with --skip_bad_images: 7 bad")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_with_control_characters_are_printed_escaped(tmp_path: Path):
    folder = tmp_path / "a"
    picture(folder / "good\n.png", caption=None)
    (folder / "bad\n\x1b[2J.png").touch()
    (folder / "odd\r.txt").touch()
    (found, _) = problems(dataset(subset(folder)))
    assert found == f"{folder}/bad\\n\\x1b[2J.png cannot be read: the file is empty (0 bytes)"
    data = scan((dataset(subset(folder)),), skip_bad_images=True)
    assert data.skipped == (found,)
    assert "(such as good\\n.png)" in data.warnings[0]
    assert all(text.isprintable() for text in (*data.skipped, *data.warnings))
    assert "\n" in str(data.items[0].path)


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
    data = scan((settings,))
    assert all(item.subset_index == "rt".index(item.path.name[0]) for item in data.items)
    repeats = repeats_of(data)
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


def test_small_buckets_are_those_that_do_not_fill_a_batch_of_all_processes(tmp_path: Path):
    for name in "abcd":
        picture(tmp_path / "a" / f"{name}.png", (64, 64))
    settings = dataset(subset(tmp_path / "a"), enable_bucket=True, batch_size=2)
    assert not [text for text in scan((settings,), processes=2).warnings if "buckets" in text]
    (text,) = [text for text in scan((settings,), processes=3).warnings if "buckets" in text]
    assert "1 of 1 buckets have fewer images (with repeats) than batch_size 2 times 3 processes" in text


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


# ---------------------------------------------------------------------- what is remembered


def remembered(*datasets: DatasetSettings, **options) -> tuple[TrainingSet, int]:
    """The training set of a start that remembers, and how many images it had to read."""
    told = [(0, 0)]
    data = scan(datasets, records=ImageRecords(), progress=lambda done, total: told.append((done, total)), **options)
    return data, told[-1][0]


def test_a_second_start_reads_nothing_and_finds_the_same(tmp_path: Path):
    for number in range(4):
        picture(tmp_path / "a" / f"{number}.png", (64 + number, 64))
    settings = dataset(subset(tmp_path / "a"), enable_bucket=True)
    first, second = remembered(settings), remembered(settings)
    assert (first[1], second[1]) == (4, 0) and first[0] == second[0] == scan((settings,))


def test_what_was_read_is_remembered_when_the_scan_fails(tmp_path: Path):
    bad_folder(tmp_path / "a")
    settings = dataset(subset(tmp_path / "a"), **LARGE)
    with pytest.raises(DatasetError):
        remembered(settings)
    assert remembered(settings, skip_bad_images=True)[1] == 5  # all that was not good


def test_what_was_read_is_remembered_when_the_scan_is_interrupted(tmp_path: Path):
    for number in range(40):
        picture(tmp_path / "a" / f"{number:02}.png")
    settings = dataset(subset(tmp_path / "a"))

    def ctrl_c(done: int, total: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan((settings,), records=ImageRecords(), progress=ctrl_c)
    assert remembered(settings)[1] == 10


def test_by_default_nothing_is_left_in_the_folder(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    scan((dataset(subset(tmp_path / "a", cache_info=True)),))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"x.png", "x.txt"}


def test_records_are_no_images_of_the_folder(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    remembered(dataset(subset(tmp_path / "a")))
    assert (tmp_path / "a" / RECORDS_NAME).exists()
    assert remembered(dataset(subset(tmp_path / "a")))[0].warnings == ()


# ---------------------------------------------------------------------- attributes of images


def test_custom_attributes_are_the_subsets_and_the_images_own(tmp_path: Path):
    for name in ("x.png", "y.png"):
        picture(tmp_path / "a" / name)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"x.png": {"caption": "x", "custom_attributes": {"b": 3, "c": [1]}}, "y.png": {"caption": "y"}}))
    attributes = {"a": 1, "b": 2}
    x, y = scan((dataset(subset(tmp_path / "a", metadata_file=meta, custom_attributes=attributes)),)).items
    assert x.custom_attributes == {"a": 1, "b": 3, "c": [1]}
    assert y.custom_attributes is attributes  # one object for all that have nothing of their own


def test_equal_sizes_are_one_object(tmp_path: Path):
    for number in range(3):
        picture(tmp_path / "a" / f"{number}.png", (100, 50))
    first, second, _ = scan((dataset(subset(tmp_path / "a"), enable_bucket=True),)).items
    for name in ("size_wh", "bucket_wh", "resized_wh", "crop_left_top", "custom_attributes"):
        assert getattr(first, name) is getattr(second, name)


# ---------------------------------------------------------------------- odd folders


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_that_lead_nowhere_or_round_in_circles(tmp_path: Path):
    folder = picture(tmp_path / "a" / "good.png").parent
    (folder / "parent").symlink_to(folder)
    (folder / "parent.png").symlink_to(folder)
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "there.png").symlink_to(folder / "back.png")
    (folder / "back.png").symlink_to(folder / "there.png")
    (folder / "broken.png").symlink_to(folder / "nothing.png")
    found = problems(dataset(subset(folder)))
    for words in ("parent.png cannot be read: it is a folder", "itself.png cannot be read: it is a link that leads back",
                  "there.png cannot be read: it is a link that leads back", "back.png cannot be read: it is a link that leads",
                  "broken.png cannot be read: it is a link to a file that is not there"):  # fmt: skip
        assert sum(words in text for text in found) == 1, words
    assert len(found) == 6
    assert [item.path.name for item in scan((dataset(subset(folder)),), skip_bad_images=True).items] == ["good.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_caption_file_that_links_to_itself(tmp_path: Path):
    picture(tmp_path / "a" / "x.png", caption=None)
    (tmp_path / "a" / "x.txt").symlink_to(tmp_path / "a" / "x.txt")
    assert problems(dataset(subset(tmp_path / "a")))[0].startswith(f"{tmp_path / 'a' / 'x.txt'} cannot be read: Too many levels")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_folder_of_nothing_but_links_to_itself(tmp_path: Path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    assert problems(dataset(subset(folder)))[0].startswith(f"my.toml, subset a: no images in {folder}")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_linked_image_is_read_where_it_lies(tmp_path: Path):
    target = picture(tmp_path / "store" / "0001.png", (100, 50))
    picture(tmp_path / "a" / "other.png")
    (tmp_path / "a" / "x.png").symlink_to(target)
    settings = dataset(subset(tmp_path / "a"), enable_bucket=True)
    assert [item.size_wh for item in remembered(settings)[0].items] == [(64, 64), (100, 50)]
    picture(target, (50, 100))
    assert [item.size_wh for item in remembered(settings)[0].items] == [(64, 64), (50, 100)]


def test_three_images_among_fifty_thousand_other_files(tmp_path: Path):
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(50_000):
        os.close(os.open(folder / f"{number}.json", os.O_CREAT | os.O_WRONLY))
    assert problems(dataset(subset(folder)))[0].startswith("my.toml, subset a: no images in")
    for number in range(3):
        picture(folder / f"{number}.png")
    data = scan((dataset(subset(folder)),))
    assert len(data.items) == 3 and data.warnings == ()


def test_a_caption_file_that_is_a_folder(tmp_path: Path):
    picture(tmp_path / "a" / "x.png", caption=None)
    picture(tmp_path / "a" / "y.png")
    (tmp_path / "a" / "x.txt").mkdir()
    found = problems(dataset(subset(tmp_path / "a")))
    assert (
        found[0] == f"{tmp_path / 'a' / 'x.txt'} is a folder, but a caption file of that name would be read: rename or remove it"
    )
    assert [item.path.name for item in scan((dataset(subset(tmp_path / "a")),), skip_bad_images=True).items] == ["y.png"]


def test_metadata_whose_images_are_gone_lists_all_of_them(tmp_path: Path):
    picture(tmp_path / "a" / "here.png")
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"caption": "x"} for name in ("here.png", "gone.png", "sub/lost.png", "/no/where.png")}))
    found = problems(dataset(subset(tmp_path / "a", metadata_file=meta)))
    for name, path in (
        ("gone.png", tmp_path / "a/gone.png"),
        ("sub/lost.png", tmp_path / "a/sub/lost.png"),
        ("/no/where.png", "/no/where.png"),
    ):
        assert f"{meta}, {name}: {path} cannot be read: the file is not there" in found
    assert found[-1].startswith("3 bad image(s)")


def test_metadata_that_names_an_image_twice(tmp_path: Path):
    path = picture(tmp_path / "a" / "x.png")
    meta = tmp_path / "meta.jsonl"
    lines = [
        {"image_path": "x.png", "caption": "first"},
        {"image_path": "x.png", "caption": "second"},
        {"image_path": str(path), "caption": "third"},
    ]
    meta.write_text("\n".join(json.dumps(line) for line in lines))
    data = scan((dataset(subset(tmp_path / "a", metadata_file=meta)),))
    assert [item.caption for item in data.items] == ["third"]
    assert data.warnings == (
        f"my.toml, subset a: 2 entries of {meta} name an image that a later entry names again: the last one counts",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8(tmp_path: Path):
    folder = tmp_path / "a"
    picture(folder / "good.png")
    shutil.copy(folder / "good.png", folder / os.fsdecode(b"caf\xe9.png"))
    (text, summary) = problems(dataset(subset(folder)))
    assert text == f"the name {folder}/caf\\xe9.png is not valid UTF-8: rename it" and summary.startswith("1 bad")
    text.encode("utf-8")
    data = scan((dataset(subset(folder)),), skip_bad_images=True)
    assert [item.path.name for item in data.items] == ["good.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("key", ["image_dir", "conditioning_data_dir"])
def test_folders_whose_names_are_not_utf8(key: str, tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"bilder-\xfc")
    picture(folder / "x.png")
    picture(tmp_path / "a" / "x.png")
    (text,) = problems(dataset(subset(tmp_path / "a", **{key: folder})))
    assert text == f"my.toml, subset a: the name {tmp_path}/bilder-\\xfc is not valid UTF-8: rename it"


def test_metadata_with_names_that_no_file_can_have(tmp_path: Path):
    picture(tmp_path / "a" / "x.png")
    meta = tmp_path / "meta.json"
    meta.write_text('{"x.png": {"caption": "x"}, "nul\\u0000.png": {}, "half\\ud800.png": {"caption": "y"}}')
    found = problems(dataset(subset(tmp_path / "a", metadata_file=meta)))
    assert any("no file can have a name with the character" in text for text in found)
    assert any("half\\ud800.png is not valid UTF-8" in text for text in found)
    "".join(found).encode("utf-8")


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder with an image that this process may not list; root is let in everywhere, so it becomes somebody else."""
    if os.name == "nt":
        pytest.skip("permissions work differently on Windows")
    parent = Path(tempfile.mkdtemp())
    folder = picture(parent / "locked" / "x.png").parent
    parent.chmod(0o755)
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(stat.S_IRWXU)
    shutil.rmtree(parent)


@pytest.mark.parametrize("settings", [{}, {"cache_info": True}])
def test_a_folder_that_may_not_be_read(settings: dict, locked_folder: Path):
    (text,) = problems(dataset(subset(locked_folder, **settings)), skip_bad_images=True)
    assert text == f"my.toml, subset locked: {locked_folder} cannot be read: Permission denied"


def test_a_mask_folder_that_may_not_be_read(locked_folder: Path):
    folder = Path(tempfile.mkdtemp())
    try:
        Image.new("RGB", (64, 64)).save(folder / "x.png")
        text = problems(dataset(subset(folder, conditioning_data_dir=locked_folder)))[0]
        assert f"conditioning_data_dir {locked_folder} cannot be read: Permission denied" in text
    finally:
        shutil.rmtree(folder)


def test_an_empty_parent_with_a_locked_child(locked_folder: Path):
    (text,) = problems(dataset(subset(locked_folder.parent)))
    assert f"no images in {locked_folder.parent}" in text


def test_verification_keeps_several_images_in_the_air(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each thread works on its own image: with two workers two are read at the same moment."""
    import threading

    for number in range(verify.READ_AT_ONCE * 2):
        picture(tmp_path / "a" / f"{number:02}.png")
    both = threading.Barrier(2, timeout=20)
    decode = verify._decode
    monkeypatch.setattr(verify, "_decode", lambda data: (both.wait(), decode(data))[1])
    assert len(scan((dataset(subset(tmp_path / "a")),), workers=2).items) == verify.READ_AT_ONCE * 2


def test_memory_for_each_image_is_small(tmp_path: Path):
    """Beyond the path and the caption, an image leaves less than 1 KiB behind: item, key and record."""
    import tracemalloc

    content = picture(tmp_path / "a" / "00000.png").read_bytes()
    for number in range(1, 2000):
        (tmp_path / "a" / f"{number:05}.png").write_bytes(content)
        (tmp_path / "a" / f"{number:05}.txt").write_text(f"caption {number}")
    settings = (dataset(subset(tmp_path / "a")),)
    tracemalloc.start()
    try:
        data = scan(settings, records=ImageRecords())
        used = tracemalloc.get_traced_memory()[0]
        paths = [Path(str(item.path)) for item in data.items]
        texts = [(hash(path), os.fspath(path), item.caption + " ") for path, item in zip(paths, data.items, strict=True)]
        beside = tracemalloc.get_traced_memory()[0] - used
    finally:
        tracemalloc.stop()
    assert len(texts) == 2000
    assert (used - beside) / 2000 < 1024
