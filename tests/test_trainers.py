"""What every trainer keeps, whatever its model: the same tests for each, in this process, on tiny checkpoints."""

from __future__ import annotations

import pytest
import torch

from library.errors import OptionError
from library.nn.attention import attentions
from library.nn.attention_kernels import AttentionKernel
from tests.e2e.kinds import KINDS, over
from tests.tiny_runs import same_tensors
from tests.trainer_runs import CACHED_IN_MEMORY, ONE_STEP, Runs, deep_denoiser, mask_left_halves, trained

LATENTS = ("--cache_latents", "--max_train_steps=2")
CACHES = (*CACHED_IN_MEMORY, "--max_train_steps=2")
DROPOUTS = ("--network_dropout=0.2", "--network_args", "rank_dropout=0.2")
BLOCKS = 5
STEEP = ("--cache_latents", "--max_train_steps=2", "--learning_rate=0.1")


@pytest.fixture
def runs(kind, request, picture_folder, tmp_path) -> Runs:
    return Runs(kind, tmp_path, request.getfixturevalue(KINDS[kind].fixture), picture_folder(4))


@pytest.fixture
def deep_runs(runs, kind, tmp_path) -> Runs:
    """The same of a denoiser with enough blocks to swap."""
    deep = deep_denoiser(kind, runs.models, tmp_path / "deep.safetensors", blocks=BLOCKS)
    runs.models = {**runs.models, KINDS[kind].files["--pretrained_model_name_or_path"]: deep}
    return runs


@over("sd3", "lumina", slow=("anima", "sd1", "sd2", "sdxl", "sd35m", "sd35l"))
def test_denoiser_and_text_encoders_are_trained_together(runs, kind):
    trainer = runs.train(*LATENTS)
    lora = runs.lora()
    assert trained(lora) == {"lora_unet", *KINDS[kind].text_prefixes}
    assert trainer.average.mean > 0
    assert [name for name in trainer.learner.rates() if name == "lr/unet"] and runs.metadata()["ss_base_model_version"]


@over("lumina", slow=("anima", "sd1", "sdxl", "sd3"))
def test_text_encoders_alone(runs, kind):
    runs.train(*LATENTS, "--network_train_text_encoder_only", "--text_encoder_lr=1e-3")
    lora = runs.lora()
    assert trained(lora) == set(KINDS[kind].text_prefixes) and not any(key.startswith("lora_unet") for key in lora)


@over("sd3", slow=("anima", "sd1", "sdxl", "lumina"))
def test_the_denoiser_alone(runs):
    for flags in (("--network_train_unet_only",), ("--text_encoder_lr=0",)):
        runs.train(*LATENTS, *flags)
        assert {key.split("_")[1] for key in runs.lora()} == {"unet"}


@over("anima", "sdxl", "lumina")
def test_cached_text_and_a_trained_text_encoder_exclude_each_other(runs):
    with pytest.raises(OptionError, match="cannot be combined with --cache_text_encoder_outputs"):
        runs.checked(*CACHES, "--text_encoder_lr=1e-4")


@over("sd3", slow=("anima", "sd1", "lumina"))
def test_rates_of_their_own(runs, kind):
    trainer = runs.train(*LATENTS, "--text_encoder_lr=5e-4", "--unet_lr=2e-3")
    rates = trainer.learner.rates()
    assert rates.pop("lr/unet") == 2e-3 and list(rates.values()) == [5e-4] * len(KINDS[kind].text_prefixes)


@over("anima", "lumina", slow=("sd1", "sd3", "sdxl", "sd35m"))
def test_gradient_checkpointing_changes_nothing(runs):
    runs.train(*LATENTS, *DROPOUTS, output="plain")
    for flag in ("--gradient_checkpointing", "--cpu_offload_checkpointing"):
        runs.train(*LATENTS, *DROPOUTS, flag, output=flag)
        assert same_tensors(runs.lora("plain"), runs.lora(flag)), flag


