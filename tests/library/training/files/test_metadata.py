"""Metadata of a small run: every key of the reference's list, and its value."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.errors import UserError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.declare import groups_of, options_of
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.sd.metadata import describe
from library.training.files import metadata
from library.training.files.metadata import GIVEN_KEYS, MINIMUM_KEYS, OPTION_KEYS, LoraMetadata
from library.training.preflight import check_run
from tests.tiny_arch import TinyArchitecture

MODEL = {"ss_base_model_version": "tiny", "modelspec.architecture": "tiny/lora", "modelspec.implementation": "tiny"}
MODEL_BYTES, VAE_BYTES = b"m" * 0x100010, b"vae"
SIZES = {"a": (128, 128), "b": (96, 160), "c": (128, 130)}  # buckets 64x64, 48x80, 64x64
FRAME_KEYS = {
    "resolution": "64",
    "enable_bucket": "true",
    "min_bucket_reso": "32",
    "max_bucket_reso": "128",
    "bucket_reso_steps": "16",
}

# key -> value with nothing but the flags of ``options``; those that depend on the dataset are tested below
CONSTANT = {
    "ss_output_name": "mine", "ss_learning_rate": "0.01", "ss_unet_lr": "None", "ss_text_encoder_lr": "None",
    "ss_num_validation_images": "0", "ss_gradient_checkpointing": "False", "ss_gradient_accumulation_steps": "1",
    "ss_max_train_steps": "5", "ss_lr_warmup_steps": "0", "ss_lr_scheduler": "constant",
    "ss_network_module": "networks.lora_anima", "ss_network_dim": "2", "ss_network_alpha": "1",
    "ss_network_dropout": "None", "ss_mixed_precision": "no", "ss_full_fp16": "False", "ss_v2": "False",
    "ss_base_model_version": "tiny", "ss_clip_skip": "None", "ss_max_token_length": "None", "ss_cache_latents": "False",
    "ss_seed": "7", "ss_lowram": "False", "ss_noise_offset": "None", "ss_multires_noise_iterations": "None",
    "ss_multires_noise_discount": "0.3", "ss_adaptive_noise_scale": "None", "ss_zero_terminal_snr": "False",
    "ss_noise_offset_random_strength": "False", "ss_ip_noise_gamma": "None", "ss_ip_noise_gamma_random_strength": "False",
    "ss_training_comment": "None", "ss_sd_scripts_commit_hash": "(unknown)", "ss_optimizer": "torch.optim.adamw.AdamW",
    "ss_max_grad_norm": "1.0", "ss_caption_dropout_rate": "0.0", "ss_caption_dropout_every_n_epochs": "0",
    "ss_caption_tag_dropout_rate": "0.0", "ss_face_crop_aug_range": "None", "ss_prior_loss_weight": "1.0",
    "ss_min_snr_gamma": "None", "ss_scale_weight_norms": "None", "ss_debiased_estimation": "False", "ss_loss_type": "l2",
    "ss_huber_schedule": "snr", "ss_huber_scale": "1.0", "ss_huber_c": "0.1", "ss_fp8_base": "False",
    "ss_fp8_base_unet": "False", "ss_validation_seed": "None", "ss_validation_split": "0.0",
    "ss_max_validation_steps": "None", "ss_validate_every_n_epochs": "None", "ss_validate_every_n_steps": "None",
    "ss_resize_interpolation": "None", "ss_sd_model_name": "dit.safetensors", "ss_vae_name": "vae.safetensors",
    "ss_sd_model_hash": hashlib.sha256(b"m" * 0x10).hexdigest()[:8],
    "ss_new_sd_model_hash": hashlib.sha256(MODEL_BYTES).hexdigest(),
    "ss_vae_hash": hashlib.sha256(b"").hexdigest()[:8], "ss_new_vae_hash": hashlib.sha256(VAE_BYTES).hexdigest(),
}  # fmt: skip
COUNTS = {"ss_num_train_images", "ss_num_reg_images", "ss_num_batches_per_epoch", "ss_num_epochs"}
TIMES = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_steps", "ss_epoch"}
FILE_KEYS = {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs"}  # 1a
FLAG_KEYS = {"ss_batch_size_per_device", "ss_total_batch_size", "ss_resolution", "ss_color_aug", "ss_flip_aug",
             "ss_random_crop", "ss_shuffle_caption", "ss_enable_bucket", "ss_bucket_no_upscale", "ss_min_bucket_reso",
             "ss_max_bucket_reso", "ss_keep_tokens", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency",
             "ss_bucket_info"}  # 1b  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """``pictures("3_cat", "a", "b", captions=...)`` draws one image per name; returns the folder."""

    def draw(folder: str, *names: str, caption: str = "Cat, blue Sky, cat") -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.new("RGB", SIZES[name], (len(folder), 0, 0)).save(path / f"{name}.png")  # no folder has copies of another's
            (path / f"{name}.txt").write_text(caption, encoding="utf-8")
        return path

    return draw


@pytest.fixture
def described(tmp_path):
    """``described("--flag=x", ...)`` checks a run with these flags and returns its LoraMetadata."""
    (tmp_path / "dit.safetensors").write_bytes(MODEL_BYTES)
    (tmp_path / "vae.safetensors").write_bytes(VAE_BYTES)

    def describe(*arguments: str, optimizer: str = "torch.optim.adamw.AdamW", model: dict[str, str] = MODEL) -> LoraMetadata:
        base = [f"--pretrained_model_name_or_path={tmp_path / 'dit.safetensors'}", "--qwen3=x",
                f"--vae={tmp_path / 'vae.safetensors'}", f"--output_dir={tmp_path / 'out'}", "--output_name=mine",
                "--network_module=networks.lora_anima", "--network_dim=2", "--learning_rate=1e-2",
                "--caption_extension=.txt", "--max_train_steps=5"]  # fmt: skip
        options = read_options(AnimaTrainOptions, [*base, *arguments])
        return LoraMetadata(check_run(options, TinyArchitecture()), seed=7, model=model, optimizer=optimizer)

    return describe


def general(*lines: str) -> str:
    return "\n".join(["[general]", *(f"{key} = {value}" for key, value in FRAME_KEYS.items()), *lines, ""])


def dataset(*subsets: str, keys: str = "batch_size = 2") -> str:
    return "\n".join(["[[datasets]]", keys, *(f"[[datasets.subsets]]\n{subset}" for subset in subsets), ""])


@pytest.fixture
def with_file(tmp_path, described):
    """``with_file(general(), dataset(...), flags=())``: the run of this dataset file."""

    def describe(*tables: str, flags: tuple[str, ...] = ()) -> LoraMetadata:
        (tmp_path / "set.toml").write_text("".join(tables), encoding="utf-8")
        return described(f"--dataset_config={tmp_path / 'set.toml'}", *flags)

    return describe


def folder(path: Path, *lines: str) -> str:
    return "\n".join([f"image_dir = '{path.as_posix()}'", *lines])


# ---------------------------------------------------------------- 1, 1a: with a dataset file


def test_all_keys_with_a_dataset_file(with_file, pictures):
    keys = with_file(general(), dataset(folder(pictures("cats", "a", "b")))).at(step=4, epoch=2)
    own = {key: value for key, value in keys.items() if key.startswith("ss_")}
    assert own.keys() == {*CONSTANT, *COUNTS, *TIMES, *FILE_KEYS}
    assert {key: own[key] for key in CONSTANT} == CONSTANT
    assert (own["ss_steps"], own["ss_epoch"], own["ss_num_epochs"]) == ("4", "2", "3")
    assert 0 <= int(own["ss_session_id"]) < 2**32
    assert float(own["ss_training_started_at"]) <= float(own["ss_training_finished_at"]) <= time.time()


def test_what_else_it_takes_to_repeat_a_run(with_file, pictures, tmp_path):
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        save_file({"lora_unet_x.alpha": torch.ones(1)}, file)
    flags = ("--self_attn_lr=1e-5", "--mlp_lr=0", "--attn_mode=sdpa", "--split_attn", "--lr_scheduler_args", "a=1", "b=2",
             f"--network_weights={files[0]}", "--base_weights", *map(str, files), "--base_weights_multiplier", "0.5",
             "--t5_max_token_length=256", "--huggingface_token=hf_secret")  # fmt: skip
    keys = with_file(general(), dataset(folder(pictures("cats", "a"))), flags=flags).at(step=4, epoch=2)
    given = {
        "ss_self_attn_lr": "1e-05", "ss_mlp_lr": "0.0", "ss_attn_mode": "sdpa", "ss_split_attn": "True",
        "ss_lr_scheduler_args": "['a=1', 'b=2']", "ss_network_weights": "one.safetensors", "ss_t5_max_token_length": "256",
        "ss_base_weights": '[["one.safetensors", 0.5], ["two.safetensors", 1.0]]',
    }  # fmt: skip
    assert {key: keys[key] for key in given} == given
    assert {key for key in keys if key.startswith("ss_")} == {*CONSTANT, *COUNTS, *TIMES, *FILE_KEYS, *given}
    assert str(tmp_path) not in str(keys) and "hf_secret" not in str(keys)


def test_every_option_that_is_recorded_is_there():
    sets = (AnimaTrainOptions, SdxlTrainOptions)
    names = {option.name for options in sets for group in groups_of(options).values() for option in options_of(group)}
    assert set(GIVEN_KEYS) | set(OPTION_KEYS) <= names and not set(GIVEN_KEYS) & set(OPTION_KEYS)


def test_datasets_are_described(with_file, pictures):
    cats, reg = pictures("cats", "a", "b", "c"), pictures("all", "a", caption="animal")
    text = general('resize_interpolation = "area"') + dataset(
        folder(cats, "num_repeats = 2", "flip_aug = true", 'caption_prefix = "x,"', 'resize_interpolation = "box"'),
        folder(reg, "is_reg = true", 'class_tokens = "animal"'),
        keys='batch_size = 2\nresize_interpolation = "cubic"',
    )
    keys = with_file(text).at(step=1, epoch=0)
    frequency = {"cats": {"cat": 6, "blue sky": 3}, "all": {"animal": 1}}
    subset = {
        "num_repeats": 2, "color_aug": False, "flip_aug": True, "random_crop": False, "shuffle_caption": False,
        "keep_tokens": 0, "keep_tokens_separator": "", "secondary_separator": None, "enable_wildcard": False,
        "caption_prefix": "x,", "caption_suffix": None, "resize_interpolation": "box", "image_dir": "cats",
        "class_tokens": None, "is_reg": False, "img_count": 3,
    }  # fmt: skip
    error = (0 + abs(96 / 160 - 48 / 80) + abs(128 / 130 - 1) + 0) / 4
    (found,) = json.loads(keys["ss_datasets"])
    assert found.pop("bucket_info") == {
        "buckets": {"3": {"resolution": [48, 80], "count": 2}, "4": {"resolution": [64, 64], "count": 10}},
        "mean_img_ar_error": pytest.approx(error),
    }
    assert found == {
        "is_dreambooth": True, "batch_size_per_device": 2, "num_train_images": 6, "num_reg_images": 6,
        "resolution": [64, 64], "enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128,
        "tag_frequency": frequency, "resize_interpolation": "cubic",
        "subsets": [subset, {**subset, "num_repeats": 1, "flip_aug": False, "caption_prefix": None, "img_count": 1,
                             "resize_interpolation": "cubic", "image_dir": "all", "class_tokens": "animal", "is_reg": True}],
    }  # fmt: skip
    assert (keys["ss_num_train_images"], keys["ss_num_reg_images"], keys["ss_num_batches_per_epoch"]) == ("6", "6", "6")
    assert json.loads(keys["ss_tag_frequency"]) == frequency
    assert json.loads(keys["ss_dataset_dirs"]) == {"cats": {"n_repeats": 2, "img_count": 3}}


def test_validation_images_are_counted_apart(with_file, pictures):
    cats, held_back = pictures("cats", "a", "b", "c"), pictures("held_back", "b", caption="dog")
    text = (
        general()
        + dataset(folder(cats, "num_repeats = 2", "color_aug = true", "random_crop = true"), keys="validation_split = 0.34")
        + dataset(folder(held_back, "is_validation = true"))
    )
    keys = with_file(text, flags=("--validation_seed=3", "--validate_every_n_steps=2")).at(step=1, epoch=0)
    (found,) = json.loads(keys["ss_datasets"])
    (subset,) = found["subsets"]
    assert (subset["img_count"], subset["color_aug"], subset["random_crop"]) == (2, True, True)
    assert found["num_train_images"] == 4 and sum(b["count"] for b in found["bucket_info"]["buckets"].values()) == 4
    assert (keys["ss_num_train_images"], keys["ss_num_validation_images"]) == ("4", "2")
    assert (keys["ss_validation_seed"], keys["ss_validate_every_n_steps"]) == ("3", "2")
    assert json.loads(keys["ss_tag_frequency"]) == {"cats": {"cat": 4, "blue sky": 2}}
    assert json.loads(keys["ss_dataset_dirs"]) == {"cats": {"n_repeats": 2, "img_count": 2}}


def test_notes_are_of_one_file_alone(small):
    made = small()
    assert made.at(step=1, epoch=0, notes={"ss_validation_loss": "0.5"})["ss_validation_loss"] == "0.5"
    assert "ss_validation_loss" not in made.at(step=1, epoch=0)
    bare = small("--no_metadata").at(step=1, epoch=0, notes={"ss_validation_loss": "0.5"})
    assert "ss_validation_loss" not in bare


def test_of_equal_names_all_dirs_but_the_first_tags_count(with_file, pictures):
    first, second = pictures("one/cats", "a"), pictures("two/cats", "a", "b", caption="dog")
    keys = with_file(general(), dataset(folder(first)), dataset(folder(second))).at(step=1, epoch=0)
    assert json.loads(keys["ss_tag_frequency"]) == {"cats": {"cat": 2, "blue sky": 1}}
    assert json.loads(keys["ss_dataset_dirs"]) == {
        "cats": {"n_repeats": 1, "img_count": 1},
        "cats (2)": {"n_repeats": 1, "img_count": 2},
    }


def test_a_metadata_file_counts_its_tags_only(with_file, pictures, tmp_path):
    entry = {"caption": "a cat, asleep", "tags": "Cat, sofa"}
    (tmp_path / "meta.json").write_text(json.dumps({"a.png": entry, "b.png": {"caption": "no tags"}}))
    images = pictures("cats", "a", "b")
    text = general() + dataset(folder(images, f"metadata_file = '{(tmp_path / 'meta.json').as_posix()}'"))
    keys = with_file(text).at(step=1, epoch=0)
    (found,) = json.loads(keys["ss_datasets"])
    (subset,) = found["subsets"]
    assert not found["is_dreambooth"] and subset["metadata_file"] == "meta.json" and subset["image_dir"] == "cats"
    assert "is_reg" not in subset and "class_tokens" not in subset
    assert json.loads(keys["ss_tag_frequency"]) == {"meta.json": {"cat": 1, "sofa": 1}}
    assert json.loads(keys["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 1, "img_count": 2}}


def test_every_line_of_a_wildcard_caption_has_tags(with_file, pictures):
    images = pictures("cats", "a", caption="cat, sofa\ndog, sofa\n")
    keys = with_file(general("enable_wildcard = true"), dataset(folder(images))).at(step=1, epoch=0)
    assert json.loads(keys["ss_tag_frequency"]) == {"cats": {"cat": 1, "sofa": 2, "dog": 1}}


def test_without_upscaling_the_buckets_in_use_are_numbered(with_file, pictures):
    images = pictures("cats", "a", "b")
    text = general("bucket_no_upscale = true") + dataset(folder(images))
    (found,) = json.loads(with_file(text).at(step=1, epoch=0)["ss_datasets"])
    assert found["bucket_info"]["buckets"] == {
        "0": {"resolution": [48, 80], "count": 1},
        "1": {"resolution": [64, 64], "count": 1},
    }


# ---------------------------------------------------------------- 1b: without one


def by_flags(images: Path) -> tuple[str, ...]:
    return (f"--train_data_dir={images}", *(f"--{key}={value}" for key, value in FRAME_KEYS.items() if value != "true"))


def test_all_keys_without_a_dataset_file(described, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    pictures("train/3_cat", "a", "b")
    pictures("reg/1_animal", "c", caption="animal")
    flags = ("--enable_bucket", "--train_batch_size=2", "--gradient_accumulation_steps=3", "--keep_tokens=1", "--color_aug")
    made = described(*by_flags(tmp_path / "train"), f"--reg_data_dir={tmp_path / 'reg'}", *flags, "--flip_aug")
    own = {key: value for key, value in made.at(step=1, epoch=0).items() if key.startswith("ss_")}
    assert own.keys() == {*CONSTANT, *COUNTS, *TIMES, *FLAG_KEYS}
    texts = {
        "ss_batch_size_per_device": "2", "ss_total_batch_size": "12", "ss_resolution": "(64, 64)", "ss_color_aug": "True",
        "ss_flip_aug": "True", "ss_random_crop": "False", "ss_shuffle_caption": "False", "ss_enable_bucket": "True",
        "ss_bucket_no_upscale": "False", "ss_min_bucket_reso": "32", "ss_max_bucket_reso": "128", "ss_keep_tokens": "1",
        "ss_num_train_images": "6", "ss_num_reg_images": "6",
    }  # fmt: skip
    assert {key: own[key] for key in texts} == texts
    assert json.loads(own["ss_dataset_dirs"]) == {"3_cat": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(own["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(own["ss_tag_frequency"]) == {"3_cat": {"cat": 4, "blue sky": 2}, "1_animal": {"animal": 1}}
    assert json.loads(own["ss_bucket_info"])["buckets"] == {
        "3": {"resolution": [48, 80], "count": 3},
        "4": {"resolution": [64, 64], "count": 9},
    }


def test_no_buckets_are_null(described, pictures, tmp_path):
    pictures("train/1_cat", "a")
    assert described(*by_flags(tmp_path / "train")).at(step=1, epoch=0)["ss_bucket_info"] == "null"


# ---------------------------------------------------------------- options


@pytest.fixture
def small(described, pictures, tmp_path):
    """``small("--flag=x", ...)``: the run of one picture in a folder."""
    pictures("train/1_cat", "a")

    def describe(*flags: str, **changes) -> LoraMetadata:
        return described(*by_flags(tmp_path / "train"), *flags, **changes)

    return describe


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--cache_latents"], {"ss_cache_latents": "True"}),
        (["--cache_latents_to_disk"], {"ss_cache_latents": "True"}),
        (["--network_args", "a=1", "b=x=y"], {"ss_network_args": '{"a": "1", "b": "x=y"}'}),
        (["--network_args", "a=1", "--network_dropout=0.5"], {"ss_network_args": '{"a": "1", "dropout": 0.5}'}),
        (["--text_encoder_lr", "5e-5", "0", "--network_train_unet_only"], {"ss_text_encoder_lr": "[5e-05, 0.0]"}),
        (
            ["--text_encoder_lr", "5e-5", "--network_train_unet_only", "--network_module=tests.networks.third_party"],
            {"ss_text_encoder_lr": "5e-05"},
        ),
        (["--lr_warmup_steps=10%", "--lr_scheduler=cosine"], {"ss_lr_warmup_steps": "0.1", "ss_lr_scheduler": "cosine"}),
        (["--max_train_epochs=4"], {"ss_max_train_steps": "4", "ss_num_epochs": "4"}),
    ],
)
def test_options_are_recorded(small, flags, expected):
    keys = small(*flags).at(step=1, epoch=0)
    assert {key: keys[key] for key in expected} == expected


def test_the_last_file_counts_the_epoch_it_ends_in(with_file, pictures):
    made = with_file(general(), dataset(folder(pictures("cats", "a", "c", "b"))))  # 2 batches an epoch, 5 steps
    assert made.at(step=5, epoch=2)["ss_epoch"] == "2"
    assert made.at(step=5, epoch=2, last=True)["ss_epoch"] == "3"


def test_files_of_a_run_share_the_session(small):
    made = small()
    first, second = made.at(step=1, epoch=1), made.at(step=2, epoch=2)
    same = ("ss_session_id", "ss_training_started_at")
    assert all(first[key] == second[key] for key in same)
    assert small().at(step=1, epoch=1)["ss_session_id"] != first["ss_session_id"]


def test_no_metadata_keeps_the_minimum(small):
    assert set(MINIMUM_KEYS) == {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
                                 "ss_network_args"}  # fmt: skip
    keys = small("--no_metadata", "--network_args", "a=1").at(step=1, epoch=0)
    assert {key for key in keys if key.startswith("ss_")} == set(MINIMUM_KEYS)
    assert keys["modelspec.title"] == "mine" and keys["modelspec.architecture"] == "tiny/lora"


# ---------------------------------------------------------------- modelspec


def spec(made: LoraMetadata) -> dict[str, str]:
    keys = made.at(step=1, epoch=0)
    return {key.removeprefix("modelspec."): value for key, value in keys.items() if key.startswith("modelspec.")}


def test_modelspec_of_a_plain_run(small):
    found = spec(small())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", found.pop("date"))
    assert found == {"sai_model_spec": "1.0.1", "architecture": "tiny/lora", "implementation": "tiny", "title": "mine",
                     "resolution": "64x64", "implementation_version": "atelier/1"}  # fmt: skip


def test_modelspec_of_what_the_user_says(small, tmp_path):
    (tmp_path / "thumb.png").write_bytes(b"png")
    texts = {"title": "T", "author": "A", "description": "D", "license": "L", "tags": "x,y", "usage_hint": "U",
             "merged_from": "M", "trigger_phrase": "P", "preprocessor": "R", "is_negative_embedding": "true"}  # fmt: skip
    flags = [f"--metadata_{name}={value}" for name, value in texts.items()]
    found = spec(small(*flags, f"--metadata_thumbnail={tmp_path / 'thumb.png'}", "--max_timestep=900"))
    assert {name: found[name] for name in texts} == texts
    assert found["thumbnail"] == "data:image/png;base64,cG5n" and found["timestep_range"] == "0,900"


def test_a_missing_thumbnail_is_an_error_and_an_url_kept(small):
    with pytest.raises(UserError, match="gone.png: there is no such file"):
        small("--metadata_thumbnail=gone.png")
    assert spec(small("--metadata_thumbnail=data:image/png;base64,eA=="))["thumbnail"] == "data:image/png;base64,eA=="


def test_the_prediction_type_is_the_architectures(small):
    assert "prediction_type" not in spec(small())
    assert spec(small(model={**MODEL, "modelspec.prediction_type": "v"}))["prediction_type"] == "v"


# ---------------------------------------------------------------- hashes


def test_hashes_that_are_not_ready_can_be_left_out(small, monkeypatch):
    ready = threading.Event()
    monkeypatch.setattr(metadata, "new_hash", lambda path: str(ready.wait(10)))
    made = small()
    keys = made.at(step=1, epoch=0, wait=False)
    assert "ss_new_sd_model_hash" not in keys and "ss_new_vae_hash" not in keys and keys["ss_sd_model_name"] == "dit.safetensors"
    ready.set()
    assert made.at(step=1, epoch=0)["ss_new_vae_hash"] == "True"


def test_no_exit_waits_for_hashing(small, monkeypatch):
    ready = threading.Event()
    monkeypatch.setattr(metadata, "old_hash", lambda path: str(ready.wait(10)))
    made = small()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "model-hash"]
    assert thread.daemon
    ready.set()
    made.at(step=1, epoch=0)


@pytest.mark.parametrize(("rank", "flags"), [("1", ()), ("0", ("--no_metadata",))])
def test_what_is_never_written_is_not_hashed(small, monkeypatch, rank, flags):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(metadata, "old_hash", lambda path: pytest.fail("hashed"))
    assert "ss_sd_model_hash" not in small(*flags).at(step=1, epoch=0)


def test_a_file_that_is_not_there_has_no_hash(small, tmp_path):
    keys = small(f"--vae={tmp_path / 'gone.safetensors'}").at(step=1, epoch=0)
    assert keys["ss_vae_name"] == "gone.safetensors" and "ss_vae_hash" not in keys and "ss_new_vae_hash" not in keys


# ---------------------------------------------------------------- Stable Diffusion


@pytest.fixture
def of_sd(pictures, tmp_path):
    """``of_sd("--flag=x", ..., sdxl=..., model=place)``: a run of one picture with Stable Diffusion's options."""
    pictures("train/1_cat", "a")
    (tmp_path / "sd.safetensors").write_bytes(MODEL_BYTES)

    def describe_run(*flags: str, sdxl: bool = False, model: str | Path = tmp_path / "sd.safetensors") -> dict[str, str]:
        base = [f"--pretrained_model_name_or_path={model}", f"--output_dir={tmp_path / 'out'}", "--output_name=mine",
                "--network_module=networks.lora", "--caption_extension=.txt", "--max_train_steps=5"]  # fmt: skip
        options = read_options(
            SdxlTrainOptions if sdxl else StableDiffusionTrainOptions, [*base, *by_flags(tmp_path / "train"), *flags]
        )
        run = check_run(options, TinyArchitecture())
        return LoraMetadata(run, seed=7, model=describe(options, sdxl=sdxl), optimizer="x").at(step=1, epoch=0)

    return describe_run


