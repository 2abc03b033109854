"""The Anima trainer in this process: what its text encoder's LoRA does in training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anima_train_network import AnimaNetworkTrainer
from library.errors import NetworkError, OptionError
from tests.trainer_runs import Runs

LIVE = ("--cache_latents", "--max_train_steps=3")


@pytest.fixture
def runs(tiny_anima, picture_folder, tmp_path) -> Runs:
    return Runs("anima", tmp_path, tiny_anima, picture_folder(4))


@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing",)])
def test_a_network_of_somebody_elses_on_the_text_encoder_in_half_precision(runs, tmp_path, flags):
    """Its layers are float32 and get the encoder's bfloat16, in training, in validation and for sample pictures."""
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 3\n")
    trainer = runs.train(*LIVE, "--network_module=tests.networks.third_party_lora", "--mixed_precision=bf16", *flags,
                         "--validation_split=0.5", "--validate_every_n_steps=3", f"--sample_prompts={tmp_path / 'prompts.txt'}",
                         "--sample_every_n_steps=3")  # fmt: skip
    assert not trainer.denoiser.cuts_zero_rows  # its layers might have biases
    of_text = len([path for path, _ in trainer.text_encoder.model.named_modules() if path.endswith("q_proj")])
    ups = [up.weight for up in trainer.network.ups]
    assert 0 < of_text < len(ups) and all(up.any() for up in ups)


def test_a_network_that_reads_the_weights_before_they_are_there_is_told(runs):
    flags = ("--network_module=tests.networks.third_party_lora", "--network_args", "remember_weights=yes")
    with pytest.raises(NetworkError, match="third_party_lora: what --network_args asks for reads the model's weights"):
        runs.train(*LIVE, *flags)


def test_an_attention_kernel_that_does_not_work_here_is_told_before_anything_is_loaded(runs):
    run = runs.checked("--max_train_steps=2", "--dry_run")
    attention = replace(run.options.attention, attn_mode="flash")  # as if the package were there
    trainer = AnimaNetworkTrainer(replace(run, options=replace(run.options, attention=attention)))
    with pytest.raises(OptionError, match="--attn_mode=flash.*--attn_mode=torch"):
        trainer.train()


def test_a_backend_that_is_not_there_is_told_before_anything_is_loaded(runs):
    with pytest.raises(OptionError, match="--dynamo_backend tensort"):
        runs.train("--max_train_steps=2", "--torch_compile", "--dynamo_backend=tensort")
