"""Signals are remembered; a second Ctrl-C ends at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from library.options.anima import AnimaTrainOptions
from library.options.declare import groups_of, options_of
from library.training.running.interrupts import (
    LAUNCHER_MARK,
    SECRET_FLAGS,
    START_FLAGS,
    START_SWITCHES,
    StopRequest,
    resume_command,
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_remembered(number, status):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.exit_status == status
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_is_not_remembered():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_status == 130


@pytest.fixture
def started_with(monkeypatch):
    def start(*flags: str) -> None:
        monkeypatch.delenv(LAUNCHER_MARK, raising=False)
        monkeypatch.setattr(sys, "argv", ["train.py", "--seed=1", *flags, "--vae", "my vae.safetensors"])

    return start


@pytest.mark.parametrize(
    "flags",
    [
        ("--initial_step=10", "--skip_until_initial_step", "--resume=latest"),
        ("--initial_step", "10", "--initial_epoch", "2", "--skip_until_initial_step=true", "--resume", "out/old state"),
        ("--resume_from_huggingface", "--resume=me/lora/a-state:main"),
        ("--initial_epoch=2", "--wandb_api_key", "hush", "--huggingface_token=hush"),
        ("--initial_e=2", "--wandb_api", "hush", "--huggingface_t=hush", "--resume_f", "--skip_u=true"),
    ],
)
def test_the_command_to_go_on_says_once_where_to_begin(started_with, flags):
    started_with(*flags)
    words = shlex.split(resume_command(Path("out/my state"), windows=False))
    assert words[1:] == ["train.py", "--seed=1", "--vae", "my vae.safetensors", "--resume", str(Path("out/my state"))]


def test_no_other_flag_is_the_beginning_of_one_that_is_left_out():
    flags = [option.flag for group in groups_of(AnimaTrainOptions).values() for option in options_of(group)]
    left_out = (*SECRET_FLAGS, *START_FLAGS, *START_SWITCHES)
    assert [flag for flag in flags if flag not in left_out and any(other.startswith(flag) for other in left_out)] == []


def test_every_secret_flag_is_known_here():
    groups = groups_of(AnimaTrainOptions).values()
    assert {option.flag for group in groups for option in options_of(group) if option.secret} == set(SECRET_FLAGS)


def test_the_command_to_go_on_is_quoted_as_windows_wants_it(started_with):
    started_with("--output_dir", "C:\\my out\\x")
    command = resume_command(Path("state"), windows=True)
    assert command.endswith(r'train.py --seed=1 --output_dir "C:\my out\x" --vae "my vae.safetensors" --resume state')
