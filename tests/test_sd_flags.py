"""What single flags do to a training of Stable Diffusion 1, 2 and XL: real trainers in this process, on tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.tiny_runs import same_tensors
from tests.trainer_runs import Runs, caption_all

LATENTS = ("--cache_latents", "--max_train_steps=1")
ALONE = (*LATENTS, "--cache_text_encoder_outputs")  # the denoiser alone
LONG = ", ".join(f"thing number {number}" for number in range(40))  # more than 75 tokens, not more than 225


@pytest.fixture
def make_runs(tmp_path, tiny_sd, picture_folder) -> Callable[[str], Runs]:
    pictures = picture_folder(2)
    return lambda kind: Runs(kind, tmp_path, tiny_sd, pictures)


def closest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(("kind", "acts"), [("sd1", True), ("sdxl", False)])
def test_clip_skip_acts_where_it_is_said_to(make_runs, kind, acts):
    assert make_runs(kind).changes("--clip_skip=2") is acts


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_max_token_length_lets_in_the_end_of_a_long_caption(make_runs, kind):
    runs = make_runs(kind)
    caption_all(runs.pictures, LONG)
    assert runs.changes("--max_token_length=225")


@pytest.mark.parametrize("base", [ALONE, LATENTS])
def test_weighted_captions_count_cached_or_not(make_runs, base):
    runs = make_runs("sdxl")
    caption_all(runs.pictures, "a (very:1.5) red [thing]")
    assert runs.changes("--weighted_captions", base=base)


@pytest.mark.slow
def test_cached_texts_of_other_settings_are_not_used(make_runs):
    runs = make_runs("sd1")
    caption_all(runs.pictures, f"a (very:1.5) red [thing], {LONG}")
    cached = (*LATENTS, "--cache_text_encoder_outputs_to_disk")
    runs.train(*cached, output="plain")
    for flag in ("--clip_skip=2", "--max_token_length=150", "--weighted_captions"):
        runs.train(*cached, flag, output="over old files")
        assert not same_tensors(runs.lora("over old files"), runs.lora("plain")), flag


# ---------------------------------------------------------------- noise and loss


DDPM = ["--zero_terminal_snr --v_parameterization", "--min_snr_gamma=1", "--v_pred_like_loss=0.5", "--debiased_estimation_loss",
        "--scale_v_pred_loss_like_noise_pred --v_parameterization", "--min_timestep=900", "--max_timestep=100"]  # fmt: skip


@pytest.mark.slow
def test_flags_of_the_noise_levels_reach_the_training(make_runs):
    """With SGD: AdamW's first step is the same whatever a loss is multiplied with."""
    runs = make_runs("sd1")
    base = (*ALONE, "--optimizer_type=SGD", "--learning_rate=1")
    found = []
    for number, flags in enumerate(["", "--v_parameterization", *DDPM]):
        runs.train(*base, *flags.split(), output=str(number))
        found.append(runs.lora(str(number)))
        assert not any(same_tensors(found[-1], other) for other in found[:-1]), flags


NOISE = ["--noise_offset=0.3", "--noise_offset=0.3 --noise_offset_random_strength", "--noise_offset=0.1 --adaptive_noise_scale=1",
         "--multires_noise_iterations=4", "--multires_noise_iterations=4 --multires_noise_discount=0.9", "--ip_noise_gamma=0.3",
         "--ip_noise_gamma=0.3 --ip_noise_gamma_random_strength", "--loss_type=l1", "--loss_type=huber --huber_schedule=snr",
         "--loss_type=smooth_l1 --huber_schedule=exponential"]  # fmt: skip


@pytest.mark.slow
def test_flags_of_noise_and_loss_all_train_otherwise(make_runs):
    runs = make_runs("sd1")
    found = []
    for number, flags in enumerate(["", *NOISE]):
        runs.train(*ALONE, "--optimizer_type=SGD", "--learning_rate=1", *flags.split(), output=str(number))
        found.append(runs.lora(str(number)))
    for number, lora in enumerate(found):
        assert not any(same_tensors(lora, other) for other in found[:number]), NOISE[number - 1]


# ---------------------------------------------------------------- models, precision and memory


