"""Where a run's numbers go, and what the trackers are told."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.trackers import LoggingOptions
from library.training.running.trackers import run_log_dir, start_trackers, tracker_names, tracker_problems
from tests.tiny_runs import TinyRuns


@dataclass
class Told:
    """Stands for accelerate's object: what trackers would be started with."""

    project_dir: Path | None = None
    is_main_process: bool = True
    started: list[tuple[str, dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def init_trackers(self, name, config, init_kwargs):
        self.started.append((name, config, init_kwargs))


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(2))


@pytest.fixture(autouse=True)
def no_wandb_variables(monkeypatch):
    """Set and taken away, so that what a test sets is gone afterwards."""
    for name in ("WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def started(
    options: LoggingOptions, config: dict[str, Any] | None = None, **told: Any
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    accelerator = Told(**told)
    start_trackers(accelerator, options, config or {})  # type: ignore[arg-type]
    (one,) = accelerator.started
    return one


def test_keys_on_the_command_line_are_hidden_from_trackers(monkeypatch):
    words = ["train.py", "--seed=1", "--wandb_api_key", "hush", "--huggingface_token=hush", "--vae=x"]
    monkeypatch.setattr(sys, "argv", words)
    started(LoggingOptions(log_with="wandb", wandb_api_key="hush"))
    assert words == ["train.py", "--seed=1", "--vae=x"]  # the same list, which others may hold


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, []),
        ({"logging_dir": "logs"}, ["tensorboard"]),
        ({"logging_dir": "logs", "log_with": "wandb"}, ["wandb"]),
        ({"logging_dir": "logs", "log_with": "all"}, ["tensorboard", "wandb"]),
    ],
)
def test_log_with(options, names):
    assert tracker_names(LoggingOptions(**options)) == names


def test_each_run_logs_into_a_folder_of_its_own():
    assert re.fullmatch(r"\d{14}", run_log_dir(LoggingOptions(logging_dir="logs")).name)
    folder = run_log_dir(LoggingOptions(logging_dir="logs", log_prefix="mine-"))
    assert folder.parent == Path("logs") and re.fullmatch(r"mine-\d{14}", folder.name)
    assert run_log_dir(LoggingOptions(log_prefix="mine-")) is None


def test_the_project_has_a_name():
    assert started(LoggingOptions(logging_dir="logs"))[0] == "network_train"
    assert started(LoggingOptions(logging_dir="logs", log_tracker_name="cats"))[0] == "cats"


def test_settings_of_a_file_reach_the_tracker_and_the_flag_names_the_run(tmp_path):
    (tmp_path / "t.toml").write_text('[wandb]\nentity = "me"\n')
    options = LoggingOptions(log_with="wandb", log_tracker_config=str(tmp_path / "t.toml"), wandb_run_name="first")
    assert started(options)[2] == {"wandb": {"entity": "me", "name": "first"}}


def test_a_settings_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "t.toml").write_text("[wandb\n")
    problems = tracker_problems(LoggingOptions(logging_dir="logs", log_tracker_config=str(tmp_path / "t.toml")))
    assert len(problems) == 1 and "t.toml cannot be read" in problems[0]


def test_wandb_gets_its_key_and_folder_by_variables_alone(tmp_path, monkeypatch):
    name, config, settings = started(LoggingOptions(log_with="wandb", wandb_api_key="secret-key"), project_dir=tmp_path)
    assert (os.environ["WANDB_API_KEY"], os.environ["WANDB_DIR"]) == ("secret-key", str(tmp_path))
    assert "secret" not in repr((name, config, settings))


def test_log_config_sends_plain_values(tmp_path):
    values = {"network_dim": 8, "learning_rate": 1e-4, "unet_lr": None, "save_state": True, "optimizer_type": "Lion"}
    _, config, _ = started(LoggingOptions(logging_dir="logs"), config=values)
    assert config == {"network_dim": 8, "learning_rate": 1e-4, "save_state": True, "optimizer_type": "Lion"}


def test_other_processes_and_runs_without_trackers_start_nothing():
    for options, is_main in ((LoggingOptions(), True), (LoggingOptions(logging_dir="logs"), False)):
        accelerator = Told(is_main_process=is_main)
        start_trackers(accelerator, options, {})  # type: ignore[arg-type]
        assert accelerator.started == []


@pytest.mark.parametrize(("flags", "sent"), [((), False), (("--log_config",), True)])
def test_the_options_are_sent_only_if_asked_for(runs, tmp_path, flags, sent):
    runs.train("--max_train_steps=1", f"--logging_dir={tmp_path / 'logs'}", "--huggingface_token=hf_secret", *flags)
    files = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    texts = b"".join(path.read_bytes() for path in files)
    assert files and (b"network_dim" in texts) is sent
    assert b"hf_secret" not in texts and str(tmp_path).encode() not in texts


def test_the_options_that_are_sent_name_no_key():
    from library.options.reference_table import redacted

    flags = "--pretrained_model_name_or_path=d --qwen3=q --vae=v --dataset_config=m --output_dir=o --network_module=networks.lora_anima"
    options = read_options(AnimaTrainOptions, [*flags.split(), "--huggingface_token=hf_secret", "--wandb_api_key=hf_secret"])
    assert "hf_secret" not in repr(redacted(options))
