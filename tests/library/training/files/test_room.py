"""Room on the disk for what a run writes."""

from __future__ import annotations

from collections import namedtuple

import pytest

from library.errors import OutputError
from library.training.files.room import RESERVE_BYTES, check_room, free_bytes, peak_bytes
from tests.tiny_runs import TinyRuns

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(4))


@pytest.mark.parametrize(
    ("flags", "loras", "states"),
    [
        ((), 1, 0),
        (("--save_state_on_train_end",), 1, 1),
        (("--save_every_n_steps=2",), 6, 0),  # also at the last step
        (("--save_every_n_epochs=1", "--save_state"), 4, 4),
        (("--save_every_n_epochs=1", "--save_state", "--save_last_n_epochs=1"), 2, 2),
        (("--save_every_n_epochs=1", "--save_state", "--save_last_n_epochs=3", "--save_last_n_epochs_state=1"), 4, 2),
    ],
)
def test_the_most_that_lies_there_at_one_moment(runs, flags, loras, states):
    run = runs.checked("--max_train_steps=10", *flags)
    assert peak_bytes(run, lora_bytes=1000, state_bytes=10**6) == loras * 1000 + states * 10**6


def test_a_disk_without_room_for_the_lora_is_an_error(runs, monkeypatch):
    run = runs.checked("--max_train_steps=10")
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(10**12, 0, 2**16))
    with pytest.raises(OutputError, match=r"the LoRA takes about 2\.00 MiB, .* --output_dir .*out has 0\.1 MiB free: free some"):
        list(check_room(run, lora_bytes=2**21, state_bytes=0))


def test_a_disk_without_room_for_all_is_a_warning(runs, monkeypatch):
    run = runs.checked("--max_train_steps=10", "--save_every_n_epochs=1", "--save_state")
    needed = 4 * (2**20 + 3 * 2**20) + RESERVE_BYTES
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(10**12, 0, needed))
    assert list(check_room(run, lora_bytes=2**20, state_bytes=3 * 2**20)) == []
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(10**12, 0, needed - 1))
    (warning,) = check_room(run, lora_bytes=2**20, state_bytes=3 * 2**20)
    assert "has 17.0 MiB free, but all LoRA files and states of this run take about 16.0 MiB" in warning


def test_what_the_system_does_not_know_is_no_problem(runs, monkeypatch, tmp_path):
    assert free_bytes(tmp_path / "not" / "there")
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(0, 0, 0))
    assert list(check_room(runs.checked("--max_train_steps=10"), lora_bytes=1, state_bytes=1)) == []


def test_a_dry_run_tells_it(runs, monkeypatch):
    run_free = Usage(10**12, 0, 2**16)
    monkeypatch.setattr("shutil.disk_usage", lambda place: run_free)
    with pytest.raises(OutputError, match="--output_dir .* has 0.1 MiB free"):
        runs.train("--max_train_steps=2", "--dry_run")
