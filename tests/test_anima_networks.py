"""The Anima trainer in this process: learning rates of parts, the table of modules, --fused_backward_pass."""

from __future__ import annotations

import logging
import re

import pytest

from library.errors import NetworkError
from tests.anima_runs import CACHED_IN_MEMORY, AnimaRuns
from tests.tiny_runs import same_tensors

STEPS = (*CACHED_IN_MEMORY, "--max_train_steps=3")


@pytest.fixture
def runs(tiny_anima, picture_folder, tmp_path) -> AnimaRuns:
    return AnimaRuns(tmp_path, tiny_anima, picture_folder(4))


def test_parts_train_at_their_rates(runs, caplog):
    with caplog.at_level(logging.INFO):
        trainer = runs.train(*STEPS, "--self_attn_lr=5e-4", "--mlp_lr=0", "--mod_lr=1e-5", "--llm_adapter_lr=2e-4",
                             "--network_args", "verbose=true")  # fmt: skip
    assert trainer.learner.rates() == {
        "lr/unet self_attn": 5e-4, "lr/unet mod": 1e-5, "lr/unet llm_adapter": 2e-4, "lr/unet": 1e-3
    }  # fmt: skip
    changed = {key for key, value in runs.lora().items() if "lora_up" in key and value.any()}
    assert any("adaln_modulation" in key for key in changed) and any("llm_adapter" in key for key in changed)
    assert not any(re.search(r"unet_blocks_\d+_mlp", key) for key in runs.lora())
    (heading,) = [line for line in caplog.messages if line.startswith("module ")]
    rows = [line for line in caplog.messages if re.match(r"(llm_adapter\.)?blocks\.\d+\.\S+ +\d+ ", line)]
    assert len(rows) == len(trainer.network.unet_loras) and heading.split()[:3] == ["module", "rank", "alpha"]


def test_a_dry_run_shows_the_table_and_loads_nothing(runs, caplog):
    caplog.set_level(logging.INFO)
    trainer = runs.train(*STEPS, "--dry_run", "--mod_lr=1e-5", "--network_args", "verbose=true")
    assert not hasattr(trainer, "learner") and next(trainer.denoiser.parameters()).device.type == "meta"
    (row,) = [line.split() for line in caplog.messages if line.startswith("blocks.1.adaln_modulation_mlp.2 ")]
    assert row[1:4] == ["4", "1", "1e-05"] and row[-1] == "lora_unet_blocks_1_adaln_modulation_mlp_2"


def test_rates_that_train_nothing_end_the_run_before_loading(runs):
    with pytest.raises(NetworkError, match="every learning rate is 0"):
        runs.train(*STEPS, "--dry_run", "--learning_rate=0")


def test_rates_that_a_module_does_not_know_end_the_run_before_loading(runs):
    with pytest.raises(NetworkError, match="--mlp_lr: the network module tests.networks.third_party knows no learning rates"):
        runs.train(*STEPS, "--mlp_lr=1e-4", "--network_module=tests.networks.third_party")


@pytest.mark.parametrize(
    "flags",
    [
        (*CACHED_IN_MEMORY, "--optimizer_type=AdamW8bit", "--optimizer_args", "min_8bit_size=64"),
        (*CACHED_IN_MEMORY, "--gradient_checkpointing", "--scale_weight_norms=0.05", "--network_args", "module_dropout=0.5"),
        ("--cache_latents", "--network_dropout=0.2", "--text_encoder_lr=2e-3", "--lr_scheduler=cosine"),  # with the text encoder
    ],
    ids=("8 bits", "checkpointing", "text encoder"),
)
def test_fused_updates_change_nothing(runs, flags):
    fused = runs.train(*flags, "--max_train_steps=3", "--max_grad_norm=0", "--fused_backward_pass", output="fused")
    plain = runs.train(*flags, "--max_train_steps=3", "--max_grad_norm=0", output="plain")
    assert same_tensors(runs.lora("fused"), runs.lora("plain"))
    assert fused.average.mean == plain.average.mean
    assert all(weight.grad is None for weight in fused.network.parameters())


def test_a_resumed_fused_run_equals_an_uninterrupted_one(runs):
    settings = (*CACHED_IN_MEMORY, "--max_train_steps=4", "--max_grad_norm=0", "--fused_backward_pass", "--network_dropout=0.2")
    runs.train(*settings, "--save_every_n_steps=2", "--save_state", output="whole")
    runs.train(*settings, f"--resume={runs.folder / 'whole' / 'tiny-step00000002-state'}", output="resumed")
    assert same_tensors(runs.lora("whole"), runs.lora("resumed"))
