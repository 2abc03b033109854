"""File names, save schedules and what is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.saving import SavingOptions
from library.training.files.saving_names import DueSave, OutputNames, SaveSchedule


def names(**options) -> OutputNames:
    return OutputNames.of(SavingOptions(output_dir="out", **options))


def test_names_of_the_reference():
    mine = names(output_name="my_lora")
    assert mine.epoch_file(3) == Path("out/my_lora-000003.safetensors")
    assert mine.step_file(50) == Path("out/my_lora-step00000050.safetensors")
    assert mine.last_file() == Path("out/my_lora.safetensors")
    assert mine.epoch_state(3) == Path("out/my_lora-000003-state")
    assert mine.step_state(50) == Path("out/my_lora-step00000050-state")
    assert mine.last_state() == Path("out/my_lora-state")
    assert mine.best_file() == Path("out/my_lora-best.safetensors")


def test_names_without_an_output_name_and_another_container():
    mine = names(save_model_as="ckpt")
    files = (mine.epoch_file(1), mine.step_file(1), mine.last_file(), mine.best_file())
    assert [file.name for file in files] == ["epoch-000001.ckpt", "at-step00000001.ckpt", "last.ckpt", "best.ckpt"]
    assert all(any(file.name.startswith(stem) for stem in mine.stems()) for file in files)


def test_states_are_those_of_this_name(tmp_path):
    for folder in ("a-state", "a-000002-state", "a-step00000004-state", "a-state.replaced", "a-b-state", "b-state", "a-x1-state"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a-000009-state").write_text("a file")
    mine = OutputNames(tmp_path, "a", ".safetensors")
    assert [p.name for p in mine.states()] == ["a-000002-state", "a-state", "a-state.replaced", "a-step00000004-state"]


def schedule(epochs: int = 10, **options) -> SaveSchedule:
    return SaveSchedule.of(SavingOptions(output_dir="out", **options), epochs)


def test_the_last_epoch_is_only_the_final_file():
    assert [e for e in range(1, 11) if schedule(save_every_n_epochs=2).saves_epoch(e)] == [2, 4, 6, 8]


def test_steps_are_saved_also_at_the_end():
    assert [s for s in range(1, 13) if schedule(save_every_n_steps=4).saves_step(s)] == [4, 8, 12]


@pytest.mark.parametrize(("ratio", "every"), [(3, 3), (20, 1)])
def test_epoch_ratio(ratio, every):
    assert schedule(save_n_epoch_ratio=ratio).every_n_epochs == every


def test_old_epochs_make_way():
    mine = schedule(save_every_n_epochs=2, save_last_n_epochs=2)
    assert [mine.epoch_to_remove(e) for e in (2, 4, 6, 8)] == [None, None, 2, 4]
    assert mine.epoch_state_to_remove(6) == 2
    assert schedule(save_every_n_epochs=2, save_last_n_epochs=2, save_last_n_epochs_state=1).epoch_state_to_remove(4) == 2


def test_old_steps_make_way_by_steps_not_files():
    mine = schedule(save_every_n_steps=10, save_last_n_steps=25)
    # after step 50: 50 - 25 - 1 = 24, rounded down to 20
    assert [mine.step_to_remove(s) for s in (10, 30, 40, 50)] == [None, None, 10, 20]
    assert mine.step_state_to_remove(50) == 20
    assert schedule(save_every_n_steps=10, save_last_n_steps=25, save_last_n_steps_state=35).step_state_to_remove(50) == 10


def test_what_is_due_after_a_step():
    mine = schedule(save_every_n_steps=10, save_every_n_epochs=1, save_last_n_steps=10, epochs=3)
    step = DueSave(names().step_file(30), names().step_state(30), (names().step_file(10), names().step_state(10)))
    epoch = DueSave(names().epoch_file(2), names().epoch_state(2), ())
    assert mine.due(30, 2, names()) == [step, epoch]
    assert mine.due(31, 2, names()) == [epoch]
    assert mine.due(31, None, names()) == mine.due(31, 3, names()) == []
