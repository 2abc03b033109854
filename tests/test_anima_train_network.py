"""The Anima trainer in this process: what its text encoder's LoRA does in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anima_train_network import AnimaNetworkTrainer
from library.errors import NetworkError, OptionError
from library.nn.attention import attentions
from library.nn.attention_kernels import AttentionKernel
from tests.anima_runs import CACHED_IN_MEMORY, AnimaRuns
from tests.tiny_runs import same_tensors

LIVE = ("--cache_latents", "--max_train_steps=3")


@pytest.fixture
def runs(tiny_anima, picture_folder, tmp_path) -> AnimaRuns:
    return AnimaRuns(tmp_path, tiny_anima, picture_folder(4))


def parts(lora: dict[str, torch.Tensor]) -> set[str]:
    """lora_unet, lora_te: which parts of the model have been trained."""
    return {key.split("_", 2)[0] + "_" + key.split("_", 2)[1] for key, value in lora.items() if "lora_up" in key and value.any()}


def test_text_encoder_and_denoiser_are_trained_together(runs):
    trainer = runs.train(*LIVE)
    lora = runs.lora()
    assert parts(lora) == {"lora_te", "lora_unet"} and trainer.denoiser.cuts_zero_rows
    assert lora["lora_te_layers_0_self_attn_q_proj.lora_up.weight"].any()
    assert [name for name, _ in zip(trainer.learner.rates(), range(2), strict=False)] == ["lr/textencoder 1", "lr/unet"]


def test_the_text_encoder_alone(runs):
    runs.train(*LIVE, "--network_train_text_encoder_only", "--text_encoder_lr=1e-3")
    lora = runs.lora()
    assert parts(lora) == {"lora_te"} and not any(key.startswith("lora_unet") for key in lora)


@pytest.mark.parametrize("flags", [("--network_train_unet_only",), ("--text_encoder_lr=0",), ("--cache_text_encoder_outputs",)])
def test_the_denoiser_alone(runs, flags):
    runs.train(*LIVE, *flags)
    assert {key.split("_")[1] for key in runs.lora()} == {"unet"}


def test_cached_text_and_a_trained_text_encoder_exclude_each_other(runs):
    with pytest.raises(OptionError, match="--cache_text_encoder_outputs"):
        runs.checked(*CACHED_IN_MEMORY, "--text_encoder_lr=1e-4")


def test_rates_of_their_own(runs):
    trainer = runs.train(*LIVE, "--text_encoder_lr=5e-4", "--unet_lr=2e-3")
    assert trainer.learner.rates() == {"lr/textencoder 1": 5e-4, "lr/unet": 2e-3}


def test_gradient_checkpointing_changes_nothing(runs):
    dropouts = ("--network_dropout=0.2", "--network_args", "rank_dropout=0.2")
    runs.train(*LIVE, *dropouts, output="plain")
    runs.train(*LIVE, *dropouts, "--gradient_checkpointing", output="checkpointed")
    assert same_tensors(runs.lora("plain"), runs.lora("checkpointed"))


def test_resumed_equals_uninterrupted(runs):
    settings = ("--network_dropout=0.2", "--gradient_accumulation_steps=2", "--optimizer_type=AdamW8bit")
    runs.train("--cache_latents", "--max_train_steps=4", *settings, output="whole")
    runs.train("--cache_latents", "--max_train_steps=4", *settings, "--save_every_n_steps=2", "--save_state", output="parts")
    state = runs.folder / "parts" / "tiny-step00000002-state"
    runs.train("--cache_latents", "--max_train_steps=4", *settings, f"--resume={state}", output="resumed")
    assert same_tensors(runs.lora("whole"), runs.lora("resumed"))


class Recording(AnimaNetworkTrainer):
    """Notes what the denoiser was asked for, and the network's strength at that time."""

    def train(self):
        self.asked = []
        super().train()

    def predict(self, denoiser, noisy, batch):
        strengths = {lora.multiplier for lora in self.network.loras}
        self.asked.append((strengths, batch.text.prompt_embeds.detach().clone(), batch.text.prompt_embeds.requires_grad))
        return super().predict(denoiser, noisy, batch)