@over("sd3", slow=("anima", "lumina", "sd35m", "sd35l"))
def test_swapped_blocks_change_nothing(deep_runs):
    """With dropout, samples and validation."""
    runs, most = deep_runs, BLOCKS - 2
    (runs.folder / "prompts.txt").write_text("a red square --w 64 --h 64 --s 2 --d 1 --n blurry\n")
    flags = (*CACHED_IN_MEMORY, "--network_train_unet_only", "--max_train_steps=3", *DROPOUTS, "--validate_every_n_steps=2",
             "--validation_split=0.25", f"--sample_prompts={runs.folder / 'prompts.txt'}", "--sample_every_n_steps=2")  # fmt: skip
    runs.train(*flags, output="plain")
    for name, savers in {
        "limit": [f"--blocks_to_swap={most}"],
        "none": ["--blocks_to_swap=0"],
        "unsloth": ["--unsloth_offload_checkpointing", "--gradient_checkpointing", "--blocks_to_swap=1"],
    }.items():
        if runs.has("unsloth_offload_checkpointing") or name != "unsloth":
            runs.train(*flags, *savers, output=name)
            assert same_tensors(runs.lora("plain"), runs.lora(name)), name
    with pytest.raises(OptionError, match=f"--blocks_to_swap is {most + 1}, but this model has {BLOCKS} blocks: give at most 3"):
        runs.checked(*flags, f"--blocks_to_swap={most + 1}")


@over("sd3", "lumina", slow=("anima", "sd1", "sdxl", "sd35m"))
def test_resumed_equals_uninterrupted(runs):
    flags = ("--cache_latents", "--max_train_steps=4", "--network_dropout=0.2", "--gradient_accumulation_steps=2",
             "--optimizer_type=AdamW8bit", "--noise_offset=0.1")  # fmt: skip
    runs.train(*flags, output="whole")
    runs.train(*flags, "--save_every_n_steps=2", "--save_state", output="parts")
    state = runs.folder / "parts" / "tiny-step00000002-state"
    runs.train(*flags, f"--resume={state}", output="resumed")
    assert same_tensors(runs.lora("whole"), runs.lora("parts")) and same_tensors(runs.lora("whole"), runs.lora("resumed"))


CHANGED = {
    "anima": ("--qwen3_max_token_length=99", "--discrete_flow_shift=3.0"),
    "sd3": ("--t5_dropout_rate=0.5", "--t5xxl_max_token_length=99", "--training_shift=3.0", "--pos_emb_random_crop_rate=1.0"),
    "lumina": ("--system_prompt=You draw.", "--gemma2_max_token_length=99", "--model_prediction_type=sigma_scaled"),
}


@over("lumina", slow=("anima", "sd3"))
def test_options_that_changed_since_a_state_was_saved_are_told(runs, kind):
    runs.train(*ONE_STEP, "--save_state")
    state = f"--resume={runs.folder / 'out' / 'tiny-state'}"
    warnings = runs.checked(*ONE_STEP, "--max_train_steps=2", state, *CHANGED[kind]).warnings
    for flag in CHANGED[kind]:
        name, _, value = flag.partition("=")
        assert any(f"{name} was " in warning and f" and is {value} now" in warning for warning in warnings), flag
    assert not any(" was " in warning for warning in runs.checked(*ONE_STEP, "--max_train_steps=2", state).warnings)


@over("sd3", "lumina", slow=("anima", "sd1", "sdxl", "sd35m"))
def test_cold_warm_and_live_train_on_the_same_values(runs):
    """Latents are drawn from what the image coder says of an image: by the image alone, cached or not."""
    alone = ("--network_train_unet_only", "--max_train_steps=2")
    on_disk = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    cold = runs.train(*alone, *on_disk, output="cold")
    runs.train(*alone, *on_disk, output="warm")
    live = runs.train(*alone, output="live")
    assert trained(runs.lora("cold")) == {"lora_unet"}
    assert same_tensors(runs.lora("cold"), runs.lora("warm"))
    assert live.average.mean == pytest.approx(cold.average.mean, rel=1e-5)  # encoders in other batches round otherwise


@over("sd1", "sd3", slow=("anima", "sdxl", "sd35m", "lumina"))
def test_a_new_network_has_nothing_to_learn_from_preserved_images(runs):
    runs.write_dataset(custom_attributes={"diff_output_preservation": True})
    trainer = runs.train("--cache_latents", "--max_train_steps=1", "--learning_rate=0", "--unet_lr=1e-3")
    assert trainer.average.mean == 0.0  # it changes nothing, so it is on target already


