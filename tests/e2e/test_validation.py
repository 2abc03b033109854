"""Validation and --save_best of a real run: the curves in TensorBoard's files, the best LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.files.safetensors_file import read_header
from tests.e2e.kinds import CACHED, KINDS, model_flags, over, run_flags, same_lora, write_dataset
from tools.read_scalars import read_scalars

PREFIX = "loss/validation/"
VALIDATION = ["--validation_split=0.4", "--validation_seed=3", "--validate_every_n_steps=2", "--save_best"]
FLAGS = [*VALIDATION, "--max_train_epochs=3", "--learning_rate=1e-2"]


def curve(logs: Path, name: str) -> dict[int, float]:
    return dict(read_scalars(logs, PREFIX + name))


@pytest.fixture
def flags(kind, request, picture_folder, tmp_path):
    images = picture_folder(8)
    models = model_flags(kind, request.getfixturevalue(KINDS[kind].fixture))

    def make(output: str) -> list[str]:
        dataset = write_dataset(tmp_path / f"{output}.toml", images, kind, batch_size=2, shuffle_caption=True, flip_aug=True)
        logs = f"--logging_dir={tmp_path / output / 'logs'}"
        return [*models, *run_flags(kind, tmp_path / output, dataset), *FLAGS, *CACHED, logs]

    return make


@over("anima", slow=("sd3", "lumina"))
def test_the_curves_the_best_file_and_what_is_printed(run_script, kind, flags, tmp_path):
    done = run_script(KINDS[kind].script, *flags("out"), "--save_every_n_steps=1", launcher=1)
    assert done.returncode == 0, done.stdout + done.stderr
    out, logs = tmp_path / "out", tmp_path / "out" / "logs"
    steps = int(re.search(r"(\d+) steps in all", done.stdout)[1])
    by_step, by_epoch = curve(logs, "step_average"), curve(logs, "epoch_average")
    assert sorted(by_step) == list(range(2, steps + 1, 2))
    assert sorted(by_epoch) == [steps // 3, 2 * steps // 3, steps]
    timesteps = [curve(logs, f"timestep_{t}") for t in (200, 400, 600, 800)]
    for step, mean in {**by_step, **by_epoch}.items():
        assert mean == pytest.approx(sum(one[step] for one in timesteps) / 4, rel=1e-5)
    baseline = curve(logs, "baseline")
    assert len(set(baseline.values())) == 1 and sorted(baseline) == sorted({0, *by_step, *by_epoch})
    assert curve(logs, "epoch_divergence").keys() == by_epoch.keys()
    best = min({**by_step, **by_epoch}.items(), key=lambda point: point[1])[0]
    assert same_lora(out / "tiny-best.safetensors", out / f"tiny-step{best:08d}.safetensors")
    metadata = read_header(out / "tiny-best.safetensors").metadata
    assert metadata["ss_steps"] == str(best) and metadata["ss_num_validation_images"] == "3"
    assert "validation: 3 images" in done.stdout and "validation of the base model: " in done.stdout
    assert re.search(r"validation after step 2: \d\.\d{4} \(base model \d\.\d{4}, ", done.stdout)


@over("anima", slow=("sd3", "lumina"))
def test_what_was_measured_does_not_change_what_is_trained_and_survives_a_stop(run_script, kind, flags, tmp_path):
    dropout = "--network_dropout=0.1"
    whole = run_script(KINDS[kind].script, *flags("whole"), dropout)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    other = run_script(
        KINDS[kind].script, *flags("other"), dropout, "--validate_every_n_steps=1000", "--save_state", "--save_every_n_steps=3"
    )
    assert other.returncode == 0, other.stdout + other.stderr
    assert same_lora(tmp_path / "whole" / "tiny.safetensors", tmp_path / "other" / "tiny.safetensors")
    state = tmp_path / "other" / "tiny-step00000003-state"
    rest = run_script(KINDS[kind].script, *flags("rest"), dropout, f"--resume={state}")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "validation of the base model" not in rest.stdout
    assert same_lora(tmp_path / "whole" / "tiny.safetensors", tmp_path / "rest" / "tiny.safetensors")
    uninterrupted = curve(tmp_path / "whole" / "logs", "step_average")
    resumed = curve(tmp_path / "rest" / "logs", "step_average")
    assert resumed == {step: value for step, value in uninterrupted.items() if step > 3}