@pytest.mark.parametrize(
    ("sdxl", "flags", "expected"),
    [
        (False, (), {"ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_clip_skip": "None", "ss_max_token_length": "None"}),
        (False, ("--clip_skip=2", "--max_token_length=225"), {"ss_clip_skip": "2", "ss_max_token_length": "225"}),
        (False, ("--v2", "--v_parameterization", "--zero_terminal_snr"),
         {"ss_v2": "True", "ss_base_model_version": "sd_v2_v", "ss_zero_terminal_snr": "True", "ss_v_parameterization": "True"}),
        (True, ("--v_parameterization", "--scale_v_pred_loss_like_noise_pred"),
         {"ss_base_model_version": "sdxl_base_v1-0", "ss_scale_v_pred_loss_like_noise_pred": "True"}),
        (True, ("--min_snr_gamma=5", "--debiased_estimation_loss", "--noise_offset=0.05", "--adaptive_noise_scale=0.1"),
         {"ss_min_snr_gamma": "5.0", "ss_debiased_estimation": "True", "ss_noise_offset": "0.05", "ss_adaptive_noise_scale": "0.1"}),
        (True, ("--text_encoder_lr", "1e-5", "0"), {"ss_text_encoder_lr": "[1e-05, 0.0]"}),
        (True, ("--text_encoder_lr1=1e-5", "--text_encoder_lr2=0"), {"ss_text_encoder_lr": "[1e-05, 0.0]"}),
        (True, (), {"ss_text_encoder_lr": "None", "ss_vae_name": None, "ss_v_parameterization": None, "ss_v2": "False"}),
    ],
)  # fmt: skip
def test_options_of_stable_diffusion_are_recorded(of_sd, sdxl, flags, expected):
    keys = of_sd(*flags, sdxl=sdxl)
    assert {key: keys.get(key) for key in expected} == expected


