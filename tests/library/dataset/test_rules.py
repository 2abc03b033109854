"""Combinations that cannot work: one sentence, every place that has a part in it, and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.dataset.items import DatasetSettings
from tests.library.dataset.dataset_files import document, problems, read, write

ONE = "my.toml, [[datasets]] 1, subset 1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders a, b, c with images that nothing looks at, and masks for a and b."""
    for name in ("a", "b", "c", "masks/a", "masks/b"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def subsets(folder: Path, *tables: dict, dataset: dict | None = None) -> dict:
    """One dataset; the subsets' folders are a, b, c."""
    named = [{"image_dir": str(folder / name), **table} for name, table in zip("abc", tables, strict=False)]
    return {"general": {"resolution": 512}, "datasets": [{**(dataset or {}), "subsets": named}]}


def refused(folder: Path, content: dict, **flags) -> str:
    (text,) = problems(dataset_config=write(folder, content), **flags)
    return text


def warned(folder: Path, content: dict, **flags) -> list[str]:
    first, *others = read(dataset_config=write(folder, content), **flags)
    assert not any(dataset.warnings for dataset in others)
    return list(first.warnings)


def accepted(folder: Path, content: dict, **flags) -> tuple[DatasetSettings, ...]:
    return read(dataset_config=write(folder, content), **flags)


# ---------------------------------------------------------------- cached latents and text

CHANGES = [("random_crop", True), ("color_aug", True), ("face_crop_aug_range", [2.0, 4.0])]


@pytest.mark.parametrize(("key", "value"), CHANGES)
@pytest.mark.parametrize("flag", ["cache_latents", "cache_latents_to_disk"])
def test_chance_in_pixels_cannot_be_cached(key: str, value: object, flag: str, folder: Path):
    content = document(folder / "a", subset={key: value})
    text = refused(folder, content, **{flag: True})
    assert text.startswith(f"{ONE}: {key} cannot be combined with --{flag}: ") and text.endswith("drop one of the two")
    assert accepted(folder, content) and accepted(folder, content, cache_text_encoder_outputs_to_disk=True)


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_the_place_is_where_the_value_stands_and_told_once(key: str, value: object, folder: Path):
    content = subsets(folder, {}, {}, {})
    content["general"][key] = value
    assert refused(folder, content, cache_latents=True).startswith(f"my.toml, [general]: {key} cannot")
    flag = "2.0,4.0" if isinstance(value, list) else value
    text = refused(folder, subsets(folder, {}, {}), cache_latents=True, **{key: flag})
    assert text.startswith(f"--{key} cannot be combined with --cache_latents")
    in_each = subsets(folder, {key: value}, {key: value})
    assert len(problems(dataset_config=write(folder, in_each), cache_latents=True)) == 2


def test_validation_images_are_never_cropped_at_random(folder: Path):
    content = subsets(folder, {}, {"is_validation": True, "random_crop": True})
    assert accepted(folder, content, cache_latents=True)


def test_a_flag_that_no_subset_follows_is_no_problem(folder: Path):
    content = subsets(folder, {"random_crop": False}, {"random_crop": False})
    assert accepted(folder, content, random_crop=True, cache_latents=True)


@pytest.mark.parametrize("flag", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
def test_cached_text_cannot_warm_up(flag: str, folder: Path):
    text = refused(folder, document(folder / "a", subset={"token_warmup_step": 0.5}), **{flag: True})
    assert text.startswith(f"{ONE}: token_warmup_step cannot be combined with --{flag}: ")
    assert refused(folder, document(folder / "a"), token_warmup_step=10.0, **{flag: True}).startswith(
        "--token_warmup_step cannot"
    )
    varied = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.1, "enable_wildcard": True}
    assert accepted(folder, document(folder / "a", subset=varied), **{flag: True})


def test_faces_are_cropped_without_buckets_only(folder: Path):
    content = document(folder / "a", general={"enable_bucket": True}, subset={"face_crop_aug_range": [2.0, 4.0]})
    text = refused(folder, content)
    assert text.startswith(f"{ONE}: face_crop_aug_range cannot be combined with my.toml, [general]: enable_bucket: ")
    content["general"]["enable_bucket"] = False
    assert accepted(folder, content, enable_bucket=True)


# ---------------------------------------------------------------- masks


def test_mask_images_need_the_flag_and_the_flag_needs_masks(folder: Path):
    content = subsets(folder, {"conditioning_data_dir": str(folder / "masks" / "a")})
    text = refused(folder, content)
    assert text == (
        f"{ONE}: conditioning_data_dir names mask images, which are only used with --masked_loss: "
        "give --masked_loss, or take conditioning_data_dir out"
    )
    (settings,) = accepted(folder, content, masked_loss=True)
    assert settings.subsets[0].conditioning_data_dir == folder / "masks" / "a"
    text = refused(folder, subsets(folder, {}), masked_loss=True)
    assert text.startswith("--masked_loss finds no masks, because no subset of my.toml has any: set conditioning_data_dir")
    assert accepted(folder, subsets(folder, {"alpha_mask": True}), masked_loss=True)
    assert accepted(folder, subsets(folder, {}), masked_loss=True, alpha_mask=True)


def test_mask_images_win_over_transparency(folder: Path):
    masks = [{"conditioning_data_dir": str(folder / "masks" / name)} for name in "ab"]
    content = subsets(folder, {**masks[0], "alpha_mask": True})
    assert warned(folder, content, masked_loss=True) == [
        f"{ONE}: alpha_mask is not used where there are mask images: {ONE}: conditioning_data_dir"
    ]
    both = subsets(folder, *masks)
    both["datasets"].append({"subsets": [{"image_dir": str(folder / "c")}]})
    assert warned(folder, both, masked_loss=True, alpha_mask=True) == [
        f"--alpha_mask is not used where there are mask images: {ONE}: conditioning_data_dir and 1 more"
    ]
    masked, plain = accepted(folder, both, masked_loss=True, alpha_mask=True)
    assert [s.alpha_mask for s in masked.subsets] == [False, False] and plain.subsets[0].alpha_mask


def test_masks_with_random_crops_work(folder: Path):
    content = subsets(folder, {"conditioning_data_dir": str(folder / "masks" / "a"), "random_crop": True})
    assert accepted(folder, content, masked_loss=True)[0].subsets[0].random_crop


# ---------------------------------------------------------------- validation


def test_regularisation_images_do_not_validate(folder: Path):
    text = refused(folder, subsets(folder, {}, {"is_reg": True, "is_validation": True}))
    two = "my.toml, [[datasets]] 1, subset 2"
    assert text.startswith(f"{two}: is_reg cannot be combined with {two}: is_validation: ")
    whole = subsets(folder, {"is_reg": True}, dataset={"is_validation": True})
    whole["datasets"].append({"subsets": [{"image_dir": str(folder / "b")}]})
    assert refused(folder, whole).startswith(f"{ONE}: is_reg cannot be combined with my.toml, [[datasets]] 1: is_validation")


def test_a_dataset_that_validates_has_nothing_to_split(folder: Path):
    content = subsets(folder, {}, dataset={"is_validation": True, "validation_split": 0.5})
    content["datasets"].append({"subsets": [{"image_dir": str(folder / "b")}]})
    text = refused(folder, content)
    assert text.startswith(
        "my.toml, [[datasets]] 1: validation_split cannot be combined with my.toml, [[datasets]] 1: is_validation"
    )
    del content["datasets"][0]["validation_split"]
    assert accepted(folder, content, validation_split=0.5)  # a share for the other datasets
    partly = subsets(folder, {}, {"is_validation": True}, dataset={"validation_split": 0.5})
    assert accepted(folder, partly)


def test_something_must_be_left_to_train(folder: Path):
    text = refused(folder, subsets(folder, {}, dataset={"is_validation": True}))
    assert text.startswith("all images validate, so that nothing is left to train: my.toml, [[datasets]] 1: is_validation; ")
    assert "nothing is left to train: --validation_split;" in refused(folder, subsets(folder, {}), validation_split=1.0)
    with_reg = subsets(folder, {}, {"is_reg": True}, dataset={"validation_split": 1})
    assert "nothing is left to train: my.toml, [[datasets]] 1: validation_split;" in refused(folder, with_reg)


def test_a_split_of_one_marks_the_whole_dataset_for_validation(folder: Path):
    content = subsets(folder, {}, {"is_reg": True}, dataset={"validation_split": 1.0})
    content["datasets"].append({"subsets": [{"image_dir": str(folder / "c")}]})
    first, second = accepted(folder, content, save_best=True)
    assert [subset.is_validation for subset in first.subsets] == [True, False]
    assert not second.subsets[0].is_validation


@pytest.mark.parametrize(
    ("flag", "value"),
    [("save_best", True), ("max_validation_steps", 5), ("validate_every_n_steps", 10), ("validate_every_n_epochs", 1)],
)
def test_validation_needs_images(flag: str, value: object, folder: Path):
    text = refused(folder, subsets(folder, {}), **{flag: value})
    assert text.startswith(f"--{flag} needs validation images, and my.toml has none: ") and text.endswith(f"or drop --{flag}")
    assert accepted(folder, subsets(folder, {}), validation_split=0.1, **{flag: value})
    assert accepted(folder, subsets(folder, {}, {"is_validation": True}), **{flag: value})
    assert accepted(folder, subsets(folder, {}, dataset={"validation_split": 0.1}), **{flag: value})


def test_flags_of_validation_are_named_together(folder: Path):
    text = refused(folder, subsets(folder, {}), save_best=True, max_validation_steps=3)
    assert text.startswith("--max_validation_steps and --save_best need validation images")


def test_a_seed_without_validation(folder: Path):
    assert warned(folder, subsets(folder, {}), validation_seed=3) == [
        "--validation_seed does nothing: no images validate (see validation_split)"
    ]
    assert warned(folder, subsets(folder, {}), validation_seed=3, validation_split=0.2) == []


# ---------------------------------------------------------------- what is perhaps not meant


def test_captions_that_are_always_empty(folder: Path):
    content = subsets(folder, {"caption_dropout_rate": 1}, {})
    content["general"]["caption_dropout_every_n_epochs"] = 1
    assert warned(folder, content) == [
        "my.toml, [general]: caption_dropout_every_n_epochs is 1: every showing trains with an empty caption",
        f"{ONE}: caption_dropout_rate is 1: every showing trains with an empty caption",
    ]
    assert warned(folder, subsets(folder, {"caption_dropout_every_n_epochs": 2, "caption_dropout_rate": 0.9})) == []


def test_a_strength_of_nothing(folder: Path):
    text = refused(folder, subsets(folder, {}, dataset={"network_multiplier": 0}))
    assert text.startswith("my.toml, [[datasets]] 1: network_multiplier is 0, ") and "take the dataset out" in text
    content = subsets(folder, {}, {"is_validation": True}, dataset={"network_multiplier": 0})
    assert "network_multiplier is 0" in refused(folder, content)
    content["datasets"] = [
        {"subsets": content["datasets"][0]["subsets"][:1]},
        {"network_multiplier": 0, "subsets": content["datasets"][0]["subsets"][1:]},
    ]
    assert accepted(folder, content)  # validation is always at full strength


def test_a_misspelt_attribute(folder: Path):
    attributes = {"diff_output_preservaton": True, "artist": "someone"}
    (text,) = warned(folder, subsets(folder, {"custom_attributes": attributes}))
    assert text.startswith(f"{ONE}: custom_attributes: diff_output_preservaton is an attribute that training does not know")
    assert text.endswith("(did you mean diff_output_preservation?)")


# ---------------------------------------------------------------- several at once


def test_clashes_are_told_together_with_other_problems(folder: Path):
    content = subsets(folder, {"random_crop": True, "flip_aug": 1, "token_warmup_step": 5})
    found = problems(dataset_config=write(folder, content), cache_latents=True, cache_text_encoder_outputs=True, save_best=True)
    assert [text.partition(" cannot")[0] for text in found] == [
        f"{ONE}: flip_aug is 1, but must be true or false", f"{ONE}: random_crop", f"{ONE}: token_warmup_step"]  # fmt: skip


def test_what_is_missing_is_not_asked_while_the_file_has_problems(folder: Path):
    content = subsets(folder, {"conditioning_data_dir": 5})
    assert refused(folder, content, masked_loss=True) == f"{ONE}: conditioning_data_dir is 5, but must be a text"
