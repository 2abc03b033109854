"""Anima before torch: its files together, and what its caches depend on."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace

import pytest

from library.anima.architecture import ANIMA, tokenizer_files
from library.anima.layout import CONTEXT_ROWS
from library.anima.tokenizers import BUNDLED_QWEN
from library.dataset.token_use import TokenUse
from library.errors import CheckpointError, OptionError
from library.files.model_parts import short_name
from library.options.anima import LONGEST_TEXT_TOKENS, AnimaOptions, AnimaTrainOptions
from library.options.memory import BlockMemoryOptions
from library.options.models import ModelOptions
from library.options.run import RunOptions
from library.text.tokenizer_files import BUNDLED_T5
from tests.caption_sets import captions


@pytest.fixture
def options(tiny_anima) -> AnimaTrainOptions:
    return AnimaTrainOptions(
        model=ModelOptions(pretrained_model_name_or_path=str(tiny_anima["dit"]), vae=str(tiny_anima["vae"])),
        anima=AnimaOptions(qwen3=str(tiny_anima["qwen3"])),
    )


def with_groups(options: AnimaTrainOptions, **groups) -> AnimaTrainOptions:
    return replace(options, **{name: replace(getattr(options, name), **values) for name, values in groups.items()})


def test_files_that_fit_are_read(options):
    layouts = ANIMA.read_layouts(options)
    assert layouts.denoiser.config.adapter.source_width == layouts.text.config.width


def test_the_problems_of_all_files_come_together(options, tmp_path):
    wrong = with_groups(options, model={"vae": str(tmp_path / "a"), "pretrained_model_name_or_path": str(tmp_path / "b")})
    with pytest.raises(CheckpointError) as caught:
        ANIMA.read_layouts(wrong)
    assert len(caught.value.problems) == 2


def test_parts_of_different_models_are_told(options, monkeypatch):
    layouts = ANIMA.read_layouts(options)
    wider = replace(layouts.text, config=replace(layouts.text.config, width=layouts.text.config.width * 2))
    monkeypatch.setattr("library.anima.architecture.read_text_encoder_layout", lambda path: wider)
    with pytest.raises(CheckpointError, match="the LLM adapter wants"):
        ANIMA.read_layouts(options)


def test_more_swapped_blocks_than_the_model_can_do_without_are_told_with_the_other_problems(options, tmp_path):
    swapping = with_groups(options, memory={"blocks_to_swap": 1})  # of the tiny model's 2, both are needed on the device
    with pytest.raises(OptionError, match="--blocks_to_swap is 1, but this model has 2 blocks: these are too few to swap any"):
        ANIMA.read_layouts(swapping)
    with pytest.raises(CheckpointError) as caught:
        ANIMA.read_layouts(with_groups(swapping, model={"vae": str(tmp_path / "gone")}))
    assert len(caught.value.problems) == 2
    assert ANIMA.read_layouts(with_groups(options, memory={"blocks_to_swap": 0})).denoiser is not None
    assert ANIMA.read_layouts(replace(options, memory=BlockMemoryOptions(blocks_to_swap=None))).denoiser is not None


def test_only_the_parts_that_are_asked_for_are_read(options):
    only_vae = with_groups(options, model={"pretrained_model_name_or_path": None}, anima={"qwen3": "gone.safetensors"})
    layouts = ANIMA.read_layouts(only_vae, {"vae"})
    assert layouts.vae is not None and layouts.denoiser is layouts.text is layouts.tokenizers is None
    assert ANIMA.latent_recipe(layouts, only_vae) == ANIMA.latent_recipe(ANIMA.read_layouts(options), options)
    only_text = with_groups(options, model={"pretrained_model_name_or_path": None, "vae": "gone.safetensors"})
    layouts = ANIMA.read_layouts(only_text, {"text"})
    assert layouts.text is not None and layouts.tokenizers is not None and layouts.denoiser is layouts.vae is None
    assert ANIMA.text_recipe(layouts, only_text) == ANIMA.text_recipe(ANIMA.read_layouts(options), options)
    with pytest.raises(CheckpointError) as caught:
        ANIMA.read_layouts(only_text, {"text", "vae"})
    assert len(caught.value.problems) == 1


def test_latents_depend_on_file_precision_and_scale(options, tiny_anima, tmp_path):
    def recipe(options):
        return ANIMA.latent_recipe(ANIMA.read_layouts(options), options)

    moved = shutil.copy(tiny_anima["vae"], tmp_path / "moved.safetensors")
    assert recipe(with_groups(options, model={"vae": str(moved)})) == recipe(options)
    half = with_groups(options, run={"mixed_precision": "bf16"})
    assert recipe(half).dtype == "bfloat16" and recipe(with_groups(half, model={"no_half_vae": True})).dtype == "float32"
    (tmp_path / "config.json").write_text(json.dumps({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}))
    assert recipe(with_groups(options, model={"vae": str(moved)})) != recipe(options)


def test_text_depends_on_file_precision_and_lengths(options):
    def recipe(options):
        return ANIMA.text_recipe(ANIMA.read_layouts(options), options)

    assert recipe(options) == recipe(options)
    assert recipe(with_groups(options, run={"mixed_precision": "bf16"})).dtype == "bfloat16"
    assert recipe(with_groups(options, anima={"t5_max_token_length": 100})) != recipe(options)
    assert options.run == RunOptions()


def test_the_limit_of_the_options_is_what_the_model_takes():
    assert LONGEST_TEXT_TOKENS == CONTEXT_ROWS
    assert AnimaOptions().qwen3_max_token_length == AnimaOptions().t5_max_token_length == CONTEXT_ROWS


def test_tokens_are_counted_without_any_model_file(options, tmp_path):
    nothing = with_groups(
        options, model={"pretrained_model_name_or_path": None, "vae": None}, anima={"qwen3": "gone.safetensors"}
    )
    assert ANIMA.token_counter(nothing)("a cat") == (TokenUse("Qwen3", 2, 512, None), TokenUse("T5", 4, 512, None))
    short = with_groups(nothing, anima={"qwen3_max_token_length": 1, "t5_max_token_length": 3})
    assert ANIMA.token_counter(short)("a cat") == (TokenUse("Qwen3", 2, 1, 1), TokenUse("T5", 4, 3, 1))


def test_captions_that_are_cut(options):
    short = replace(options, anima=replace(options.anima, t5_max_token_length=20))
    (warning,) = ANIMA.caption_warnings(captions("a cat", "dog " * 40), short)
    assert warning.startswith("1 of 2 captions is longer than the 20 tokens") and "raise --qwen3_max_token_length and" in warning
    assert not list(ANIMA.caption_warnings(captions("a cat", "dog " * 40), options))


def test_tokens_are_counted_by_the_tokenizers_of_the_run(options, tiny_anima, tmp_path):
    def counted(options):
        files = ANIMA.read_layouts(options).tokenizers
        return files, tokenizer_files(options)

    read, found = counted(with_groups(options, anima={"qwen3": str(tiny_anima["qwen3_folder"]), "t5_max_token_length": 9}))
    assert read == found and found.t5_max == 9
    own = shutil.copytree(tiny_anima["qwen3_folder"], tmp_path / "own")
    (own / "tokenizer.json").write_text(
        gzip.decompress((BUNDLED_QWEN / "tokenizer.json.gz").read_bytes()).decode("utf-8"), "utf-8"
    )
    read, found = counted(with_groups(options, anima={"qwen3": str(own), "t5_tokenizer_path": str(BUNDLED_T5)}))
    assert read == found and found.qwen_dir == own
    with pytest.raises(CheckpointError, match="--t5_tokenizer_path"):
        ANIMA.token_counter(with_groups(options, anima={"t5_tokenizer_path": str(tmp_path / "gone")}))


def test_the_plan_names_the_files(options, tiny_anima):
    (line,) = ANIMA.model_lines(ANIMA.read_layouts(options), options)
    names = {part: short_name(tiny_anima[part]) for part in ("dit", "qwen3", "vae")}
    assert line == f"model: Anima, {names['dit']}; LLM adapter in it; Qwen3 {names['qwen3']}; VAE {names['vae']}"
