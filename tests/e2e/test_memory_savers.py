"""What saves memory changes nothing: LoRA files of the real trainer, in this process, on a tiny Anima of five blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anima_train_network import AnimaNetworkTrainer
from library.anima.architecture import ANIMA
from library.errors import OptionError
from library.files.safetensors_file import save_safetensors
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.preflight import check_run
from tests.e2e.anima_runs import CACHED, model_flags, run_flags, same_lora, write_dataset
from tools.tiny_anima import SIZES, dit_tensors

BLOCKS = 5


@pytest.fixture
def train(tiny_anima, picture_folder, tmp_path):
    """``train("name", *flags)`` -> the LoRA file. Steps with dropout, samples and validation."""
    deep = tmp_path / "deep.safetensors"
    save_safetensors(deep, dit_tensors(replace(SIZES["tiny"], blocks=BLOCKS), seed=0), {"format": "pt"})
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(4))
    (tmp_path / "prompts.txt").write_text("a red square --w 64 --h 64 --s 2 --d 1 --n blurry\n")
    flags = [*model_flags({**tiny_anima, "dit": deep}), *CACHED, "--max_train_steps=3", "--network_dropout=0.1",
             f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2", "--validate_every_n_steps=2",
             "--validation_split=0.25"]  # fmt: skip

    def run(name: str, *more: str) -> Path:
        options = read_options(AnimaTrainOptions, [*flags, *run_flags(tmp_path / name, dataset), *more])
        AnimaNetworkTrainer(check_run(options, ANIMA)).train()
        assert len(list((tmp_path / name / "sample").iterdir())) == 1
        return tmp_path / name / "tiny.safetensors"

    return run


def test_lora_files_are_the_same(train):
    plain = train("plain")
    for name, flags in {
        "limit": [f"--blocks_to_swap={BLOCKS - 2}"],
        "none": ["--blocks_to_swap=0"],
        "offload": ["--cpu_offload_checkpointing"],
        "unsloth": ["--unsloth_offload_checkpointing", "--gradient_checkpointing", "--blocks_to_swap=1"],
    }.items():
        assert same_lora(plain, train(name, *flags)), name


def test_more_than_the_limit_ends_before_anything_is_loaded(train):
    with pytest.raises(OptionError, match=f"--blocks_to_swap is 4, but this model has {BLOCKS} blocks: give at most 3"):
        train("over", "--blocks_to_swap=4")
