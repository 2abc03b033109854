"""How a run reads its images: what is remembered where, by whom, and which images validate."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.dataset import verify
from library.dataset.image_records import RECORDS_NAME, records_path
from library.dataset.validation_split import chosen_for_validation
from tests.tiny_runs import TinyRuns


@pytest.fixture
def runs(tmp_path: Path, picture_folder) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(6))


def test_a_run_remembers_its_images_beside_them(runs: TinyRuns, monkeypatch: pytest.MonkeyPatch):
    first = runs.checked("--max_train_steps=1").training_set
    assert (runs.pictures / RECORDS_NAME).exists()
    monkeypatch.setattr(verify, "read_record", lambda path, known=None: pytest.fail(f"{path} was read again"))
    second = runs.checked("--max_train_steps=1").training_set
    assert first == second
    assert second.records is not None and second.records.size_wh(second.items[0].path) == second.items[0].size_wh


def test_cache_dir_takes_the_records_too(runs: TinyRuns, tmp_path: Path):
    runs.checked("--max_train_steps=1", f"--cache_dir={tmp_path / 'caches'}")
    assert records_path(runs.pictures, tmp_path / "caches").exists()
    assert not (runs.pictures / RECORDS_NAME).exists()


def test_only_the_main_process_writes(runs: TinyRuns, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    runs.checked("--max_train_steps=1")
    assert not (runs.pictures / RECORDS_NAME).exists()


@pytest.mark.parametrize(("flags", "seed"), [((), 1), (("--seed=9",), 9), (("--validation_seed=5",), 5)])
def test_validation_images_are_chosen_by_the_runs_seed(flags: tuple[str, ...], seed: int, runs: TinyRuns):
    data = runs.checked("--max_train_steps=1", "--validation_split=0.4", *flags).training_set
    paths = [str(item.path) for item in data.all_items]
    assert {str(item.path) for item in data.validation} == chosen_for_validation(paths, 0.4, seed=seed)
    assert len(data.validation) == 2
