"""Where a LoRA goes when its own folder cannot be written any more."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from library.errors import OutputError
from library.files.atomic import write_atomically
from library.files.safetensors_file import read_header
from library.training.files.saving import other_places, save_network
from tests.tiny_arch import TinyTrainer
from tests.tiny_runs import TinyRuns


class DiskVanishes(TinyTrainer):
    def run_due_events(self):
        if self.progress.step == 2:
            shutil.rmtree(self.run.names.folder)
            self.run.names.folder.write_text("no folder any more")
        super().run_due_events()


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """The temporary folder and the current one."""
    folders = {name: tmp_path / name for name in ("tmp", "here")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders["here"])
    monkeypatch.setattr(tempfile, "tempdir", str(folders["tmp"]))
    return folders


@pytest.mark.parametrize("flags", [(), ("--save_every_n_steps=2", "--output_name=u")])
@pytest.mark.parametrize("rescue", ["tmp", "here"])
def test_a_lora_that_cannot_be_saved_is_kept_elsewhere(picture_folder, tmp_path, places, rescue, flags):
    runs = TinyRuns(tmp_path, picture_folder(2))
    if rescue == "here":
        places["tmp"].rmdir()
        places["tmp"].write_text("no folder either")
    name = "u-step00000002.safetensors" if flags else "t.safetensors"
    with pytest.raises(OutputError) as found:
        runs.train("--max_train_steps=2", *flags, trainer_class=DiskVanishes)
    kept = places[rescue] / name
    assert str(found.value).startswith(f"could not write {tmp_path / 'out' / name}: ")
    assert str(found.value).endswith(f"; the LoRA after step 2 is in {kept}: move it from there")
    assert read_header(kept).metadata["ss_steps"] == "2"
    assert [path.name for path in kept.parent.iterdir()] == [name]


def test_nothing_is_replaced_there(tmp_path, places):
    (places["tmp"] / "a.safetensors").touch()
    (places["tmp"] / "a-2.safetensors").touch()
    assert list(other_places(tmp_path / "out" / "a.safetensors")) == [
        places["tmp"] / "a-3.safetensors",
        places["here"] / "a.safetensors",
    ]
    assert list(other_places(places["tmp"] / "b.safetensors")) == [places["here"] / "b.safetensors"]


class FullDisk:
    def save_weights(self, file, dtype, metadata):
        def write(opened):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write_atomically(Path(file), write)


class ByOthers:
    def __init__(self, error: Exception):
        self.error = error

    def save_weights(self, file, dtype, metadata):
        raise self.error


class SafetensorError(Exception):
    """As the package's own is called."""


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (FullDisk(), "the disk is full: free some space or choose another folder"),
        (ByOthers(SafetensorError("I/O error: No space left (os error 28)")), "I/O error: No space left (os error 28)"),
        (
            ByOthers(RuntimeError("PytorchStreamWriter failed writing file data/0")),
            "PytorchStreamWriter failed writing file data/0",
        ),
    ],
)
def test_the_message_names_the_file_that_was_wanted(tmp_path, network, reason):
    with pytest.raises(OutputError) as found:
        save_network(network, tmp_path / "a.safetensors", dtype=None, metadata={})
    assert str(found.value) == f"could not write {tmp_path / 'a.safetensors'}: {reason}"


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError):
        save_network(ByOthers(KeyError("x")), tmp_path / "a.safetensors", dtype=None, metadata={})
