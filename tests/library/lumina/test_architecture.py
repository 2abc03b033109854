"""Lumina Image 2.0 before torch: its files together, and what its caches depend on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError, OptionError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.lumina.architecture import LUMINA
from library.lumina.source import SCALE, SHIFT
from library.options.lumina import LuminaTrainOptions
from tests.caption_sets import captions


def with_groups(options: LuminaTrainOptions, **groups) -> LuminaTrainOptions:
    return replace(options, **{name: replace(getattr(options, name), **values) for name, values in groups.items()})


@pytest.fixture
def options(tiny_lumina) -> LuminaTrainOptions:
    return with_groups(
        LuminaTrainOptions(),
        model={"pretrained_model_name_or_path": str(tiny_lumina["dit"])},
        lumina={"gemma2": str(tiny_lumina["gemma2"]), "ae": str(tiny_lumina["ae"])},
    )


@pytest.fixture
def whole(options, tiny_lumina) -> LuminaTrainOptions:
    model = {"pretrained_model_name_or_path": str(tiny_lumina["whole"])}
    return with_groups(options, model=model, lumina={"gemma2": None, "ae": None})


def problems_of(options: LuminaTrainOptions, parts=("denoiser", "text", "vae")) -> list[str]:
    with pytest.raises((CheckpointError, OptionError)) as caught:
        LUMINA.read_layouts(options, parts)
    return list(caught.value.problems)


def copied(source: Path, target: Path, change, metadata: dict[str, str] | None = None) -> str:
    """A copy of a file with what ``change`` makes of its tensors."""
    header = read_header(source)
    save_safetensors(target, change(dict(read_tensors(header))), {**header.metadata, **(metadata or {})})
    return str(target)


# ---------------------------------------------------------------- files


def test_files_of_their_own_and_all_in_one_are_the_same_models(options, whole):
    apart, together = LUMINA.read_layouts(options), LUMINA.read_layouts(whole)
    for part in ("denoiser", "text", "vae"):
        assert getattr(apart, part).config == getattr(together, part).config
    assert LUMINA.latent_recipe(apart, options) == LUMINA.latent_recipe(together, whole)
    assert LUMINA.text_recipe(apart, options) == LUMINA.text_recipe(together, whole)
    assert not list(LUMINA.warnings_of(apart, options))


def test_a_path_on_the_command_line_wins(whole, options, tiny_lumina, tmp_path):
    other = copied(tiny_lumina["ae"], tmp_path / "ae.safetensors", lambda t: {k: v + 1 for k, v in t.items()})
    layouts = LUMINA.read_layouts(with_groups(whole, lumina={"ae": other, "gemma2": str(tiny_lumina["gemma2_folder"])}))
    assert layouts.vae.source.path == Path(other) and layouts.text.source.path == tiny_lumina["gemma2_folder"]
    recipe = LUMINA.latent_recipe(LUMINA.read_layouts(options), options)
    assert LUMINA.latent_recipe(layouts, whole).vae_fingerprint != recipe.vae_fingerprint


def test_only_the_parts_that_are_asked_for_are_read(options):
    alone = with_groups(options, model={"pretrained_model_name_or_path": None})
    layouts = LUMINA.read_layouts(alone, {"vae"})
    assert layouts.vae is not None and layouts.denoiser is layouts.text is layouts.tokenizer is None
    layouts = LUMINA.read_layouts(with_groups(alone, lumina={"ae": "gone.safetensors"}), {"text"})
    assert layouts.text is not None and layouts.tokenizer is not None and layouts.vae is None


def test_the_problems_of_all_files_come_together(options, tmp_path):
    gone = {"gemma2": str(tmp_path / "a"), "ae": str(tmp_path / "b")}
    found = problems_of(with_groups(options, model={"pretrained_model_name_or_path": str(tmp_path / "c")}, lumina=gone))
    assert len(found) == 3
    nothing = with_groups(LuminaTrainOptions(), model={"pretrained_model_name_or_path": str(tmp_path / "c")})
    assert len(problems_of(nothing)) == 1  # what would be in it is not missing besides


def test_parts_that_are_nowhere_are_named(options):
    found = problems_of(with_groups(options, lumina={"gemma2": None, "ae": None}))
    assert [problem.split(" is missing")[0] for problem in found] == ["--gemma2", "--ae"]
    assert all("holds none" in problem for problem in found)


def test_every_model_in_anothers_flag_is_told(options, tiny_lumina, tiny_sd, tiny_sd3, tiny_anima):
    def with_part(**values):
        groups = {"model": {"pretrained_model_name_or_path": values.pop("model")}} if "model" in values else {}
        (problem,) = problems_of(with_groups(options, **groups, **({"lumina": values} if values else {})))
        return problem

    model = "--pretrained_model_name_or_path"
    assert with_part(model=str(tiny_sd["sdxl"])).endswith(
        "is an SDXL checkpoint (sdxl_train_network.py trains those): give the Lumina Image 2.0 model"
    )
    assert with_part(model=str(tiny_lumina["gemma2"])).startswith(f"{model} {tiny_lumina['gemma2']} is a Gemma 2 text encoder")
    assert "is an SD3 or SD3.5 checkpoint" in with_part(model=str(tiny_sd3["sd3"]))
    assert "VAE" in with_part(model=str(tiny_lumina["ae"]))
    assert "--gemma2" in with_part(gemma2=str(tiny_anima["qwen3"])) and "Qwen3" in with_part(gemma2=str(tiny_anima["qwen3"]))
    assert "T5" in with_part(gemma2=str(tiny_sd3["t5xxl"])) and "Lumina" in with_part(gemma2=str(tiny_lumina["dit"]))
    assert "4 latent channels" in with_part(ae=str(tiny_sd["vae"]))
    assert "is an SD3 or SD3.5 checkpoint" in with_part(ae=str(tiny_sd3["sd3"]))
    assert "Qwen-Image VAE" in with_part(ae=str(tiny_anima["vae"]))


def test_another_gemma_does_not_fit(options, monkeypatch):
    layouts = LUMINA.read_layouts(options)
    wide = replace(layouts.text, config=replace(layouts.text.config, width=3584))
    monkeypatch.setattr("library.lumina.architecture.text_part", lambda options, checkpoint: wide)
    (problem,) = problems_of(options)
    assert "gives states of width 3584 (Gemma 2 9B)" in problem and "takes" in problem


def test_a_model_of_other_latents_does_not_fit(options, tiny_lumina, tmp_path):
    def narrow(tensors):
        return {
            **tensors,
            "x_embedder.weight": tensors["x_embedder.weight"][:, :16].contiguous(),
            "final_layer.linear.weight": tensors["final_layer.linear.weight"][:16].contiguous(),
            "final_layer.linear.bias": tensors["final_layer.linear.bias"][:16].contiguous(),
        }

    path = copied(tiny_lumina["dit"], tmp_path / "dit.safetensors", narrow)
    (problem,) = problems_of(with_groups(options, model={"pretrained_model_name_or_path": path}))
    assert "takes latents of 4 channels" in problem


def test_too_many_swapped_blocks(options):
    blocks = LUMINA.read_layouts(options).denoiser.config.blocks
    (problem,) = problems_of(with_groups(options, memory={"blocks_to_swap": blocks}))
    assert f"--blocks_to_swap is {blocks}, but this model has {blocks} blocks" in problem


# ---------------------------------------------------------------- recipes


def test_latents_depend_on_weights_precision_and_scale(options, tiny_lumina, tmp_path):
    def recipe(**groups):
        changed = with_groups(options, **groups)
        return LUMINA.latent_recipe(LUMINA.read_layouts(changed, {"vae"}), changed)

    moved = shutil.copy(tiny_lumina["ae"], tmp_path / "moved.safetensors")
    assert recipe(lumina={"ae": str(moved)}) == recipe()
    assert recipe().channels == 16 and recipe(run={"mixed_precision": "bf16"}).dtype == "bfloat16"
    assert recipe(run={"mixed_precision": "bf16"}, model={"no_half_vae": True}).dtype == "float32"
    layouts = LUMINA.read_layouts(options)
    assert LUMINA.scale_and_shift(layouts) == (SCALE, SHIFT)
    other = replace(layouts, vae=replace(layouts.vae, config=replace(layouts.vae.config, scale=1.5305, shift=0.0609)))
    assert LUMINA.latent_recipe(other, options) != recipe()
    (warning,) = LUMINA.warnings_of(other, options)
    assert "scaling_factor = 1.5305 and shift_factor = 0.0609" in warning


def test_text_depends_on_encoder_precision_length_prompt_and_tokenizer(options, tiny_lumina, tmp_path):
    def recipe(**groups):
        changed = with_groups(options, **groups)
        return LUMINA.text_recipe(LUMINA.read_layouts(changed, {"text"}), changed)

    assert recipe() == recipe(lumina={"gemma2_max_token_length": 256}) == recipe(lumina={"ae": None})
    others = [
        recipe(lumina={"gemma2_max_token_length": 100}),
        recipe(lumina={"system_prompt": "You draw."}),
        recipe(run={"mixed_precision": "bf16"}),
        recipe(memory={"fp8_base": True}),
        recipe(lumina={"gemma2": copied(tiny_lumina["gemma2"], tmp_path / "g.safetensors", shifted)}),
    ]
    assert all(other != recipe() for other in others)


def shifted(tensors):
    return {name: tensor + 1 if tensor.dtype != torch.uint8 else tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- texts


def test_the_system_prompt_counts(options):
    prompted = with_groups(options, lumina={"system_prompt": "You draw."})
    (plain,), (use,) = LUMINA.token_counter(options)("a cat"), LUMINA.token_counter(prompted)("a cat")
    assert use.tokens > plain.tokens > 1 and plain.limit == use.limit == 256
    text = LUMINA.positive_prompt("a cat", prompted)
    assert text == "You draw. <Prompt Start> a cat" and LUMINA.positive_prompt("", prompted) == ""
    short = with_groups(prompted, lumina={"gemma2_max_token_length": use.tokens - 1})
    (cut,) = LUMINA.token_counter(short)("a cat")
    assert 0 <= cut.cut_at < len("a cat")
    ((found, whole_use),) = LUMINA.cut_prompts([text, "a"], short)
    assert found == text and whole_use.cut_at == cut.cut_at + len(text) - len("a cat")
    assert not list(LUMINA.cut_prompts([text], prompted))


def test_captions_that_are_cut(options):
    short = with_groups(options, lumina={"gemma2_max_token_length": 20})
    (warning,) = LUMINA.caption_warnings(captions("a cat", "dog " * 40), short)
    assert warning.startswith("1 of 2 captions is longer than the 20 tokens") and "raise --gemma2_max_token_length" in warning
    assert not list(LUMINA.caption_warnings(captions("a cat", "dog " * 40), options))
    prompted = with_groups(options, lumina={"gemma2_max_token_length": 60, "system_prompt": "You draw. " * 3})
    assert not list(LUMINA.caption_warnings(captions("a cat"), prompted))


def test_a_system_prompt_that_leaves_no_room_is_an_error(options):
    (problem,) = problems_of(with_groups(options, lumina={"system_prompt": "You draw. " * 300}))
    assert problem.startswith("--system_prompt has ") and "takes 256 of a text" in problem


def test_more_tokens_than_the_model_has_positions_are_told(options):
    layouts = LUMINA.read_layouts(options)
    known = layouts.denoiser.config.axes_lens[0]
    assert not list(LUMINA.warnings_of(layouts, with_groups(options, lumina={"gemma2_max_token_length": known - 1})))
    (warning,) = LUMINA.warnings_of(layouts, with_groups(options, lumina={"gemma2_max_token_length": known}))
    assert f"fewer than {known} tokens" in warning


def test_the_plan_names_model_files_and_system_prompt(options, whole, tiny_lumina):
    names = {name: tiny_lumina[name].name for name in ("dit", "whole", "gemma2", "ae")}
    assert list(LUMINA.model_lines(LUMINA.read_layouts(options), options)) == [
        f"model: Lumina Image 2.0, {names['dit']}; Gemma 2 {names['gemma2']}; VAE {names['ae']}", "system prompt: none",
    ]  # fmt: skip
    prompted = with_groups(whole, lumina={"system_prompt": "You are\n" + "an assistant " * 9})
    assert list(LUMINA.model_lines(LUMINA.read_layouts(prompted), prompted)) == [
        f"model: Lumina Image 2.0, {names['whole']}; Gemma 2 and VAE in it",
        "system prompt: You are an assistant an assistant an assistant an assistant ...",
    ]