def recording(trainer_class: type) -> type:
    """The trainer, that notes what the denoiser was asked for, and the network's strength at that time."""

    class Recording(trainer_class):  # type: ignore[misc]
        def train(self):
            self.asked = []
            super().train()

        def predict(self, denoiser, noisy, batch):
            strengths = {lora.multiplier for lora in self.network.loras}
            states = first_states(batch.text)
            self.asked.append((strengths, states.detach().clone(), states.requires_grad))
            return super().predict(denoiser, noisy, batch)

    return Recording


def first_states(text) -> torch.Tensor:
    """What the trained encoder has made of the captions."""
    names = ("prompt_embeds", "states", "l_states")
    return next(getattr(text, name) for name in names if hasattr(text, name))


@over("anima", "sd3", slow=("sd1", "sdxl", "lumina"))
def test_preserved_targets_are_made_with_the_text_encoder_as_it_was(runs):
    runs.train(*STEEP, output="first")
    runs.write_dataset(custom_attributes={"diff_output_preservation": True})
    start = f"--network_weights={runs.folder / 'first' / 'tiny.safetensors'}"
    asked = runs.train("--cache_latents", "--max_train_steps=1", start, trainer_class=recording(runs.trainer_class)).asked
    plain, with_network = asked
    assert plain[0] == {0.0} and with_network[0] == {1.0}
    assert not plain[2] and with_network[2]
    assert not torch.equal(plain[1], with_network[1])


@over("lumina", slow=("anima", "sd1", "sd3"))
def test_validation_looks_at_fixed_noise_and_changes_nothing(runs):
    """And measures the base model with the text encoder as it was."""
    validation = ("--validation_split=0.5", "--validate_every_n_steps=1")
    trainer = runs.train(*STEEP, *validation, trainer_class=recording(runs.trainer_class))
    strengths = [asked[0] for asked in trainer.asked]
    assert {0.0} in strengths and strengths[-1] == {1.0}
    assert all(not asked[2] for asked in trainer.asked if asked[0] == {0.0})
    runs.train(*STEEP, validation[0], output="without")
    assert same_tensors(runs.lora(), runs.lora("without"))
    again = runs.train(*STEEP, *validation, output="again")
    assert again.validation.notes() == trainer.validation.notes()


