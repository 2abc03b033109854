"""The real trainer of Stable Diffusion 3, in this process, on tiny checkpoints in the real key layout: what only SD3 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from library.errors import CheckpointError, OptionError
from sd3_train_network import Sd3NetworkTrainer
from tests.tiny_runs import same_tensors
from tests.trainer_runs import CACHED_IN_MEMORY, Runs, trained

LATENTS = ("--cache_latents", "--max_train_steps=1")
ALONE = (*CACHED_IN_MEMORY, "--max_train_steps=1", "--network_train_unet_only")
PREVIEW = "a red cat --w 64 --h 64 --s 2 --d 3 --l 3\n"


@pytest.fixture
def make_runs(tmp_path, tiny_sd3, picture_folder) -> Callable[[str], Runs]:
    pictures = picture_folder(2)
    return lambda kind: Runs(kind, tmp_path, tiny_sd3, pictures)


@pytest.fixture
def runs(make_runs) -> Runs:
    return make_runs("sd3")


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """But for rounding: encoders in other batches round otherwise."""
    same_names = first.keys() == second.keys()
    return same_names and all(torch.allclose(first[key], second[key], rtol=1e-3, atol=2e-5) for key in first)


# ---------------------------------------------------------------- network


def test_two_network_modules_train_alike(runs):
    arguments = ("--network_args", "x_attn_dim=8", "emb_dims=[2,2,2,2,2,2]", "train_block_indices=0,2")
    for module in ("networks.lora_sd3", "networks.lora"):
        runs.train(*LATENTS, f"--network_module={module}", *arguments, output=module)
    assert same_tensors(runs.lora("networks.lora_sd3"), runs.lora("networks.lora"))
    assert trained(runs.lora("networks.lora")) == {"lora_unet", "lora_te1", "lora_te2"}
    assert runs.metadata("networks.lora")["ss_network_module"] == "networks.lora"


@pytest.mark.slow
def test_save_format_names_the_modules_as_diffusers_does(runs):
    for output, flags in {"plain": (), "diffusers": ("--save_format=diffusers",), "comfy": ("--save_format=comfy",)}.items():
        runs.train(*LATENTS, *flags, output=output)
    beginnings = {name.split(".")[0] for name in runs.lora("diffusers")}
    assert beginnings == {"transformer", "text_encoder", "text_encoder_2"}
    assert same_tensors(runs.lora("comfy"), runs.lora("plain"))  # ComfyUI takes the usual names


# ---------------------------------------------------------------- text


TEXT_FLAGS = ["--t5xxl_max_token_length=8", "--apply_lg_attn_mask", "--apply_t5_attn_mask", "--clip_l_dropout_rate=1",
              "--clip_g_dropout_rate=1", "--t5_dropout_rate=1"]  # fmt: skip


@pytest.mark.slow
def test_flags_of_the_text_train_otherwise(runs):
    found = []
    for flags in ([], *([flag] for flag in TEXT_FLAGS)):
        runs.train(*ALONE, *flags)
        found.append(runs.lora())
        assert not any(same_tensors(found[-1], other) for other in found[:-1]), flags


@pytest.mark.slow
def test_dropped_encoders_are_still_there_in_validation_and_pictures(runs):
    """A rate of 1 takes all text out of the training alone."""
    dropouts = ("--clip_l_dropout_rate=1", "--clip_g_dropout_rate=1", "--t5_dropout_rate=1")
    assert runs.drawn(prompt=PREVIEW) == runs.drawn(*dropouts, prompt=PREVIEW)
    validation = ("--validation_split=0.5", "--max_train_steps=1", "--learning_rate=1e-9")
    baselines = [runs.train(*ALONE, *validation, *flags).validation.record.baseline for flags in ((), dropouts)]
    assert baselines[0] == baselines[1] > 0


@pytest.mark.slow
def test_a_rate_of_dropout_is_that_of_the_uses(runs):
    """Every use of an image draws for itself, and each encoder for itself."""
    runs.write_dataset(num_repeats=16)
    trainer = runs.train(*ALONE, "--max_train_steps=16", "--clip_l_dropout_rate=0.5", "--t5_dropout_rate=0.5",
                         trainer_class=noting_what_was_dropped())  # fmt: skip
    clip_l, clip_g, t5 = (torch.cat(found) for found in zip(*trainer.dropped, strict=True))
    assert 0.2 < clip_l.float().mean() < 0.8 and 0.2 < t5.float().mean() < 0.8 and not clip_g.any()
    assert (clip_l != t5).any()


def noting_what_was_dropped() -> type:
    class Noting(Sd3NetworkTrainer):
        def train(self) -> None:
            self.dropped: list[tuple[torch.Tensor, ...]] = []
            super().train()

        def with_dropped_encoders(self, text: Any, draws: Any) -> Any:
            left = super().with_dropped_encoders(text, draws)
            states = (left.l_states, left.g_states, left.t5_states)
            self.dropped.append(tuple(~own.flatten(1).any(dim=1) for own in states))
            return left

    return Noting


def test_t5_works_where_and_as_it_is_told(runs, monkeypatch):
    import sd3_train_network

    places = []

    def noted(encoder: Any, parts: Any, **where: Any) -> None:
        places.append(where["t5_device"])
        load(encoder, parts, **where)

    load = sd3_train_network.load_text_encoder
    monkeypatch.setattr(sd3_train_network, "load_text_encoder", noted)
    trainer = runs.train(*LATENTS, "--t5xxl_dtype=bf16", "--t5xxl_device=cpu")
    dtypes = [next(model.parameters()).dtype for model in trainer.text_models(trainer.text_encoder)]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16] and places == ["cpu"]


@pytest.mark.parametrize("train", [True, False], ids=["train", "cache"])
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(runs, train):
    data = runs.checked(*LATENTS, "--dry_run", "--t5xxl_device=cuda:99")
    trainer = Sd3NetworkTrainer(data)
    with pytest.raises(
        OptionError, match="--t5xxl_device cuda:99: (this PyTorch .* finds no such device|there is no such device)"
    ):
        trainer.train() if train else trainer.start_accelerator()
    runs.left_out = ("--t5xxl",)
    runs.train(*LATENTS, "--dry_run", "--t5xxl_device=cuda:99")  # there is nothing to put there


@pytest.mark.slow
def test_numbers_of_t5_count(runs):
    base = (*ALONE, "--mixed_precision=bf16")
    for dtype in ("bf16", "float32", "fp8"):
        runs.train(*base, f"--t5xxl_dtype={dtype}", output=dtype)
    bf16, float32, fp8 = map(runs.lora, ("bf16", "float32", "fp8"))
    assert not same_tensors(bf16, float32) and not same_tensors(bf16, fp8) and not same_tensors(float32, fp8)


def test_without_t5_zeros_take_its_place(runs, caplog):
    caplog.set_level("INFO")
    runs.left_out = ("--t5xxl",)
    for output, flags in {"live": LATENTS, "cached": (*CACHED_IN_MEMORY, "--max_train_steps=1")}.items():
        trainer = runs.train(*flags, output=output)
        assert trainer.text_encoder.t5 is None and trained(runs.lora(output)) == {"lora_unet", "lora_te1", "lora_te2"}
    assert caplog.text.count("text encoder 3: none (there is no T5)") == 2
    assert "there is no T5-XXL" in caplog.text and close(runs.lora("live"), runs.lora("cached"))
    with pytest.raises(CheckpointError, match="train_t5xxl=true needs a T5, and there is none: give --t5xxl"):
        runs.checked(*LATENTS, "--network_args", "train_t5xxl=true")


def test_all_in_one_file_trains_as_files_of_their_own(make_runs, tiny_sd3):
    runs = make_runs("sd3")
    runs.train(*LATENTS, output="apart")
    runs.left_out = ("--clip_l", "--clip_g", "--t5xxl")
    runs.train(*LATENTS, f"--pretrained_model_name_or_path={tiny_sd3['sd3_whole']}", output="whole")
    assert same_tensors(runs.lora("apart"), runs.lora("whole"))


# ---------------------------------------------------------------- CLIP live, T5 from the cache


class TestT5CachedWhileTheClipsTrain:
    CACHES = (*CACHED_IN_MEMORY, "--max_train_steps=2")

    def test_as_without_a_cache(self, runs):
        cached = runs.train(*self.CACHES, output="cached")
        live = runs.train("--cache_latents", "--max_train_steps=2", output="live")
        assert cached.text_encoder.t5 is None and live.text_encoder.t5 is not None
        assert trained(runs.lora("cached")) == {"lora_unet", "lora_te1", "lora_te2"}
        assert close(runs.lora("cached"), runs.lora("live"))

    def test_t5_has_its_own_numbers_cached_or_not(self, runs):
        """Autocast, which what is trained needs, is not for the T5."""
        base = ("--cache_latents", "--max_train_steps=2", "--mixed_precision=bf16", "--t5xxl_dtype=float32")
        runs.train(*base, "--cache_text_encoder_outputs", "--text_encoder_batch_size=1", output="cached")
        runs.train(*base, output="live")
        assert same_tensors(runs.lora("cached"), runs.lora("live"))

    @pytest.mark.slow
    def test_base_weights_of_t5_alone(self, runs):
        """They are in what is cached, and live encoders have no part in them."""
        only_t5 = ("--network_train_text_encoder_only", "--text_encoder_lr", "0", "0", "0.1", *TestTrainT5.T5)
        runs.train(*LATENTS, *only_t5, output="t5")
        base = ("--max_train_steps=2", f"--base_weights={runs.folder / 't5' / 'tiny.safetensors'}")
        for output, flags in {
            "cached": (*CACHED_IN_MEMORY, *base),
            "live": ("--cache_latents", *base),
            "plain": self.CACHES,
        }.items():
            runs.train(*flags, output=output)
        assert close(runs.lora("cached"), runs.lora("live")) and not close(runs.lora("cached"), runs.lora("plain"))

    def test_resumed_equals_uninterrupted(self, runs):
        flags = (*CACHED_IN_MEMORY, "--max_train_steps=4", "--network_dropout=0.2", "--clip_l_dropout_rate=0.3",
                 "--pos_emb_random_crop_rate=0.5")  # fmt: skip
        runs.train(*flags, "--save_every_n_steps=2", "--save_state", output="whole")
        state = runs.folder / "whole" / "tiny-step00000002-state"
        runs.train(*flags, f"--resume={state}", output="resumed")
        assert same_tensors(runs.lora("whole"), runs.lora("resumed"))

    @pytest.mark.slow
    def test_pictures_are_those_without_a_cache(self, runs):
        cached, live = (runs.drawn(*flags, prompt=PREVIEW) for flags in (("--cache_text_encoder_outputs",), ()))
        assert len(cached) == 1 and cached == live
        (runs.folder / "prompts.txt").write_text(PREVIEW)
        sampling = (f"--sample_prompts={runs.folder / 'prompts.txt'}", "--sample_every_n_steps=2", "--learning_rate=0.1")
        runs.train(*self.CACHES, *sampling)
        assert len(list((runs.folder / "out" / "sample").iterdir())) == 1
        runs.train(*self.CACHES, "--learning_rate=0.1", output="plain")
        assert same_tensors(runs.lora(), runs.lora("plain"))

    def test_preserved_images(self, runs):
        runs.write_dataset(custom_attributes={"diff_output_preservation": True})
        trainer = runs.train(*self.CACHES, "--learning_rate=0", "--unet_lr=1e-3")
        assert trainer.average.mean == 0.0  # a new network is on target already

    @pytest.mark.slow
    def test_caption_dropout_takes_both_parts_of_the_text(self, runs):
        """Cached and live agree on which captions are dropped, of both parts."""
        runs.write_dataset(caption_dropout_rate=0.5, num_repeats=3)
        flags = ("--cache_latents", "--max_train_steps=3")
        runs.train(*flags, "--cache_text_encoder_outputs", output="cached")
        runs.train(*flags, output="live")
        assert close(runs.lora("cached"), runs.lora("live"))


# ---------------------------------------------------------------- T5 trained


class TestTrainT5:
    T5 = ("--network_args", "train_t5xxl=true")

    def test_each_encoder_learns_at_its_rate(self, runs):
        trainer = runs.train("--cache_latents", "--max_train_steps=2", *self.T5, "--text_encoder_lr", "5e-4", "4e-4", "3e-4")
        assert trained(runs.lora()) == {"lora_unet", "lora_te1", "lora_te2", "lora_te3"}
        rates = trainer.learner.rates()
        assert rates.pop("lr/unet") == 1e-3 and list(rates.values()) == [5e-4, 4e-4, 3e-4]
        assert runs.metadata()["ss_text_encoder_lr"] == "[0.0005, 0.0004, 0.0003]"

    @pytest.mark.parametrize("flags", [LATENTS, (*CACHED_IN_MEMORY, "--max_train_steps=1")], ids=["live", "cached"])
    def test_a_rate_of_0_leaves_it_out(self, runs, flags):
        runs.train(*flags, *self.T5, "--text_encoder_lr", "1e-3", "1e-3", "0")
        assert trained(runs.lora()) == {"lora_unet", "lora_te1", "lora_te2"}

    def test_alone(self, runs):
        runs.train(*LATENTS, *self.T5, "--network_train_text_encoder_only", "--text_encoder_lr", "0", "0", "1e-3")
        assert trained(runs.lora()) == {"lora_te3"} and {key.split("_")[1] for key in runs.lora()} == {"te3"}

    def test_not_with_cached_text(self, runs):
        with pytest.raises(OptionError, match="train_t5xxl=true cannot be combined with --cache_text_encoder_outputs: a T5 that"):
            runs.checked(*CACHED_IN_MEMORY, "--max_train_steps=1", *self.T5)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("flag", ["--pos_emb_random_crop_rate=1", "--enable_scaled_pos_embed"])
def test_flags_of_the_positions_train_otherwise(make_runs, flag):
    assert make_runs("sd35m").changes(flag, base=ALONE)


@pytest.mark.slow
def test_windows_of_the_positions_stay_in_the_middle_for_pictures(make_runs):
    runs = make_runs("sd35m")
    assert runs.drawn(prompt=PREVIEW) == runs.drawn("--pos_emb_random_crop_rate=1", prompt=PREVIEW)
