"""What several processes of one run must agree on, and what is saved when one of them fails."""

from __future__ import annotations

import json

import pytest

from library.errors import OptionError
from library.files.safetensors_file import read_header
from library.training.files.state import read_description
from tests.tiny_arch import TinyTrainer
from tests.tiny_runs import TinyRuns
from tests.two_processes import run_two

SCRIPT = """
import json, os, sys
from pathlib import Path
from library.errors import DatasetError, UserError
from library.training import caching
from tests.tiny_arch import TinyTrainer
from tests.tiny_runs import TinyRuns
from train_network import run_training

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
caching.LATE_FILES_S = 0.1
told = []

class Bad(TinyTrainer):
    def next_batch(self, epoch, number):
        if self.progress.step == 3 and self.rank == 1:
            raise DatasetError("picture.png cannot be read any more")
        return super().next_batch(epoch, number)

def runs(name):
    (folder / name).mkdir(exist_ok=True)
    return TinyRuns(folder / name, folder / "pictures")

def refused(runs, *flags):
    try:
        runs.train("--max_train_steps=2", *flags)
    except UserError as error:
        told.append([type(error).__name__, str(error), error.is_found_by_all])

other = runs(f"other{rank}")
if rank == 1:
    other.write_dataset(other.images_of(other.pictures, "num_repeats = 2"))
refused(other)
own = runs(f"own{rank}")
refused(own, "--cache_latents_to_disk", f"--cache_dir={folder / f'cache{rank}'}")
(folder / f"told{rank}.json").write_text(json.dumps(told))
shared = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", f"--cache_dir={folder / 'cache'}")
run_training(Bad, own.checked("--max_train_steps=6", *shared, output="bad"))
"""


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(5))


def test_two_processes_that_differ_and_one_that_fails(runs, script_environment, tmp_path):
    (tmp_path / "two.py").write_text(SCRIPT)
    (status, main), (other_status, other) = run_two(tmp_path / "two.py", tmp_path, environment=script_environment)
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    images, caches = told[0]
    assert images[0] == "DatasetError" and "process 0: 5 + 0, process 1: 5 + 0" in images[1] and images[2]
    assert caches[0] == "OutputError" and "process 0 lacks 2 of 5, process 1 lacks 3 of 5" in caches[1] and caches[2]
    assert "give a --cache_dir that all machines share, or keep the cache in memory with --cache_latents" in caches[1]

    assert (status, other_status) == (2, 2)
    assert other.splitlines()[-1] == "error (process 1): picture.png cannot be read any more"
    assert main.splitlines()[-1].startswith("error (process 0): another process of this run has ended")
    assert "Traceback" not in main + other
    output = tmp_path / "own0" / "bad"
    assert read_description(output / "t-step00000003-state").progress.step == 3
    assert read_header(output / "t-step00000003.safetensors").metadata["ss_steps"] == "3"
    assert not list((tmp_path / "own1" / "bad").iterdir())


def test_more_processes_than_accelerate_sees(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = TinyTrainer(runs.checked("--max_train_steps=2"))
    with pytest.raises(
        OptionError, match="2 processes were started together, but accelerate works with 1: no GPU was found .*ACCELERATE_USE_CPU"
    ) as caught:
        trainer.start_accelerator()
    assert caught.value.is_found_by_all
