"""Runs with the real DeepSpeed on the CPU, as one process and as two, against runs without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.tiny_runs import TinyRuns
from tests.two_processes import run_two

pytestmark = pytest.mark.skipif(os.name == "nt", reason="deepspeed does not train on Windows")

# accelerate ends the process group with a run, and DeepSpeed keeps what it knows of it: here it lives on from run to run
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from library.errors import DatasetError, UserError
from library.files.safetensors_file import read_header, read_tensors
from library.training import optimizing
from tests.tiny_arch import TinyTrainer
from tests.tiny_runs import TinyRuns
from train_network import run_training

torch.distributed.destroy_process_group = lambda *group: None
folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
runs, told = TinyRuns.__new__(TinyRuns), {}
runs.folder, runs.pictures = folder, folder / "pictures"
STEPS = ("--max_train_steps=6", "--lr_scheduler=cosine", "--gradient_accumulation_steps=2", "--max_grad_norm=0.05",
         "--network_dropout=0.2", "--network_args", "module_dropout=0.3")

class Bad(TinyTrainer):
    def compute_loss(self, batch, noisy):
        loss = super().compute_loss(batch, noisy)
        return loss * float("nan") if self.progress.step == 2 and self.rank == self.processes - 1 else loss

class Fails(TinyTrainer):
    def next_batch(self, epoch, number):
        if self.progress.step == 3:
            raise DatasetError("picture.png cannot be read any more")
        return super().next_batch(epoch, number)

    def say(self, *lines):
        print(*lines, file=sys.stderr)

def lora(name):
    return dict(read_tensors(read_header(folder / name / "t.safetensors")))

def compare(name, *flags, steps=STEPS, resumed=(), **how):
    runs.train(*steps, *flags, output=f"plain {name}", **how)
    runs.train(*steps, *flags, *resumed, "--deepspeed", "--save_state", "--save_every_n_steps=3", output=name, **how)
    runs.train(*steps, *flags, *resumed, "--deepspeed", f"--resume={folder / name / 't-step00000003-state'}",
               output=f"resumed {name}", **how)
    if rank == 0:
        plain, ours, again = lora(f"plain {name}"), lora(name), lora(f"resumed {name}")
        far = max(((plain[key] - ours[key]).abs().max() / plain[key].abs().max()).item() for key in plain if plain[key].any())
        told[name] = {"far": far, "resumed": all(torch.equal(ours[key], again[key]) for key in ours),
                      "learned": all(weight.any().item() for weight in ours.values())}

optimizing.deepspeed.LARGEST_BUCKET = 100  # less than some weights have numbers: each is summed by itself, others together
for name, (flags, only_ours) in json.loads(sys.argv[2]).items():
    compare(name, *flags, resumed=only_ours)
runs.train("--max_train_steps=5", "--deepspeed", output="bad", trainer_class=Bad)
if rank == 0:
    told["bad"] = all(bool(weight.isfinite().all()) for weight in lora("bad").values())
    (folder / "told.json").write_text(json.dumps(told))
run_training(Fails, runs.checked("--max_train_steps=6", "--deepspeed", output="fails"))
"""
CASES = {
    "stage 0": ((), ("--zero_stage=0",)),
    "stage 1": ((), ("--zero_stage=1",)),
    "stage 2": ((), ()),
    "offload": ((), ("--offload_optimizer_device=cpu",)),
    "norms": (("--scale_weight_norms=0.01", "--optimizer_type=RMSprop"), ()),
}
"""Name -> flags of all its runs, and of those with DeepSpeed."""


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    pytest.importorskip("deepspeed")
    return TinyRuns(tmp_path, picture_folder(5))


def check(told: dict[str, dict], stderr: str) -> None:
    for name in CASES:
        assert told[name]["far"] < 1e-5 and told[name]["resumed"] and told[name]["learned"], (name, told[name])
    assert told["bad"] is True
    assert stderr.count("the step was skipped") == stderr.count("step 3: the loss or its gradient is not finite") == 1
    assert "picture.png cannot be read any more" in stderr and "Traceback" not in stderr


def test_one_process_trains_and_resumes_as_without_deepspeed(runs, script_environment, tmp_path):
    (tmp_path / "one.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "one.py"), str(tmp_path), json.dumps(CASES)]
    done = subprocess.run(command, env=script_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    check(json.loads((tmp_path / "told.json").read_text()), done.stderr)
    assert (tmp_path / "fails" / "t-step00000003-state" / "train_state.json").exists()


def test_two_processes_train_and_resume_as_without_deepspeed(runs, script_environment, tmp_path):
    """--zero_stage and --offload_optimizer_device; a process without images and modules that drop out in one process only."""
    (tmp_path / "two.py").write_text(SCRIPT)
    results = run_two(tmp_path / "two.py", tmp_path, json.dumps(CASES), environment=script_environment)
    assert [status for status, _ in results] == [2, 2], results
    check(json.loads((tmp_path / "told.json").read_text()), results[0][1])
    assert "saved the LoRA that was trained, but no state: with --deepspeed each process has a part" in results[0][1]
    assert (tmp_path / "fails" / "t-step00000003.safetensors").exists()
    assert not (tmp_path / "fails" / "t-step00000003-state").exists()
