"""Which images validate: a fixed choice, and nothing that validates is ever trained."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.image_records import ImageRecords
from library.dataset.items import DatasetSettings, SubsetSettings, TrainingSet
from library.dataset.scan import scan
from library.dataset.validation_split import RealPaths, chosen_for_validation, validation_count, without_chance
from library.errors import DatasetError


def pictures(folder: Path, count: int, *, first: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        content = np.random.default_rng([number, *folder.name.encode()]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(content).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"caption {number}")
    return folder


def subset(folder: Path | None, **settings) -> SubsetSettings:
    return SubsetSettings(**{"place": f"subset {folder}", "image_dir": folder, "caption_extension": ".txt"} | settings)


def dataset(*subsets: SubsetSettings, **settings) -> DatasetSettings:
    return DatasetSettings(**{"place": "my.toml, [[datasets]] 1", "resolution_wh": (64, 64), "subsets": subsets} | settings)


def names(items) -> list[str]:
    return [item.path.name for item in items]


def assert_apart(data: TrainingSet) -> None:
    assert not {item.path.resolve() for item in data.items} & {item.path.resolve() for item in data.validation}
    assert [item.index for item in data.all_items] == list(range(len(data.all_items)))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99])
def test_count(share: float):
    assert validation_count(0, share) == validation_count(1, share) == 0
    for images in range(2, 200):
        count = validation_count(images, share)
        assert 1 <= count < images
        assert count == images - math.ceil(images * (1 - share)) or count in (1, images - 1)


@pytest.mark.parametrize(("images", "share", "count"), [(10, 0.0, 0), (10, 1.0, 10), (1, 1.0, 1), (10, 0.1, 1), (5, 0.3, 1),
                                                        (10, 0.3, 3), (100, 0.25, 25), (2, 0.5, 1), (3, 0.99, 2)])  # fmt: skip
def test_counts_of_the_reference_without_its_overlap(images: int, share: float, count: int):
    assert validation_count(images, share) == count


def chosen_names(
    count: int, seed: int, *, without: int | None = None, folder: str = "/data", also: Sequence[str] = ()
) -> set[str]:
    names = [f"{number:03}.png" for number in range(count) if number != without]
    return {Path(path).name for path in chosen_for_validation([f"{folder}/{name}" for name in (*names, *also)], 0.2, seed=seed)}


def test_choice_depends_on_names_and_seed_alone():
    paths = [f"/data/{number:03}.png" for number in range(40)]
    chosen = chosen_for_validation(paths, 0.2, seed=17)
    assert len(chosen) == 8 and chosen == chosen_for_validation(list(reversed(paths)), 0.2, seed=17)
    assert chosen_names(40, 17) == chosen_names(40, 17, folder="/elsewhere") != chosen_names(40, 18)
    assert Counter(name for seed in range(300) for name in chosen_names(40, seed)).most_common()[-1][1] > 30  # all have a chance


@pytest.mark.parametrize("seed", range(20))
def test_an_image_added_removed_or_renamed_moves_at_most_one_other(seed: int):
    before = chosen_names(40, seed)
    for removed in range(40):
        name = f"{removed:03}.png"
        assert len((before - {name}) ^ chosen_names(40, seed, without=removed)) <= 1
        renamed = chosen_names(40, seed, without=removed, also=["new name.png"])
        assert len((before - {name}) ^ (renamed - {"new name.png"})) <= 1
    for count in range(2, 60):
        added = chosen_names(count + 1, seed) - {f"{count:03}.png"}
        assert len(chosen_names(count, seed) ^ added) <= 1


def test_two_images_of_one_name_are_two(tmp_path: Path):
    paths = [f"/data/{folder}/{number}.png" for folder in "ab" for number in range(5)]
    assert len(chosen_for_validation(paths, 0.3, seed=1)) == 3


def test_split_of_a_folder(tmp_path: Path):
    folder = pictures(tmp_path / "a", 10)
    settings = dataset(subset(folder, num_repeats=5, flip_aug=True), validation_split=0.3, validation_seed=3)
    data = scan((settings,))
    assert len(data.items) == 7 and len(data.validation) == 3
    assert_apart(data)
    chosen = chosen_for_validation([str(folder / f"{number:02}.png") for number in range(10)], 0.3, seed=3)
    assert {str(item.path) for item in data.validation} == chosen
    assert {item.repeats for item in data.validation} == {1} and {item.repeats for item in data.items} == {5}
    assert all(item.subset is data.validation[0].subset for item in data.validation)  # one copy of the settings
    assert data.validation[0].subset == without_chance(settings.subsets[0])
    assert data.validation[0].caption == f"caption {int(data.validation[0].path.stem)}"


def test_seed_is_that_of_the_dataset_else_of_the_run_else_zero(tmp_path: Path):
    folder = pictures(tmp_path / "a", 20)

    def chosen(seed: int | None, **settings) -> list[str]:
        return names(scan((dataset(subset(folder), validation_split=0.2, **settings),), seed=seed).validation)

    assert chosen(None) == chosen(0) == chosen(5, validation_seed=0)
    assert chosen(5) == chosen(None, validation_seed=5) == chosen(7, validation_seed=5)
    assert chosen(5) != chosen(0)


def test_each_subset_is_split_and_metadata_files_too(tmp_path: Path):
    first, second = pictures(tmp_path / "a", 10), pictures(tmp_path / "b", 4)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({f"{number:02}.png": {"caption": f"m {number}"} for number in reversed(range(4))}))
    data = scan((dataset(subset(first), subset(second, metadata_file=meta), validation_split=0.25),))
    counts = {folder: sum(item.path.parent == folder for item in data.validation) for folder in (first, second)}
    assert counts == {first: 2, second: 1}
    assert_apart(data)


def test_regularisation_images_never_validate_and_match_what_is_trained(tmp_path: Path):
    train, reg = pictures(tmp_path / "a", 10), pictures(tmp_path / "r", 3)
    data = scan((dataset(subset(train), subset(reg, is_reg=True), validation_split=0.4),))
    assert all(item.path.parent == train for item in data.validation) and len(data.validation) == 4
    assert sum(item.repeats for item in data.items if item.subset.is_reg) == 6  # as many as images that are trained
    assert_apart(data)


def test_one_image_alone_is_trained_and_a_split_of_one_validates_all(tmp_path: Path):
    one, many = pictures(tmp_path / "a", 1), pictures(tmp_path / "b", 3)
    data = scan((dataset(subset(one), validation_split=0.5), dataset(subset(many), validation_split=1.0)))
    assert names(data.items) == ["00.png"] and len(data.validation) == 3


@pytest.mark.parametrize("regular", [True, False])
def test_a_split_of_nothing_is_told(regular: bool, tmp_path: Path):
    one = pictures(tmp_path / "a", 1)
    subsets = [subset(one), *([subset(pictures(tmp_path / "r", 4), is_reg=True)] if regular else [])]
    data = scan((dataset(*subsets, validation_split=0.5),))
    assert data.validation == ()
    (warning,) = data.warnings
    assert warning.startswith(
        "my.toml, [[datasets]] 1: validation_split is 0.5, but nothing validates: a subset of a single image"
    )
    assert scan((dataset(*subsets),)).warnings == ()


def test_marked_subsets_validate_whole(tmp_path: Path):
    train, held_out = pictures(tmp_path / "a", 3), pictures(tmp_path / "v", 2)
    data = scan((dataset(subset(train), subset(held_out, is_validation=True, num_repeats=4)),))
    assert [item.path.parent for item in data.validation] == [held_out] * 2
    assert [item.path.parent for item in data.items] == [train] * 3
    assert_apart(data)


def test_nothing_left_to_train(tmp_path: Path):
    folder = pictures(tmp_path / "a", 2)
    with pytest.raises(DatasetError, match="all of the 2 images validate and none is left to train: lower validation_split"):
        scan((dataset(subset(folder, is_validation=True)),))


def test_what_validates_anywhere_is_trained_nowhere(tmp_path: Path):
    folder = pictures(tmp_path / "a", 10)
    datasets = (dataset(subset(folder), validation_split=0.3), dataset(subset(folder), place="my.toml, [[datasets]] 2"))
    data = scan(datasets)
    assert len(data.items) == 14 and len(data.validation) == 3
    assert_apart(data)
    assert "my.toml, [[datasets]] 2: 3 images validate elsewhere in this run and are therefore not trained here" in data.warnings


def test_one_split_for_two_resolutions_of_one_folder(tmp_path: Path):
    folder = pictures(tmp_path / "a", 10)
    datasets = tuple(dataset(subset(folder), validation_split=0.3, resolution_wh=(side, side)) for side in (64, 32))
    data = scan(datasets, seed=4)
    assert len(data.items) == 14 and len(data.validation) == 6
    assert not [text for text in data.warnings if "validate elsewhere" in text]
    assert_apart(data)


@pytest.mark.parametrize("validation_first", [True, False])
def test_an_image_marked_for_validation_is_not_trained_in_the_same_dataset(validation_first: bool, tmp_path: Path):
    folder = pictures(tmp_path / "a", 4)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({str(folder / "01.png"): {"caption": "held out"}}))
    subsets = [subset(None, metadata_file=meta, is_validation=True), subset(folder)]
    data = scan((dataset(*(subsets if validation_first else subsets[::-1])),))
    assert names(data.validation) == ["01.png"] and data.validation[0].caption == "held out"
    assert names(data.items) == ["00.png", "02.png", "03.png"]
    assert any("1 images validate elsewhere" in text for text in data.warnings)


def test_links_do_not_hide_that_a_file_validates(tmp_path: Path):
    folder = pictures(tmp_path / "a", 3)
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "other name.png").symlink_to(folder / "00.png")
    pictures(tmp_path / "single", 1, first=90)
    data = scan((dataset(subset(folder, is_validation=True)), dataset(subset(tmp_path / "linked"), subset(tmp_path / "single"))))
    assert names(data.items) == ["90.png"] and len(data.validation) == 3
    assert_apart(data)


def test_real_paths(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x.png").touch()
    real_path = RealPaths()
    assert real_path(tmp_path / "a" / "b" / ".." / "x.png") == real_path(tmp_path / "a" / "x.png")
    assert real_path(tmp_path / "a" / "x.png") != real_path(tmp_path / "a" / "y.png")


def test_copies_of_validation_images_are_not_trained(tmp_path: Path):
    folder, other = pictures(tmp_path / "a", 3), pictures(tmp_path / "b", 2)
    (other / "copy.png").write_bytes((folder / "01.png").read_bytes())
    data = scan((dataset(subset(folder, is_validation=True)), dataset(subset(other))))
    assert [item.path.name for item in data.items] == ["00.png", "01.png"]
    (warning,) = [text for text in data.warnings if "same bytes" in text]
    assert warning.startswith("1 images have the same bytes as one that validates")
    assert str(folder / "01.png") in warning and str(other / "copy.png") in warning
    clean = scan((dataset(subset(other), validation_split=0.5),))
    assert not [text for text in clean.warnings if "same bytes" in text]


def test_bucket_warnings_are_about_what_is_trained(tmp_path: Path):
    folder = pictures(tmp_path / "a", 4)
    held_out = pictures(tmp_path / "v", 1, size=(20, 20))
    data = scan((dataset(subset(folder), subset(held_out, is_validation=True), batch_size=4),))
    assert data.validation[0].size_wh == (20, 20) and data.warnings == ()


def test_a_bad_image_does_not_move_the_split_of_the_others(tmp_path: Path):
    folder = pictures(tmp_path / "a", 12)
    settings = (dataset(subset(folder), validation_split=0.25),)
    before = scan(settings)
    victim = before.items[0].path
    victim.write_bytes(b"")
    after = scan(settings, skip_bad_images=True)
    assert names(after.validation) == names(before.validation)
    assert names(after.items) == names(before.items)[1:]


def test_the_records_hold_what_validates_too(tmp_path: Path):
    folder = pictures(tmp_path / "a", 4)
    records = ImageRecords()
    data = scan((dataset(subset(folder), validation_split=0.5),), records=records)
    assert data.records is records
    assert {records.size_wh(item.path) for item in data.all_items} == {(64, 64)}


CHANCE = {"num_repeats": 7, "flip_aug": True, "color_aug": True, "random_crop": True, "face_crop_aug_range": (1.0, 2.0),
          "shuffle_caption": True, "caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2,
          "caption_tag_dropout_rate": 0.5, "token_warmup_min": 3, "token_warmup_step": 0.5}  # fmt: skip


def test_nothing_is_left_to_chance():
    settings = subset(Path("a"), enable_wildcard=True, caption_prefix="p", keep_tokens=2, loss_weight=0.5, **CHANCE)
    fixed = without_chance(settings)
    plain = SubsetSettings(place="", image_dir=None)
    for field in fields(SubsetSettings):
        wanted = plain if field.name in CHANCE else settings
        if field.name != "tags_joined":
            assert getattr(fixed, field.name) == getattr(wanted, field.name), field.name
    assert fixed.tags_joined
    assert without_chance(fixed) == fixed


@pytest.mark.parametrize("name", ["shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step"])
def test_tags_are_joined_where_training_handles_them(name: str):
    assert without_chance(subset(Path("a"), **{name: CHANCE[name]})).tags_joined
    assert not without_chance(subset(Path("a"), flip_aug=True, caption_dropout_rate=0.5)).tags_joined