@over("sd3", "lumina", slow=("anima", "sd1", "sd2", "sdxl", "sd35m", "sd35l"))
def test_samples_are_drawn_with_what_is_trained_and_change_nothing(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a cat --w 64 --h 80 --s 2 --d 3 --n a bad picture\nanother --s 1 --l 1 --w 64 --h 64\n"
    )
    sampling = (f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2", "--sample_at_first")
    runs.train(*STEEP, *sampling)
    runs.train(*STEEP, output="plain")
    first, _, last, _ = sorted((tmp_path / "out" / "sample").iterdir(), key=lambda path: ("e000000" not in path.name, path.name))
    assert first.read_bytes() != last.read_bytes()
    assert same_tensors(runs.lora(), runs.lora("plain"))
    runs.train(*CACHES, "--network_train_unet_only", *sampling, output="cached")
    assert len(list((tmp_path / "cached" / "sample").iterdir())) == 4


@over("sd3", "lumina", slow=("anima", "sd1", "sdxl"))
def test_what_changes_the_training_of_every_model(runs, tmp_path):
    masks = mask_left_halves(runs.pictures, tmp_path / "masks")
    assert runs.changes("--network_dropout=0.5")
    runs.write_dataset(conditioning_data_dir=masks.as_posix())
    runs.train(*ONE_STEP, "--masked_loss", output="masked")
    assert not same_tensors(runs.lora("plain"), runs.lora("masked"))


@over("anima", slow=("sd1", "sdxl", "sd3", "sd35l", "lumina"))
@pytest.mark.parametrize(
    "flags",
    [
        (*CACHED_IN_MEMORY, "--network_train_unet_only", "--optimizer_type=AdamW8bit", "--optimizer_args", "min_8bit_size=64"),
        pytest.param(
            (*CACHED_IN_MEMORY, "--network_train_unet_only", "--gradient_checkpointing", "--scale_weight_norms=0.05",
             "--network_args", "module_dropout=0.5"), marks=pytest.mark.slow),
        ("--cache_latents", "--network_dropout=0.2", "--text_encoder_lr=2e-3", "--lr_scheduler=cosine"),
    ],
    ids=("8 bits", "checkpointing", "text encoders"),
)  # fmt: skip
def test_fused_updates_change_nothing(runs, flags):
    fused = runs.train(*flags, "--max_train_steps=2", "--max_grad_norm=0", "--fused_backward_pass", output="fused")
    plain = runs.train(*flags, "--max_train_steps=2", "--max_grad_norm=0", output="plain")
    assert same_tensors(runs.lora("fused"), runs.lora("plain"))
    assert fused.average.mean == plain.average.mean
    assert all(weight.grad is None for weight in fused.network.parameters())


@over(slow=("anima", "sd1", "sd3", "lumina"))
def test_a_resumed_fused_run_equals_an_uninterrupted_one(runs):
    settings = (*CACHED_IN_MEMORY, "--network_train_unet_only", "--max_train_steps=4", "--max_grad_norm=0",
                "--fused_backward_pass", "--network_dropout=0.2")  # fmt: skip
    runs.train(*settings, "--save_every_n_steps=2", "--save_state", output="whole")
    runs.train(*settings, f"--resume={runs.folder / 'whole' / 'tiny-step00000002-state'}", output="resumed")
    assert same_tensors(runs.lora("whole"), runs.lora("resumed"))


@over("lumina", slow=("anima", "sd3"))
def test_samplers_of_sample_pictures(runs):
    """--sample_sampler, or that of a prompt."""
    euler, by_prompt = runs.drawn(prompt="a cat --w 64 --h 64 --s 4 --d 3\na cat --w 64 --h 64 --s 4 --d 3 --ss er_sde\n")
    (by_flag,) = runs.drawn("--sample_sampler=er_sde", prompt="a cat --w 64 --h 64 --s 4 --d 3\n")
    assert euler != by_prompt == by_flag


@over("lumina", slow=("anima", "sd1", "sdxl", "sd3", "sd35m"))
def test_weights_in_8_bits(runs):
    runs.train(*LATENTS, "--mixed_precision=bf16", "--fp8_base")
    runs.train(*LATENTS, "--mixed_precision=bf16", output="plain")
    assert "lora_unet" in trained(runs.lora()) and not same_tensors(runs.lora(), runs.lora("plain"))


@over(slow=("anima", "sd3", "lumina", "sd35m"))
def test_attention_kernels_that_need_no_package(runs):
    runs.train(*LATENTS, output="plain")
    for flags in (("--split_attn",), ("--sdpa",), ("--attn_mode=torch",), ("--attn_mode=sdpa", "--split_attn")):
        trainer = runs.train(*LATENTS, *flags, output="other")
        assert {module.kernel for module in attentions(trainer.denoiser)} == {AttentionKernel("torch", "--split_attn" in flags)}
        plain, other = runs.lora("plain"), runs.lora("other")
        assert all(torch.allclose(plain[key], other[key], atol=1e-5) for key in plain)


@over(slow=("anima", "sd1", "sd3", "sd35m", "lumina"))
def test_compiled_blocks_train_alike(runs, caplog):
    caplog.set_level("INFO")
    trainer = runs.train(*CACHES, "--torch_compile", "--dynamo_backend=eager", output="compiled")
    assert all("forward" in vars(block) for block in trainer.denoiser.blocks)
    assert caplog.text.count("compiling the blocks: the first steps take minutes") == 1
    runs.train(*CACHES, output="plain")
    plain, compiled = runs.lora("plain"), runs.lora("compiled")
    assert all(torch.allclose(plain[key], compiled[key], rtol=1e-3, atol=1e-5) for key in plain)


@over(slow=("anima", "sd3", "lumina"))
def test_compiled_runs_repeat_with_checkpointing_and_8_bits(runs):
    flags = (*LATENTS, "--torch_compile", "--dynamo_backend=aot_eager", "--gradient_checkpointing", "--fp8_base_unet",
             "--mixed_precision=bf16")  # fmt: skip
    for output in ("first", "again"):
        runs.train(*flags, output=output)
    assert same_tensors(runs.lora("first"), runs.lora("again"))
