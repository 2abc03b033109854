"""The Anima trainer in this process: learning rates of parts, the table of modules."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from library.errors import CheckpointError, NetworkError, OptionError, UserError
from library.files.safetensors_file import save_safetensors
from tests.trainer_runs import CACHED_IN_MEMORY, Runs

STEPS = (*CACHED_IN_MEMORY, "--max_train_steps=3")


@pytest.fixture
def runs(tiny_anima, picture_folder, tmp_path) -> Runs:
    return Runs("anima", tmp_path, tiny_anima, picture_folder(4))


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
    with pytest.raises(
        OptionError, match="--learning_rate is 0, so that the denoiser is not trained, .* nothing would be trained"
    ):
        runs.checked(*STEPS, "--learning_rate=0")
    with pytest.raises(NetworkError, match="every learning rate is 0"):
        runs.train(*STEPS, "--dry_run", "--unet_lr=0", "--network_args", "network_reg_lrs=.*mlp.*=0")


def test_a_rate_of_0_leaves_the_denoiser_out_but_for_parts_with_their_own(runs):
    runs.train("--cache_latents", "--max_train_steps=1", "--unet_lr=0")
    assert {key.split("_")[1] for key in runs.lora()} == {"te"}
    for number, flags in enumerate((["--mlp_lr=1e-3"], ["--network_args", "network_reg_lrs=.*[.]mlp[.].*=1e-3"])):
        runs.train(*CACHED_IN_MEMORY, "--max_train_steps=1", "--unet_lr=0", *flags, output=str(number))
        assert all(re.match(r"lora_unet_blocks_\d+_mlp_", key) for key in runs.lora(str(number)))


def base_file(folder, names, *, rank=2):
    tensors = {name: torch.ones(rank, rank) for name in names}
    save_safetensors(folder / "base.safetensors", tensors)
    return folder / "base.safetensors"


PAIR = ("lora_down.weight", "lora_up.weight")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"lora_unet_input_blocks_4_1_proj_in.{half}" for half in PAIR], "base.safetensors is a LoRA for SDXL, not for Anima"),
        (["lora_unet_blocks_0_mlp_layer1.lokr_w1"], "base.safetensors is no plain LoRA but a LoKr file"),
        (["lora_unet_blocks_0_mlp_layer1.lora_down.weight"], "only one of lora_down and lora_up"),
        (["blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight"], "base.safetensors is a Cosmos-Predict2 DiT without an LLM adapter, not a LoRA file"),
        ([f"lora_unet_blocks_0_mlp_layer1.{half}" for half in PAIR], "is for a model of other sizes"),
    ],
    ids=("SDXL", "LyCORIS", "torn", "model", "sizes"),
)  # fmt: skip
def test_base_weights_that_do_not_fit_are_told_by_a_dry_run(runs, tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        runs.train(*STEPS, "--dry_run", "--base_weights", base_file(tmp_path, names))


def test_base_weights_of_the_text_encoder_alone(runs, tmp_path, caplog):
    runs.train(
        "--cache_latents", "--max_train_steps=1", "--network_train_text_encoder_only", "--text_encoder_lr=1e-2", output="te"
    )
    file = runs.folder / "te" / "tiny.safetensors"
    caplog.set_level(logging.INFO)
    runs.train(*STEPS, "--dry_run", "--base_weights", file)
    assert [line for line in caplog.messages if line.startswith("LoRA for")] == ["LoRA for denoiser: 20 modules, rank 4"]
    runs.train(*STEPS, "--base_weights", file)  # it is in the cached texts
    assert runs.lora()


def test_weights_that_are_not_finite_are_told_by_a_dry_run(runs):
    runs.train(*CACHED_IN_MEMORY, "--max_train_steps=1")
    weights = runs.lora()
    weights["lora_unet_blocks_0_mlp_layer1.lora_up.weight"][0, 0] = float("nan")
    save_safetensors(runs.folder / "nan.safetensors", weights)
    for flag in ("--base_weights", "--network_weights"):
        with pytest.raises(
            CheckpointError, match="nan.safetensors: lora_unet_blocks_0_mlp_layer1 has values that are not finite"
        ):
            runs.train(*STEPS, "--dry_run", flag, runs.folder / "nan.safetensors")


def test_rates_that_a_module_does_not_know_end_the_run_before_loading(runs):
    with pytest.raises(NetworkError, match="--mlp_lr: the network module tests.networks.third_party knows no learning rates"):
        runs.train(*STEPS, "--mlp_lr=1e-4", "--network_module=tests.networks.third_party")