def test_modelspec_of_stable_diffusion(of_sd):
    keys = of_sd("--v2", "--clip_skip=1", "--min_timestep=100")
    found = {key.removeprefix("modelspec."): value for key, value in keys.items() if key.startswith("modelspec.")}
    found.pop("date")
    assert found == {"sai_model_spec": "1.0.1", "architecture": "stable-diffusion-v2-512/lora", "implementation": "diffusers",
                     "title": "mine", "resolution": "64x64", "implementation_version": "atelier/1", "prediction_type": "epsilon",
                     "encoder_layer": "1", "timestep_range": "100,1000"}  # fmt: skip


def test_minimum_of_stable_diffusion(of_sd):
    keys = of_sd("--no_metadata", "--v2")
    assert {key for key in keys if key.startswith("ss_")} == set(MINIMUM_KEYS) - {"ss_network_args"}
    assert (keys["ss_v2"], keys["ss_base_model_version"]) == ("True", "sd_v2")


def test_a_folder_has_no_hash_of_its_own_and_its_base_name(of_sd, tmp_path):
    (tmp_path / "my_model").mkdir()
    keys = of_sd(model=tmp_path / "my_model")
    assert (keys["ss_sd_model_name"], keys["ss_sd_model_hash"]) == ("my_model", "IsADirectory")
    assert keys["ss_new_sd_model_hash"] == "IsADirectory" and str(tmp_path) not in str(keys)


def test_a_model_of_the_hub_has_its_whole_name_and_no_hash(of_sd):
    keys = of_sd(model="stabilityai/stable-diffusion-xl-base-1.0", sdxl=True)
    assert keys["ss_sd_model_name"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert not {"ss_sd_model_hash", "ss_new_sd_model_hash"} & set(keys)
