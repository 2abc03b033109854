"""The real trainer of Lumina Image 2.0, in this process, on tiny checkpoints in the real key layout: what only Lumina has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lumina_train_network import LuminaNetworkTrainer, drops_ranks
from tests.tiny_runs import same_tensors
from tests.trainer_runs import CACHED_IN_MEMORY, ONE_STEP, Runs, caption_all, trained

LATENTS = ("--cache_latents", "--max_train_steps=1")
SYSTEM = "You are an assistant."
PREVIEW = "--w 64 --h 64 --s 3 --d 3 --l 3"


@pytest.fixture
def runs(tmp_path, tiny_lumina, picture_folder) -> Runs:
    return Runs("lumina", tmp_path, tiny_lumina, picture_folder(2))


# ---------------------------------------------------------------- network


def test_its_own_network_module(runs):
    arguments = ("--network_args", "refiner_dim=0", "embedder_dims=[2,0,2]", "train_block_indices=1")
    runs.train(*LATENTS, "--network_module=networks.lora_lumina", *arguments)
    lora = runs.lora()
    assert trained(lora) == {"lora_unet", "lora_te"} and runs.metadata()["ss_network_module"] == "networks.lora_lumina"
    parts = {"_".join(name.split("_")[2:4]) for name in lora if name.startswith("lora_unet")}
    assert parts == {"layers_1", "final_layer", "x_embedder.alpha", "x_embedder.lora", "cap_embedder"}


@pytest.mark.parametrize(("arguments", "drops"), [
    (None, False), (["dropout=0.1"], False), (["rank_dropout=0.1"], True), ([" rank_dropout = 1e-2 "], True),
    (["rank_dropout=0"], False), (["rank_dropout=0.0", "rank_dropout_scale=True"], False), (["rank_dropout_scale=1"], False),
    (["rank_dropout=None"], False),
])  # fmt: skip
def test_what_drops_ranks(arguments, drops):
    assert drops_ranks(arguments) is drops


def test_save_format_names_the_modules_as_diffusers_does(runs):
    for output, flags in {"plain": (), "diffusers": ("--save_format=diffusers",), "comfy": ("--save_format=comfy",)}.items():
        runs.train(*ONE_STEP, *flags, output=output)
    beginnings = [{name.split(".")[0] for name in runs.lora(output)} for output in ("diffusers", "comfy")]
    assert beginnings == [{"transformer"}, {"diffusion_model"}]
    assert len(runs.lora("comfy")) == len(runs.lora("plain"))


# ---------------------------------------------------------------- text


def test_flags_of_the_text_train_otherwise(runs):
    found = []
    for flags in ((), ("--gemma2_max_token_length=4",), (f"--system_prompt={SYSTEM}",)):
        runs.train(*ONE_STEP, *flags)
        found.append(runs.lora())
        assert not any(same_tensors(found[-1], other) for other in found[:-1]), flags


@pytest.mark.parametrize("flags", [ONE_STEP, (*LATENTS, "--network_train_unet_only")], ids=("cached", "live"))
def test_the_system_prompt_stands_before_captions_that_are_not_empty(runs, flags):
    first, second = sorted(runs.pictures.glob("*.txt"))
    second.write_text("")
    first.write_text("a cat")
    runs.train(*flags, f"--system_prompt={SYSTEM}", output="flag")
    metadata = runs.metadata("flag")
    assert (metadata["ss_system_prompt"], metadata["ss_gemma2_max_token_length"]) == (SYSTEM, "256")
    first.write_text(f"{SYSTEM} <Prompt Start> a cat")
    runs.train(*flags, output="written")
    assert same_tensors(runs.lora("flag"), runs.lora("written"))


@pytest.mark.parametrize(
    "flags", [("--cache_text_encoder_outputs",), pytest.param((), marks=pytest.mark.slow)], ids=("cached", "live")
)
def test_the_system_prompt_stands_before_prompts_but_not_before_negative_ones(runs, flags):
    caption_all(runs.pictures, "")
    lines = "{} --n bad " + PREVIEW + "\n{} " + PREVIEW + "\n"
    by_flag = runs.drawn(*flags, f"--system_prompt={SYSTEM}", prompt=lines.format("a cat", "a dog"))
    marked = [f"{SYSTEM} <Prompt Start> {text}" for text in ("a cat", "a dog")]
    for path in (runs.folder / "drawn 0" / "sample").iterdir():
        with Image.open(path) as picture:
            assert picture.text["parameters"].endswith(f"System prompt: {SYSTEM}")
    assert by_flag == runs.drawn(*flags, prompt=lines.format(*marked))
    assert by_flag != runs.drawn(*flags, prompt=lines.format("a cat", "a dog"))


class Padded(LuminaNetworkTrainer):
    """Texts of unlike lengths are padded and masked, not packed one behind the other."""

    def build_denoiser(self):
        denoiser = super().build_denoiser()
        assert denoiser.packs
        denoiser.packs = False
        return denoiser


def test_captions_of_unlike_lengths_train_alike_packed_or_padded(runs):
    for number, caption in enumerate(sorted(runs.pictures.glob("*.txt"))):
        caption.write_text("a cat" if number else "a long caption about a house by the sea at sunset, with detail")
    for picture in [path for path in runs.pictures.iterdir() if path.suffix != ".txt"]:
        with Image.open(picture) as image:
            image.convert("RGB").resize((64, 64)).save(picture)
    flags = ("--cache_latents", "--max_train_steps=2", "--text_encoder_lr=1e-3")
    packed = runs.train(*flags, output="packed")
    padded = runs.train(*flags, output="padded", trainer_class=Padded)
    assert packed.average.mean == pytest.approx(padded.average.mean, rel=1e-5)
    first, second = runs.lora("packed"), runs.lora("padded")
    assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=2e-5) for key in first)
    dropping = runs.train(*flags, "--network_args", "rank_dropout=0.2", output="dropping")
    assert not dropping.denoiser.packs and trained(runs.lora("dropping")) == {"lora_unet", "lora_te"}


# ---------------------------------------------------------------- files


def test_all_in_one_file_and_a_folder_train_as_files_of_their_own(runs, tiny_lumina):
    runs.train(*LATENTS, output="apart")
    runs.train(*LATENTS, f"--gemma2={tiny_lumina['gemma2_folder']}", output="folder")
    runs.left_out = ("--gemma2", "--ae")
    runs.train(*LATENTS, f"--pretrained_model_name_or_path={tiny_lumina['whole']}", output="whole")
    assert trained(runs.lora("apart")) == {"lora_unet", "lora_te"}
    assert same_tensors(runs.lora("apart"), runs.lora("folder")) and same_tensors(runs.lora("apart"), runs.lora("whole"))


# ---------------------------------------------------------------- target


def test_additive_is_raw_and_sigma_scaled_is_another_loss(runs):
    means = {}
    for kind in ("raw", "additive", "sigma_scaled"):
        means[kind] = runs.train(*ONE_STEP, f"--model_prediction_type={kind}", output=kind).average.mean
    assert same_tensors(runs.lora("raw"), runs.lora("additive")) and means["raw"] == means["additive"]
    assert not same_tensors(runs.lora("raw"), runs.lora("sigma_scaled")) and means["raw"] > means["sigma_scaled"] > 0


# ---------------------------------------------------------------- sample pictures


def levels(picture: bytes) -> np.ndarray:
    return np.frombuffer(picture, dtype=np.uint8).astype(int)


def test_pictures_drawn_together_are_those_drawn_one_by_one(runs):
    """But for rounding, whatever their lengths and seeds; what differs in size or settings has a batch of its own."""
    prompts = "a cat --w 64 --h 64 --s 3 --d 3 --n bad\na house by the sea at sunset, warm light --w 64 --h 64 --s 3 --d 4\n"
    prompts += "a dog --w 64 --h 80 --s 3 --d 5\na bird --w 64 --h 64 --s 3 --d 5\n"
    alone, together = (runs.drawn(*flags, prompt=prompts) for flags in ((), ("--sample_batch_size=3",)))
    assert len(alone) == len(together) == len(set(alone)) == 4
    assert all(np.abs(levels(one) - levels(other)).max() <= 1 for one, other in zip(alone, together, strict=True))


def test_guidance_of_a_prompt_changes_its_picture(runs):
    lines = [f"a cat {PREVIEW}{more}" for more in ("", " --ctr 1", " --ctr 1 --rcfg 0.5", " --ctr 0", " --l 1 --ctr 0")]
    drawn = runs.drawn(*CACHED_IN_MEMORY[1:], prompt="\n".join(lines) + "\n")
    assert len(set(drawn[:4])) == 4 and drawn[3] == drawn[4]  # no part of the way is guided, or by nothing
