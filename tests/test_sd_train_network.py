"""The real trainers of Stable Diffusion 1, 2 and XL, in this process, on tiny checkpoints in the real key layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.errors import OptionError
from tests.e2e.sd_runs import KINDS
from tests.sd_runs import PARTS, SdRuns

LATENTS = ("--cache_latents", "--max_train_steps=2")
CACHES = ("--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps=2")


@pytest.fixture
def make_runs(tmp_path, tiny_sd, picture_folder):
    pictures = picture_folder(4)
    return lambda kind: SdRuns(kind, tmp_path, tiny_sd, pictures)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(tensors: dict[str, torch.Tensor], prefix: str) -> bool:
    """Whether the modules of that prefix are there and have learned."""
    ups = [tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}_") and name.endswith("lora_up.weight")]
    return bool(ups) and any(bool(up.any()) for up in ups)


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_and_text_encoders_are_trained_together(make_runs, kind):
    runs = make_runs(kind)
    trainer = runs.train(*LATENTS)
    saved = runs.lora()
    assert trained(saved, "lora_unet")
    prefixes = {"lora_te1", "lora_te2"} if kind == "sdxl" else {"lora_te"}
    assert all(trained(saved, prefix) for prefix in prefixes)
    assert {name.partition("_text_model")[0] for name in saved if "_te" in name.split("unet")[0]} == prefixes
    assert trainer.average.mean > 0


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_cold_warm_and_live_train_on_the_same_values(make_runs, kind):
    """Latents are drawn from what the image coder says of an image: by the image alone, cached or not."""
    runs = make_runs(kind)
    alone = ("--network_train_unet_only", "--max_train_steps=2")
    cold = runs.train(*alone, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", output="cold")
    runs.train(*alone, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", output="warm")
    live = runs.train(*alone, output="live")
    assert trained(runs.lora("cold"), "lora_unet")
    assert same_tensors(runs.lora("cold"), runs.lora("warm"))
    assert live.average.mean == pytest.approx(cold.average.mean, rel=1e-5)  # encoders in other batches round otherwise


@pytest.mark.parametrize(
    ("kind", "flag"),
    [("sd1", "--gradient_checkpointing"), ("sdxl", "--gradient_checkpointing"), ("sdxl", "--cpu_offload_checkpointing")],
)
def test_checkpointing_changes_nothing(make_runs, kind, flag):
    runs = make_runs(kind)
    runs.train(*LATENTS, "--network_args", "conv_dim=2", output="plain")
    runs.train(*LATENTS, flag, "--network_args", "conv_dim=2", output="saved")
    assert same_tensors(runs.lora("plain"), runs.lora("saved"))


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(make_runs, kind):
    runs = make_runs(kind)
    flags = ("--cache_latents", "--max_train_steps=4", "--network_dropout=0.1", "--noise_offset=0.1", "--min_snr_gamma=5")
    runs.train(*flags, output="whole")
    runs.train(*flags, "--save_state", "--save_every_n_steps=2", output="parts")
    state = runs.folder / "parts" / "tiny-step00000002-state"
    runs.train(*flags, f"--resume={state}", output="resumed")
    assert same_tensors(runs.lora("whole"), runs.lora("parts"))
    assert same_tensors(runs.lora("whole"), runs.lora("resumed"))


def test_folder_and_pickle_train_as_the_single_file_does(make_runs, tiny_sd):
    runs = make_runs("sd1")
    runs.train(*CACHES, output="file")
    for form in ("sd1_ckpt", "sd1_folder"):
        runs.train(*CACHES, f"--pretrained_model_name_or_path={tiny_sd[form]}", output=form)
        assert same_tensors(runs.lora("file"), runs.lora(form)), form


def test_sdxl_folder_trains_as_the_single_file_does(make_runs, tiny_sd):
    runs = make_runs("sdxl")
    runs.train(*CACHES, output="file")
    runs.train(*CACHES, f"--pretrained_model_name_or_path={tiny_sd['sdxl_folder']}", output="folder")
    assert same_tensors(runs.lora("file"), runs.lora("folder"))


class Told(PARTS["sdxl"][2]):  # type: ignore[misc]
    """Remembers the vectors that the denoiser is given."""

    def predict(self, denoiser: Any, noisy: Any, batch: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        plain, denoiser.predict = denoiser.predict, lambda *inputs: seen.append(inputs[3]) or plain(*inputs)
        try:
            return super().predict(denoiser, noisy, batch)
        finally:
            del denoiser.predict
            self.told = batch, seen[0]


def test_sdxl_is_told_the_crop_that_was_made(make_runs):
    runs = make_runs("sdxl")
    trainer = runs.train(*CACHES[:2], "--max_train_steps=1", trainer_class=Told)
    batch, vector = trainer.told
    items = {item.key: item for item in trainer.run.training_set.items}
    for row, key in enumerate(batch.item_keys):
        item = items[key]
        height_first = [*item.size_wh[::-1], *item.crop_left_top[::-1], *item.bucket_wh[::-1]]
        waves = vector[row, -6 * 256 :].view(6, 256)
        for told, number in zip(waves, height_first, strict=True):
            frequencies = 10000.0 ** (-torch.arange(128) / 128)
            assert torch.allclose(told[:128], torch.cos(number * frequencies), atol=2e-3)
            assert torch.allclose(told[128:], torch.sin(number * frequencies), atol=2e-3)


@pytest.mark.parametrize(("rates", "there"), [(("0", "1e-3"), "lora_te2"), (("1e-3", "0"), "lora_te1")])
def test_one_of_two_text_encoders_alone(make_runs, rates, there):
    runs = make_runs("sdxl")
    runs.train(*LATENTS, "--text_encoder_lr", *rates)
    assert trained(runs.lora(), there)
    assert {name.partition("_text_model")[0] for name in runs.lora() if name.startswith("lora_te")} == {there}


def test_text_encoders_alone(make_runs):
    runs = make_runs("sd1")
    runs.train(*LATENTS, "--network_train_text_encoder_only")
    assert trained(runs.lora(), "lora_te") and not any(name.startswith("lora_unet") for name in runs.lora())


def test_cached_text_and_trained_text_encoders_exclude_each_other(make_runs):
    with pytest.raises(OptionError, match="cannot be combined with --cache_text_encoder_outputs"):
        make_runs("sdxl").train(*CACHES, "--text_encoder_lr", "1e-4")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_preserved_images_have_the_models_own_prediction_as_target(make_runs, kind):
    runs = make_runs(kind)
    runs.write_dataset(custom_attributes={"diff_output_preservation": True})
    runs.train(*LATENTS)
    losses = runs.train("--cache_latents", "--max_train_steps=1", "--learning_rate=0", "--unet_lr=1e-3", output="other")
    assert losses.average.mean == 0.0  # a new LoRA changes nothing, so it is on target already


def test_velocity_is_another_target(make_runs):
    runs = make_runs("sd2")
    runs.train(*CACHES, output="noise")
    runs.train(*CACHES, "--v_parameterization", output="velocity")
    assert not same_tensors(runs.lora("noise"), runs.lora("velocity"))
    assert runs.metadata("velocity")["ss_base_model_version"] == "sd_v2_v"
    assert runs.metadata("velocity")["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_samples_are_drawn_and_change_nothing(make_runs, kind, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a (red:1.3) cat --w 64 --h 72 --s 2 --d 3 --n a very [bad] picture --ss euler_a\nanother --s 2 --l 1\n"
    )
    runs = make_runs(kind)
    sampling = (f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=1")
    runs.train(*LATENTS, *sampling)
    runs.train(*LATENTS, output="plain")
    runs.train(*CACHES, *sampling, output="cached")
    assert len(list((tmp_path / "out" / "sample").iterdir())) == len(list((tmp_path / "cached" / "sample").iterdir())) == 4
    assert same_tensors(runs.lora(), runs.lora("plain"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_weights_in_8_bits(make_runs, kind):
    runs = make_runs(kind)
    runs.train(*LATENTS, "--mixed_precision=bf16", "--fp8_base")
    runs.train(*LATENTS, "--mixed_precision=bf16", output="plain")
    assert trained(runs.lora(), "lora_unet") and not same_tensors(runs.lora(), runs.lora("plain"))


@pytest.mark.slow
def test_compiled_blocks_train_alike(make_runs):
    runs = make_runs("sd1")
    runs.train(*CACHES, output="plain")
    runs.train(*CACHES, "--torch_compile", "--dynamo_backend=eager", output="compiled")
    plain, compiled = runs.lora("plain"), runs.lora("compiled")
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-3, atol=1e-5) for name in plain)


def test_weighted_captions_count(make_runs):
    runs = make_runs("sd1")
    for caption in runs.pictures.glob("*.txt"):
        caption.write_text("a (very:1.5) red [thing]")
    runs.train(*CACHES, output="plain")
    runs.train(*CACHES, "--weighted_captions", output="weighted")
    assert not same_tensors(runs.lora("plain"), runs.lora("weighted"))


def test_an_unknown_sampler_of_a_prompt_is_told_before_anything_is_loaded(make_runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --ss eular\n")
    with pytest.raises(OptionError, match=r"prompt 1: --ss eular is no sampler \(did you mean euler\?\)"):
        make_runs("sd1").checked(f"--sample_prompts={tmp_path / 'prompts.txt'}", "--max_train_steps=1")
