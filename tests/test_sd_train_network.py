"""The real trainers of Stable Diffusion 1, 2 and XL, in this process, on tiny checkpoints in the real key layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.errors import OptionError
from sdxl_train_network import SdxlNetworkTrainer
from tests.tiny_runs import same_tensors
from tests.trainer_runs import Runs, trained

LATENTS = ("--cache_latents", "--max_train_steps=2")
CACHES = ("--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps=2")


@pytest.fixture
def make_runs(tmp_path, tiny_sd, picture_folder):
    pictures = picture_folder(4)
    return lambda kind: Runs(kind, tmp_path, tiny_sd, pictures)


@pytest.mark.slow
def test_folder_and_pickle_train_as_the_single_file_does(make_runs, tiny_sd):
    runs = make_runs("sd1")
    runs.train(*CACHES, output="file")
    for form in ("sd1_ckpt", "sd1_folder"):
        runs.train(*CACHES, f"--pretrained_model_name_or_path={tiny_sd[form]}", output=form)
        assert same_tensors(runs.lora("file"), runs.lora(form)), form


@pytest.mark.slow
def test_sdxl_folder_trains_as_the_single_file_does(make_runs, tiny_sd):
    runs = make_runs("sdxl")
    runs.train(*CACHES, output="file")
    runs.train(*CACHES, f"--pretrained_model_name_or_path={tiny_sd['sdxl_folder']}", output="folder")
    assert same_tensors(runs.lora("file"), runs.lora("folder"))


class Told(SdxlNetworkTrainer):
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
    assert there in trained(runs.lora())
    assert {name.partition("_text_model")[0] for name in runs.lora() if name.startswith("lora_te")} == {there}


def test_velocity_is_another_target(make_runs):
    runs = make_runs("sd2")
    runs.train(*CACHES, output="noise")
    runs.train(*CACHES, "--v_parameterization", output="velocity")
    assert not same_tensors(runs.lora("noise"), runs.lora("velocity"))
    assert runs.metadata("velocity")["ss_base_model_version"] == "sd_v2_v"
    assert runs.metadata("velocity")["modelspec.prediction_type"] == "v"


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
