"""Commands in the documents are taken as they stand, and the figures of memory beside them are those that a plan computes."""

from __future__ import annotations

import re
import shlex
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from library.anima.architecture import AnimaLayouts
from library.anima.checkpoint import build_denoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.layout import DenoiserConfig
from library.anima.memory_use import LiveEncoders, memory_use
from library.nn.fp8 import use_fp8
from library.options.anima import AnimaTrainOptions
from library.options.anima_inference import AnimaInferenceOptions
from library.options.command_line import read_options
from library.options.lumina import LuminaTrainOptions
from library.options.lumina_inference import LuminaInferenceOptions
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.options.sd3_inference import Sd3InferenceOptions
from library.options.sd_inference import SdInferenceOptions, SdxlInferenceOptions
from library.training.models.memory_estimate import estimate_memory
from tests.test_docs import PAGES, ROOT, fences, table_rows

COMMAND = re.compile(
    r"^(?:accelerate launch (?:.* )?|python )((?:anima|lumina|sd|sd3|sdxl)_minimal_inference\.py|(?:anima_|lumina_|sd3_|sdxl_)?train_network\.py) (.*)$",
    re.MULTILINE,
)
OPTION_SETS = {
    "anima_train_network.py": AnimaTrainOptions,
    "train_network.py": StableDiffusionTrainOptions,
    "sdxl_train_network.py": SdxlTrainOptions,
    "sd3_train_network.py": Sd3TrainOptions,
    "lumina_train_network.py": LuminaTrainOptions,
    "anima_minimal_inference.py": AnimaInferenceOptions,
    "sd_minimal_inference.py": SdInferenceOptions,
    "sdxl_minimal_inference.py": SdxlInferenceOptions,
    "sd3_minimal_inference.py": Sd3InferenceOptions,
    "lumina_minimal_inference.py": LuminaInferenceOptions,
}
SHORTEST_CONFIG = """
pretrained_model_name_or_path = "anima.safetensors"
qwen3 = "qwen3.safetensors"
vae = "vae.safetensors"
dataset_config = "set.toml"
network_module = "networks.lora_anima"
output_dir = "output"
"""
MEMORY_PAGE = ROOT / "docs" / "memory.md"
PARAMETERS_PER_RANK = 1_433_600  # of a LoRA for the published denoiser
RECIPE = re.compile(
    r"^### (\d+) GB.*\n\n```\naccelerate .*?anima_train_network\.py (.*)\n```\n\n([\d.]+) GiB with `batch_size = (\d+)`",
    re.MULTILINE,
)
PUBLISHED = DenoiserConfig()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_are_taken(page, tmp_path, monkeypatch):
    for name in ("my.toml", "my_run.toml"):
        (tmp_path / name).write_text(SHORTEST_CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for script, arguments in COMMAND.findall("\n".join(fences(page, ""))):
        if "..." not in arguments:
            assert read_options(OPTION_SETS[script], shlex.split(arguments))


def test_the_table_of_memory_is_what_the_plan_computes(tmp_path, monkeypatch):
    (tmp_path / "my.toml").write_text(SHORTEST_CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = table_rows(MEMORY_PAGE, "Memory flags")
    assert len(rows) >= 9
    for flags, *written in rows:
        given = shlex.split(flags.strip("`")) if flags != "none" else []
        options = read_options(AnimaTrainOptions, ["--config_file=my.toml", "--mixed_precision=bf16", *given])
        computed = [estimated_gib(options, side) for side in (1024, 768, 512)]
        assert [f"{gib:.1f}" for gib in computed] == written, flags


def test_the_figures_of_the_recipes_are_what_the_plan_computes():
    found = RECIPE.findall((ROOT / "docs" / "anima_train_network.md").read_text(encoding="utf-8"))
    assert [title for title, *_ in found] == ["24", "16", "12", "8", "6"]
    for title, arguments, written, images in found:
        options = read_options(AnimaTrainOptions, shlex.split(arguments))
        assert f"{estimated_gib(options, 1024, images=int(images)):.1f}" == written, title


def estimated_gib(options: AnimaTrainOptions, side: int, *, images: int = 1) -> float:
    """Of the published model, with a batch of ``images`` of ``side`` x ``side`` pixels, and everything else cached."""
    denoiser = published_denoiser(eight_bits=options.memory.fp8_base_unet)
    use = memory_use(AnimaLayouts(denoiser=SimpleNamespace(config=PUBLISHED)), (side, side), images, LiveEncoders())
    parameters = PARAMETERS_PER_RANK * (options.network.network_dim or 16)
    dtypes = (torch.bfloat16, torch.float32)
    estimate = estimate_memory(options, denoiser, parameters=parameters, dtypes=dtypes, use=use, batch=((side, side), images))
    return estimate.total / 2**30


@cache
def published_denoiser(*, eight_bits: bool) -> torch.nn.Module:
    denoiser = build_denoiser(PUBLISHED)
    if eight_bits:
        use_fp8(denoiser, DENOISER_FP8_LAYERS)
    return denoiser
