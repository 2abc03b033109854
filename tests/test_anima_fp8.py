"""Training with frozen weights in 8 bits, on tiny checkpoints in this process."""

from __future__ import annotations

import pytest
import torch

from library.nn.fp8 import FP8, fp8_layers
from tests.tiny_runs import same_tensors
from tests.trainer_runs import CACHED_IN_MEMORY, Runs

BF16 = "--mixed_precision=bf16"


@pytest.fixture
def runs(tiny_anima, picture_folder, tmp_path) -> Runs:
    return Runs("anima", tmp_path, tiny_anima, picture_folder(4))


def trained(lora: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for key, value in lora.items() if "lora_up" in key])


@pytest.mark.parametrize(
    ("flags", "text_layers"), [(("--fp8_base_unet", *CACHED_IN_MEMORY), 0), (("--fp8_base", "--cache_latents"), 14)]
)
def test_training_differs_slightly_and_resumes_exactly(runs, flags, text_layers):
    flag, *caches = flags
    settings = (*caches, BF16, "--max_train_steps=4", "--network_dropout=0.1")
    runs.train(*settings, output="plain")
    trainer = runs.train(*settings, flag, "--save_every_n_steps=2", "--save_state", output="whole")
    assert all(layer.weight.dtype == FP8 for layer in fp8_layers(trainer.denoiser))
    if text_layers:
        assert len(list(fp8_layers(trainer.text_encoder.model))) == text_layers
    plain, whole = trained(runs.lora("plain")), trained(runs.lora("whole"))
    assert whole.any() and not torch.equal(plain, whole)
    assert torch.cosine_similarity(plain, whole, dim=0) > 0.8  # AdamW's first steps go by signs, so small gradients weigh much
    state = runs.folder / "whole" / "tiny-step00000002-state"
    runs.train(*settings, flag, f"--resume={state}", output="resumed")
    assert same_tensors(runs.lora("whole"), runs.lora("resumed"))
    assert runs.metadata("whole")["ss_fp8_base_unet" if flag == "--fp8_base_unet" else "ss_fp8_base"] == "True"


def test_base_weights_checkpointing_and_samples_go_with_8_bits(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 3\n")
    runs.train(*CACHED_IN_MEMORY, BF16, "--max_train_steps=1", output="base")
    base = ("--base_weights", runs.folder / "base" / "tiny.safetensors")
    more = (f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=1", BF16, "--fp8_base")
    runs.train(*CACHED_IN_MEMORY, "--max_train_steps=2", *more, *base, output="plain")
    runs.train(*CACHED_IN_MEMORY, "--max_train_steps=2", *more, *base, "--gradient_checkpointing", output="checkpointed")
    assert same_tensors(runs.lora("plain"), runs.lora("checkpointed")) and trained(runs.lora("plain")).any()
    assert len(list((runs.folder / "plain" / "sample").iterdir())) == 2