@pytest.mark.parametrize(("kind", "form"), [("sd1", "vae"), ("sdxl", "vae_folder")])
@pytest.mark.slow
def test_another_vae_makes_other_latents(make_runs, tiny_sd, kind, form):
    assert make_runs(kind).changes(f"--vae={tiny_sd[form]}")


def test_no_half_vae_encodes_in_float32(make_runs):
    assert make_runs("sdxl").changes("--no_half_vae", base=(*ALONE, "--mixed_precision=bf16"))


@pytest.mark.slow
def test_8_bits_of_the_denoiser_alone_or_of_the_text_encoders_too(make_runs):
    runs = make_runs("sdxl")
    base = (*LATENTS, "--mixed_precision=bf16", "--network_train_unet_only")
    for output, flags in {"plain": (), "unet": ("--fp8_base_unet",), "all": ("--fp8_base",)}.items():
        runs.train(*base, *flags, output=output)
    plain, unet, everything = (runs.lora(output) for output in ("plain", "unet", "all"))
    assert not same_tensors(plain, unet) and not same_tensors(plain, everything) and not same_tensors(unet, everything)


@pytest.mark.slow
def test_attention_that_needs_no_package_differs_by_rounding_at_most(make_runs):
    runs = make_runs("sd1")
    runs.train(*ALONE, output="plain")
    for flags in (("--sdpa", "--mem_eff_attn"), ("--attn_mode=torch", "--split_attn")):
        runs.train(*ALONE, *flags, output="other")
        assert closest(runs.lora("plain"), runs.lora("other")) < 1e-4, flags


def test_full_bf16_keeps_the_lora_in_16_bits(make_runs):
    runs = make_runs("sd1")
    runs.train(*ALONE, "--mixed_precision=bf16", "--full_bf16")
    assert {tensor.dtype for tensor in runs.lora().values()} == {torch.bfloat16}


# ---------------------------------------------------------------- network and rates


@pytest.mark.slow
def test_rates_of_two_text_encoders_by_list_or_by_flags_of_their_own(make_runs):
    runs = make_runs("sdxl")
    runs.train(*LATENTS, "--text_encoder_lr", "1e-3", "5e-4", output="listed")
    runs.train(*LATENTS, "--text_encoder_lr1=1e-3", "--text_encoder_lr2=5e-4", output="named")
    runs.train(*LATENTS, "--text_encoder_lr=1e-3", output="one")
    assert same_tensors(runs.lora("listed"), runs.lora("named"))
    assert not same_tensors(runs.lora("listed"), runs.lora("one"))
    assert runs.metadata("named")["ss_text_encoder_lr"] == "[0.001, 0.0005]"


def test_a_network_module_of_somebody_else(make_runs):
    trainer = make_runs("sd1").train(*LATENTS, "--network_module=tests.networks.third_party_lora")
    ups = [up.weight for up in trainer.network.ups]
    assert ups and all(up.any() for up in ups)


@pytest.mark.parametrize(("kind", "text"), [("sd1", "text_encoder.")])
def test_save_format_names_the_modules_as_diffusers_does(make_runs, kind, text):
    runs = make_runs(kind)
    runs.train(*LATENTS, "--save_format=diffusers", output="diffusers")
    runs.train(*LATENTS, "--save_format=comfy", output="comfy")
    runs.train(*LATENTS, output="plain")
    names = set(runs.lora("diffusers"))
    assert any(name.startswith("unet.") for name in names) and any(name.startswith(text) for name in names)
    assert same_tensors(runs.lora("comfy"), runs.lora("plain"))  # ComfyUI takes the usual names


# ---------------------------------------------------------------- sample pictures


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_sampler_of_sample_pictures(make_runs, tmp_path, kind):
    runs = make_runs(kind)
    samplers = ("ddim", "euler_a", "dpmsolver++")
    assert len({runs.drawn(f"--sample_sampler={sampler}")[0] for sampler in samplers}) == 3


@pytest.mark.parametrize(("kind", "acts"), [("sd1", True), ("sdxl", False)])
def test_clip_skip_of_sample_pictures_is_that_of_the_training(make_runs, tmp_path, kind, acts):
    runs = make_runs(kind)
    assert (runs.drawn() != runs.drawn("--clip_skip=2")) is acts
    assert runs.metadata("drawn 1")["ss_clip_skip"] == "2"