def test_preserved_targets_are_made_with_the_text_encoder_as_it_was(runs):
    runs.train("--cache_latents", "--max_train_steps=2", "--learning_rate=0.1", output="first")
    runs.write_dataset(custom_attributes={"diff_output_preservation": True})
    start = f"--network_weights={runs.folder / 'first' / 'tiny.safetensors'}"
    trainer = runs.train("--cache_latents", "--max_train_steps=1", start, trainer_class=Recording)
    plain, trained = trainer.asked
    assert plain[0] == {0.0} and trained[0] == {1.0}
    assert not plain[2] and trained[2]
    assert not torch.equal(plain[1], trained[1])


def test_validation_measures_the_base_model_with_the_text_encoder_as_it_was(runs):
    trainer = runs.train("--cache_latents", "--max_train_steps=2", "--learning_rate=0.1", "--validation_split=0.5",
                         "--validate_every_n_steps=2", trainer_class=Recording)  # fmt: skip
    strengths = [asked[0] for asked in trainer.asked]
    assert {0.0} in strengths and strengths[-1] == {1.0}
    assert all(not asked[2] for asked in trainer.asked if asked[0] == {0.0})


def test_samples_are_drawn_with_the_trained_text_encoder(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 3\n")
    sampling = (f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2", "--sample_at_first")
    flags = ("--cache_latents", "--max_train_steps=2", "--learning_rate=0.1", "--network_train_text_encoder_only")
    runs.train(*flags, *sampling)
    runs.train(*flags, output="plain")
    first, last = sorted((tmp_path / "out" / "sample").iterdir(), key=lambda path: "e000000" not in path.name)
    assert first.read_bytes() != last.read_bytes()
    assert same_tensors(runs.lora(), runs.lora("plain"))


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


@pytest.mark.parametrize("flags", [("--split_attn",), ("--sdpa",), ("--attn_mode=torch",), ("--attn_mode=sdpa", "--split_attn")])
def test_attention_kernels_that_need_no_package(runs, flags):
    trainer = runs.train("--cache_latents", "--max_train_steps=2", *flags, output="other")
    kernels = {module.kernel for module in attentions(trainer.denoiser)}
    assert kernels == {AttentionKernel("torch", "--split_attn" in flags)}
    runs.train("--cache_latents", "--max_train_steps=2", output="plain")
    plain, other = runs.lora("plain"), runs.lora("other")
    assert all(torch.allclose(plain[key], other[key], atol=1e-5) for key in plain)


def test_an_attention_kernel_that_does_not_work_here_is_told_before_anything_is_loaded(runs):
    run = runs.checked("--max_train_steps=2", "--dry_run")
    attention = replace(run.options.attention, attn_mode="flash")  # as if the package were there
    trainer = AnimaNetworkTrainer(replace(run, options=replace(run.options, attention=attention)))
    with pytest.raises(OptionError, match="--attn_mode=flash.*--attn_mode=torch"):
        trainer.train()


COMPILED = ("--cache_latents", "--max_train_steps=3", "--torch_compile")


def test_compiled_blocks_train_alike(runs, caplog):
    caplog.set_level("INFO")
    trainer = runs.train(*COMPILED, "--dynamo_backend=eager", output="compiled")
    assert all("forward" in vars(block) for block in trainer.denoiser.blocks)
    assert caplog.text.count("compiling the blocks: the first steps take minutes") == 1
    runs.train(*COMPILED[:-1], output="plain")
    plain, compiled = runs.lora("plain"), runs.lora("compiled")
    assert all(torch.allclose(plain[key], compiled[key], atol=1e-5) for key in plain)


@pytest.mark.slow
def test_compiled_runs_repeat_with_checkpointing_and_fp8(runs):
    flags = (*COMPILED, "--dynamo_backend=aot_eager", "--gradient_checkpointing", "--fp8_base_unet", "--mixed_precision=bf16")
    for output in ("first", "again"):
        runs.train(*flags, output=output)
    assert same_tensors(runs.lora("first"), runs.lora("again"))


def test_a_backend_that_is_not_there_is_told_before_anything_is_loaded(runs):
    with pytest.raises(OptionError, match="--dynamo_backend tensort"):
        runs.train("--max_train_steps=2", "--torch_compile", "--dynamo_backend=tensort")
