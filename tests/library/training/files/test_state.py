"""States are complete or absent, and are checked before a run goes on from one."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from library.dataset import schema
from library.dataset.items import DatasetSettings, SubsetSettings
from library.errors import CheckpointError, OptionError, OutputError
from library.files.safetensors_file import file_fingerprint, save_safetensors
from library.options.anima import AnimaTrainOptions
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.ddpm import DdpmTrainingOptions
from library.options.lumina import LuminaTrainOptions
from library.options.optimizer import OptimizerOptions
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.training.files.state import (
    DESCRIPTION_FILE,
    HISTORY_OPTIONS,
    NETWORK_FILE,
    TENSORS_FILE,
    StateDescription,
    StateSettings,
    base_model_fingerprint,
    check_identity,
    find_state,
    load_network_tensors,
    load_training_tensors,
    read_description,
    remove_replaced_states,
    save_state,
    state_settings,
)
from library.training.steps import Progress
from library.training.validating.validation_plan import ValidationRecord


def description(step: int = 4) -> StateDescription:
    return StateDescription(
        epoch=1,
        progress=Progress(step, step),
        seed=7,
        identity={"--network_dim": "8"},
        history={"--loss_type": "l2", "--learning_rate": "0.1"},
        losses=[0.5, 0.25],
        validation=ValidationRecord(measured="a", baseline=0.5, best=0.25, best_step=3, finished_step=step),
    )


def make(folder, step: int = 4):
    training = {"optimizer": {"state": {0: {"exp_avg": torch.arange(3.0)}}}, "schedule": {"last_epoch": step}, "scaler": None}
    save_state(folder, description(step), network={"a.alpha": torch.tensor(2.0)}, training=training)
    return folder


def test_round_trip(tmp_path):
    folder = make(tmp_path / "x-state")
    assert read_description(folder) == description()
    assert load_network_tensors(folder)["a.alpha"] == 2.0
    assert torch.equal(load_training_tensors(folder)["optimizer"]["state"][0]["exp_avg"], torch.arange(3.0))


def test_a_state_from_before_there_was_validation(tmp_path):
    folder = make(tmp_path / "x-state")
    path = folder / DESCRIPTION_FILE
    content = json.loads(path.read_text())
    del content["validation"]
    path.write_text(json.dumps(content))
    assert read_description(folder).validation == ValidationRecord()
    now = state_settings(AnimaTrainOptions(), "anima", batches_per_epoch=3, validation_split="0.1")
    saved = replace(description(), identity={**now.identity, "the validation split": "none"}, history=now.history)
    with pytest.raises(OptionError, match="the validation split none, but this run has 0.1"):
        check_identity(folder, saved, now)
    del saved.identity["the validation split"]
    with pytest.raises(OptionError, match="the validation split none, but this run has 0.1"):
        check_identity(folder, saved, now)
    assert check_identity(folder, saved, StateSettings({**now.identity, "the validation split": "none"}, now.history)) == []


def test_a_new_state_replaces_the_old_one_and_leaves_nothing_behind(tmp_path):
    make(tmp_path / "x-state", step=4)
    make(tmp_path / "x-state", step=8)
    assert read_description(tmp_path / "x-state").progress.step == 8
    assert [p.name for p in tmp_path.iterdir()] == ["x-state"]


@pytest.mark.parametrize("name", [NETWORK_FILE, TENSORS_FILE, DESCRIPTION_FILE])
def test_a_half_state_is_an_error_that_names_the_file(tmp_path, name):
    folder = make(tmp_path / "x-state")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_description(folder)


def test_a_truncated_file_is_noticed(tmp_path):
    folder = make(tmp_path / "x-state")
    data = (folder / TENSORS_FILE).read_bytes()
    (folder / TENSORS_FILE).write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        read_description(folder)


def test_a_foreign_state_is_named(tmp_path):
    folder = tmp_path / "x-state"
    folder.mkdir()
    (folder / DESCRIPTION_FILE).write_text(json.dumps({"current_epoch": 1, "current_step": 5}))
    with pytest.raises(CheckpointError, match="another trainer"):
        read_description(folder)


def test_a_missing_state_suggests_a_near_one(tmp_path):
    make(tmp_path / "lora-000002-state")
    with pytest.raises(CheckpointError, match="did you mean lora-000002-state"):
        read_description(tmp_path / "lora-000003-state")


def test_latest_is_the_complete_one_with_the_most_steps(tmp_path):
    folders = [make(tmp_path / "a-000001-state", 4), make(tmp_path / "a-000002-state", 8), make(tmp_path / "a-000003-state", 12)]
    (folders[2] / NETWORK_FILE).unlink()
    assert find_state("latest", folders) == folders[1]
    assert find_state("latest", []) is None


def test_a_state_whose_replacement_was_interrupted_is_found(tmp_path):
    old = make(tmp_path / "a-state.replaced", 4)
    assert find_state("latest", [old]) == old
    assert find_state(str(tmp_path / "a-state"), []) == old


def changes(saved: StateDescription, folder, dim: str = "8", **history: str) -> list[str]:
    return check_identity(folder, saved, StateSettings({"--network_dim": dim}, history))


def test_other_settings_are_refused_and_changed_ones_told(tmp_path):
    saved = description()
    with pytest.raises(OptionError, match="--network_dim 8, but this run has 16"):
        changes(saved, tmp_path, dim="16")
    assert changes(saved, tmp_path, **{"--loss_type": "l2"}) == []
    assert changes(saved, tmp_path, **{"--new_flag": "1"}) == []  # unknown to an older state
    assert changes(saved, tmp_path, **{"--loss_type": "l1"})[0].startswith("--loss_type was l2")
    (line,) = changes(saved, tmp_path, **{"--learning_rate": "1"})
    assert "the state's rates" in line


def test_settings_of_a_run():
    settings = state_settings(AnimaTrainOptions(optimizer=OptimizerOptions(use_8bit_adam=True)), "anima", batches_per_epoch=3)
    assert settings.identity["--optimizer_type"] == "bitsandbytes.optim.AdamW8bit"
    assert settings.identity["the architecture"] == "anima"
    assert settings.history["--timestep_sampling"] == "sigmoid" and settings.history["--masked_loss"] == "False"
    assert "--max_data_loader_n_workers" not in settings.history and "--flip_aug" not in settings.history


def test_settings_of_noise_levels_are_in_the_history():
    ddpm = DdpmTrainingOptions(min_snr_gamma=5.0, min_timestep=100, v_parameterization=True)
    history = state_settings(StableDiffusionTrainOptions(ddpm=ddpm), "sd", batches_per_epoch=3).history
    wanted = {"--min_snr_gamma": "5.0", "--min_timestep": "100", "--v_parameterization": "True", "--zero_terminal_snr": "False"}
    assert wanted.items() <= history.items()


def datasets(*subsets: SubsetSettings, **settings: object) -> tuple[DatasetSettings, ...]:
    return (DatasetSettings(**{"place": "my.toml, [[datasets]] 1", "resolution_wh": (64, 96), "subsets": subsets, **settings}),)


def subset(**settings: object) -> SubsetSettings:
    return SubsetSettings(**{"place": "my.toml, [[datasets]] 1, subset 1", "image_dir": Path("/data/cat"), **settings})


def test_changes_in_the_dataset_file_are_told(tmp_path):
    def told(before: tuple[DatasetSettings, ...], after: tuple[DatasetSettings, ...]) -> list[str]:
        saved, now = (
            state_settings(AnimaTrainOptions(), "anima", batches_per_epoch=3, datasets=found) for found in (before, after)
        )
        lines = check_identity(tmp_path, replace(description(), identity=saved.identity, history=saved.history), now)
        assert all(line.endswith("now: the run goes on, but not as one uninterrupted run would") for line in lines)
        return [
            line.split(" when the state was saved and is ")[0] + " -> " + line.split(" now: ")[0].split(" is ")[-1]
            for line in lines
        ]

    before = datasets(subset(), subset(caption_prefix="a, "))
    moved = datasets(subset(place="x", image_dir=Path("/mnt/cat")), subset(caption_prefix="a, ", cache_info=True), place="y")
    assert told(before, before) == told(before, moved) == []
    assert told(before, datasets(subset(), subset(flip_aug=True, loss_weight=0.5, custom_attributes={"a": 1}))) == [
        "[[datasets]] 1, subset 2: loss_weight was 1.0 -> 0.5",
        '[[datasets]] 1, subset 2: custom_attributes was {} -> {"a": 1}',
        "[[datasets]] 1, subset 2: caption_prefix was a,  -> not set",
        "[[datasets]] 1, subset 2: flip_aug was false -> true",
    ]
    assert told(before, datasets(subset(), subset(caption_prefix="a, "), resolution_wh=(64, 64), network_multiplier=0.5)) == [
        "[[datasets]] 1: resolution was 64x96 -> 64x64",
        "[[datasets]] 1: network_multiplier was 1.0 -> 0.5",
    ]
    both = datasets(subset(flip_aug=True), subset(caption_prefix="a, ", flip_aug=True))
    assert told(before, both) == ["[[datasets]] 1, subset 1 and 1 more: flip_aug was false -> true"]
    assert told(before, datasets(subset())) == ["[[datasets]] 1: subsets was 2 -> 1"]


def test_a_state_from_before_the_dataset_file_was_noted_goes_on(tmp_path):
    now = state_settings(AnimaTrainOptions(), "anima", batches_per_epoch=3, datasets=datasets(subset(flip_aug=True)))
    history = {"--flip_aug": "False", "--dataset_config": "my.toml", "the number of batches per epoch": "3"}
    assert check_identity(tmp_path, replace(description(), identity=now.identity, history=history), now) == []


def test_every_dataset_and_caption_option_is_in_the_history_or_changes_nothing():
    of_keys = {key.flag for topic in (*schema.DATASET_TOPICS, *schema.SUBSET_TOPICS) for key in topic.keys}
    places = {"dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"}  # a subset's own name
    harmless = {
        "dataset_class",
        "skip_bad_images",
        "max_data_loader_n_workers",
        "persistent_data_loader_workers",
        "caption_extention",
    }
    options = {option.name for group in (DatasetOptions, CaptionOptions) for option in fields(group)}
    assert options <= of_keys | places | harmless | set(HISTORY_OPTIONS["dataset"])


def test_damaged_tensors_are_an_error(tmp_path):
    folder = make(tmp_path / "x-state")
    (folder / TENSORS_FILE).write_bytes(b"x" * (folder / TENSORS_FILE).stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        load_training_tensors(folder)


def test_a_failed_save_leaves_the_old_state(tmp_path):
    folder = make(tmp_path / "x-state", 4)
    with pytest.raises(AttributeError):
        save_state(folder, replace(description(8)), network={"a": object()}, training={})  # type: ignore[dict-item]
    assert read_description(folder).progress.step == 4
    assert [p.name for p in tmp_path.iterdir()] == ["x-state"]


def test_a_disk_that_fills_up_leaves_the_old_state(small_disk):
    folder = make(small_disk / "x-state", 4)
    large = {"optimizer": torch.zeros(50_000), "schedule": {}, "scaler": None}
    with pytest.raises(OutputError, match="x-state: the disk is full"):
        save_state(folder, description(8), network={"a.alpha": torch.tensor(2.0)}, training=large)
    assert read_description(folder).progress.step == 4
    assert [p.name for p in small_disk.iterdir()] == ["x-state"]


def test_a_replaced_state_goes_only_where_the_new_one_is_complete(tmp_path):
    done, half, alone = (make(tmp_path / f"{name}-state.replaced") for name in ("done", "half", "alone"))
    make(tmp_path / "done-state", 8)
    (make(tmp_path / "half-state", 8) / TENSORS_FILE).unlink()
    for old, content in ((done, "moved back"), (half, "kept")):
        old.mkdir(exist_ok=True)
        (old / "note").write_text(content)
    remove_replaced_states(sorted(tmp_path.iterdir()))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "alone-state.replaced",
        "done-state",
        "half-state",
        "half-state.replaced",
    ]
    assert alone.is_dir() and (half / "note").read_text() == "kept"


def test_the_base_model_is_known_with_what_is_merged_into_it(tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("model", "style", "adapter")}
    for name, file in files.items():
        save_safetensors(file, {name: torch.ones(2)}, {})

    def fingerprint(**changes: object) -> str | None:
        options = AnimaTrainOptions()
        model = replace(options.model, pretrained_model_name_or_path=str(files["model"]))
        anima = replace(options.anima, llm_adapter_path=changes.pop("llm_adapter_path", None))
        return base_model_fingerprint(replace(options, model=model, anima=anima, network=replace(options.network, **changes)))

    style = [str(files["style"])]
    marks = [fingerprint(), fingerprint(base_weights=style), fingerprint(base_weights=style, base_weights_multiplier=[0.5]),
             fingerprint(llm_adapter_path=str(files["adapter"]))]  # fmt: skip
    assert len(set(marks)) == 4 and marks[0] == file_fingerprint(files["model"])
    assert fingerprint(base_weights=style, base_weights_multiplier=[1.0]) == marks[1]


def test_what_changes_a_training_of_stable_diffusion_is_in_the_history():
    sd, xl = StableDiffusionTrainOptions(), SdxlTrainOptions()
    of_sd, of_xl = (state_settings(options, "x", batches_per_epoch=3).history for options in (sd, xl))
    assert {"--clip_skip", "--max_token_length", "--min_snr_gamma", "--min_timestep", "--v2"} <= set(of_sd)
    assert {"--text_encoder_lr1", "--max_token_length", "--v_parameterization"} <= set(of_xl) and "--clip_skip" not in of_xl
    assert "--clip_skip" not in state_settings(AnimaTrainOptions(), "anima", batches_per_epoch=3).history


@pytest.mark.parametrize(
    ("kind", "group"), [(AnimaTrainOptions, "anima"), (Sd3TrainOptions, "sd3"), (LuminaTrainOptions, "lumina")]
)
def test_what_changes_a_training_of_one_model_alone_is_in_the_history(kind, group):
    options = kind()
    history = state_settings(options, "x", batches_per_epoch=3).history
    assert {f"--{name}" for name in getattr(options, group).CHANGES_TRAINING} <= set(history) and "--clip_skip" not in history
