"""--deepspeed on the real trainer and tiny Anima checkpoints, as a user starts it with accelerate configured for DeepSpeed."""

from __future__ import annotations

import json
import os

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from tests.e2e.anima_runs import SCRIPT, model_flags, run_flags, write_dataset

pytestmark = pytest.mark.skipif(os.name == "nt", reason="deepspeed does not train on Windows")
MEMORY = ("--mixed_precision=bf16", "--gradient_checkpointing", "--cache_latents", "--gradient_accumulation_steps=2")
# what accelerate launch says of itself when it is configured for DeepSpeed
LAUNCHER = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "7"}


@pytest.fixture
def flags(tiny_anima, picture_folder, tmp_path):
    pytest.importorskip("deepspeed")
    dataset = write_dataset(tmp_path / "set.toml", picture_folder(4))
    always = (*model_flags(tiny_anima), *MEMORY, "--learning_rate=1e-3", "--max_train_steps=4")
    return lambda name, *more: [*always, *run_flags(tmp_path / name, dataset), *map(str, more)]


def test_two_processes_with_the_launcher_configured_for_deepspeed(flags, run_script, tmp_path):
    plain = run_script(SCRIPT, *flags("plain"), launcher=2)
    assert plain.returncode == 0, plain.stderr
    states = ("--deepspeed", "--offload_optimizer_device=cpu", "--save_state", "--save_every_n_steps=2")
    ours = run_script(SCRIPT, *flags("ours", *states), launcher=2, environment=LAUNCHER)
    assert ours.returncode == 0, ours.stderr
    state = tmp_path / "ours" / "tiny-step00000002-state"
    description = json.loads((state / "train_state.json").read_text(encoding="utf-8"))
    assert description["identity"]["the optimizer as"] == "2 pieces of --deepspeed, one for each process"
    again = run_script(SCRIPT, *flags("again", *states, f"--resume={state}"), launcher=2, environment=LAUNCHER)
    assert again.returncode == 0, again.stderr

    one, two, three = (lora(tmp_path / name / "tiny.safetensors") for name in ("plain", "ours", "again"))
    assert one.keys() == two.keys() and all(weight.dtype == torch.float32 for weight in two.values())
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)  # of about 4e-3 that four steps move it
    assert all(torch.equal(two[key], three[key]) for key in two)


def lora(file) -> dict[str, torch.Tensor]:
    return dict(read_tensors(read_header(file)))
