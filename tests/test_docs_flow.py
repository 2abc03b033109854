"""The figures in the guides for Stable Diffusion 3 and Lumina Image 2.0 are those that a plan computes for the published models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.files.weights_source import Part, Piece
from library.lumina.gemma import build_gemma
from library.lumina.gemma_layout import GemmaConfig
from library.lumina.layout import LuminaLayouts, NextDitConfig
from library.lumina.memory_use import encoder_values
from library.nn.fp8 import use_fp8
from library.nn.memory_use import LiveEncoders
from library.options.command_line import read_options
from library.options.lumina import LuminaTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.sd3.layout import Sd3Layouts, Sd3TextParts
from library.sd3.memory_use import T5Use, weights_in_use
from library.training.models.memory_estimate import estimate_memory, weight_bytes
from lumina_train_network import LuminaNetworkTrainer
from networks import lora_lumina, lora_sd3
from networks.lumina_arguments import LuminaArguments
from networks.sd3_arguments import Sd3Arguments
from sd3_train_network import Sd3NetworkTrainer
from tests.library.sd.tiny_unets import MemorySource
from tests.networks.sd3_models import CLIPS, T5_XXL, text_encoders
from tests.networks.sd3_models import KINDS as MMDITS
from tests.test_docs import ROOT, table_rows

GUIDES = {"sd3": ROOT / "docs" / "sd3_train_network.md", "lumina": ROOT / "docs" / "lumina_train_network.md"}
SIDE = 1024  # pixels, of the recipes' pictures
SIDES = (1024, 768, 512)
DENOISERS: dict[str, Any] = {
    "sd3_medium": MMDITS["sd3_medium"],
    "sd3.5_medium": replace(MMDITS["sd35_medium"], position_side=384),
    "sd3.5_large": MMDITS["sd35_large"],
    "lumina": NextDitConfig(),
}
FILE = re.compile(r"--pretrained_model_name_or_path=(\w+(?:\.\d_\w+)?)\.safetensors")
RECIPE = re.compile(
    r"^### (\d+) GB.*\n\n```\naccelerate .*?train_network\.py (.*)\n```\n\n([\d.]+) GiB with `batch_size = (\d+)`", re.MULTILINE
)
CACHED = "--cache_latents --cache_text_encoder_outputs --network_train_unet_only"


ROWS = {"sd3_medium": "MMDiT of 3 medium", "sd3.5_medium": "MMDiT of 3.5 medium", "sd3.5_large": "MMDiT of 3.5 large",
        "lumina": "NextDiT"}  # fmt: skip


def page_of(kind: str) -> Path:
    return GUIDES["lumina" if kind == "lumina" else "sd3"]


def text_of(page: str) -> str:
    return GUIDES[page].read_text(encoding="utf-8")


def least(kind: str) -> str:
    network = "lora_lumina" if kind == "lumina" else "lora_sd3"
    return (f"--pretrained_model_name_or_path={kind}.safetensors --dataset_config=my.toml --output_dir=o "
            f"--network_module=networks.{network} --mixed_precision=bf16")  # fmt: skip


FIGURE = re.compile(r"[\d.]+(?= GiB)")


@pytest.mark.parametrize(("page", "titles"), [("sd3", "24 24 16 16 12 8"), ("lumina", "24 16 16 12 8")])
def test_the_figures_of_the_recipes_are_what_the_plan_computes(page, titles):
    found = RECIPE.findall(text_of(page))
    assert [title for title, *_ in found] == titles.split()
    for title, arguments, written, images in found:
        assert gib(arguments, images=int(images)) == written, title


@pytest.mark.parametrize("page", GUIDES)
def test_the_overview_has_the_figures_of_the_recipes(page):
    overview = [figure for row in table_rows(GUIDES[page], "GPU") for figure in FIGURE.findall(row[-1])]
    assert overview == [written for _, _, written, _ in RECIPE.findall(text_of(page))]


def test_the_table_of_sd3s_memory_is_what_the_plan_computes():
    rows = table_rows(GUIDES["sd3"], "Memory flags")
    assert len(rows) >= 8
    for flags, *written in rows:
        given = "" if flags == "none" else flags.strip("`")
        medium, *others = (f"{least(kind)} {given} {CACHED}" for kind in ("sd3.5_medium", "sd3_medium", "sd3.5_large"))
        with_clips = f"{least('sd3.5_medium')} {given} --cache_latents --cache_text_encoder_outputs"
        computed = [*(gib(medium, side) for side in SIDES), *map(gib, others), gib(with_clips)]
        assert computed == written, flags


def test_the_table_of_luminas_memory_is_what_the_plan_computes():
    rows = table_rows(GUIDES["lumina"], "Memory flags")
    assert len(rows) >= 8
    for flags, *written, last in rows:
        given = "" if flags == "none" else flags.strip("`")
        assert [gib(f"{least('lumina')} {given} {CACHED}", side) for side in SIDES] == written, flags
        assert gib(f"{least('lumina')} {given} --cache_latents") == last, flags


MANY, SMALL = "--gradient_checkpointing", "--gradient_checkpointing --optimizer_type=AdamW8bit"


@pytest.mark.parametrize(
    ("kind", "flags", "images", "written"),
    [
        ("sd3_medium", f"{CACHED} --network_dim=32", 1, "with SD3 medium it is 11.2 GiB"),
        ("sd3.5_medium", f"{CACHED} {MANY} --network_dim=32", 8, "12.1 GiB with `batch_size = 8`"),
        ("sd3.5_large", f"{CACHED} {SMALL} --blocks_to_swap=18", 1, "it is 10.4 GiB and exact"),
        ("sd3.5_medium", f"{CACHED} {SMALL}", 1, "it is 5.5 GiB"),
        ("sd3.5_medium", f"--cache_latents {SMALL} --network_args train_t5xxl=true", 1, "(16.8 GiB with"),
        ("lumina", f"{CACHED} {MANY} --network_dim=32", 8, "16.4 GiB with `batch_size = 8`"),
        ("lumina", f"{CACHED} {SMALL}", 1, "it is 6.6 GiB"),
    ],
)
def test_further_figures(kind, flags, images, written):
    assert written in text_of("lumina" if kind == "lumina" else "sd3")
    figure = FIGURE.search(written)
    assert figure is not None and figure[0] == gib(f"{least(kind)} {flags}", images=images)


def test_a_trained_t5_in_8_bits():
    figure = gib(f"{least('sd3.5_medium')} --cache_latents {SMALL} --network_args train_t5xxl=true --fp8_base")
    assert f"and {figure} with `--fp8_base` as well" in text_of("sd3")


@pytest.mark.parametrize(
    ("page", "kinds", "written"),
    [
        ("sd3", ("sd3_medium", "sd3.5_medium", "sd3.5_large"), "takes {0}, {1} and {2} GiB in bf16 (medium, 3.5 medium, 3.5 large), "
         "in 8 bits {3}, {4} and {5}"),
        ("lumina", ("lumina",), "takes {0} GiB in bf16, {1} with `--fp8_base_unet`"),
    ],
)  # fmt: skip
def test_what_the_frozen_denoiser_takes(page, kinds, written):
    sizes = [[weight_bytes(skeleton(kind, flag), torch.bfloat16) / 2**30 for kind in kinds] for flag in ("", "--fp8_base_unet")]
    assert written.format(*(f"{size:.1f}" for size in (*sizes[0], *sizes[1]))) in text_of(page)


def test_what_text_encoders_take():
    whole, in_fp8 = LiveEncoders(text=True), LiveEncoders(text=True, text_in_fp8=True)
    sd3, lumina = layouts_of("sd3.5_medium"), layouts_of("lumina")
    everything, clips = (sum(weights_in_use(sd3, whole, T5Use(runs=runs))) * 2 / 2**30 for runs in (True, False))
    t5_in_fp8 = sum(weights_in_use(sd3, in_fp8, T5Use())) - sum(weights_in_use(sd3, in_fp8, T5Use(runs=False)))
    assert f"{everything:.1f} GiB in bf16, {everything - clips:.1f} of them T5" in text_of("sd3")
    assert f"`--t5xxl_dtype=fp8` ({clips + t5_in_fp8 * 2 / 2**30:.1f} GiB;" in text_of("sd3")
    assert f"`--t5xxl_device=cpu` ({clips:.1f} GiB on the GPU" in text_of("sd3")
    gemma = [f"{sum(encoder_values(lumina, live)) * 2 / 2**30:.1f}" for live in (whole, in_fp8)]
    assert "{} GiB in bf16, {} with `--fp8_base`".format(*gemma) in text_of("lumina")


@pytest.mark.parametrize("kind", DENOISERS)
def test_modules_and_parameters_of_a_lora(kind):
    sizes = lora_parts(kind)
    row = next(row for row in table_rows(page_of(kind), "Part") if row[0].startswith(ROWS[kind]))
    assert row[1:] == [str(len(sizes)), f"{sum(sizes.values()):,} x R"]


@pytest.mark.parametrize("kind", ["sd3.5_medium", "lumina"])
def test_modules_and_parameters_of_the_text_encoders(kind):
    found: dict[str, list[int]] = {}
    for name, size in text_parts(kind).items():
        found.setdefault(prefix(name), []).append(size)
    rows = [row for row in table_rows(page_of(kind), "Part") if "`lora_te" in row[0]]
    assert len(rows) == len(found)
    for row, sizes in zip(rows, found.values(), strict=True):
        assert row[1:] == [str(len(sizes)), f"{sum(sizes):,} x R"]


@pytest.mark.parametrize("kind", ["sd3.5_medium", "lumina"])
def test_sizes_of_files(kind):
    size = sum(lora_parts(kind).values())
    assert f"has {4 * 16 * size / 2**20:.1f} MiB in float32" in page_of(kind).read_text(encoding="utf-8")
    split = f"{split_size(kind):,} x R numbers in\nplace of {size:,} x R"
    assert split in page_of(kind).read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "arguments"), [("sd3", Sd3Arguments), ("lumina", LuminaArguments)])
def test_every_network_argument_has_a_row(page, arguments):
    named = {name for row in table_rows(GUIDES[page], "Argument") for name in re.findall(r"`(\w+)(?:=\w+)?`", row[0])}
    assert named == {field.name for field in fields(arguments)} - {"dropout"}  # --network_dropout's way in


@pytest.mark.parametrize("kind", DENOISERS)
def test_blocks_that_can_be_swapped(kind):
    text, most = page_of(kind).read_text(encoding="utf-8"), DENOISERS[kind].blocks - 2
    told = re.search(r"At most (\d+) (?:blocks of the medium models, (\d+) of 3.5 large|of the 26 main layers)", text)
    assert told is not None and int(told[2] if kind == "sd3.5_large" else told[1]) == most


def test_what_an_image_keeps():
    trainer = trainer_of("lumina", shlex.split(f"{least('lumina')} {CACHED}"), SIDE)
    kept = sum(trainer.memory_use((SIDE, SIDE), 1).kept)
    assert f"nearly all of the {kept * 2 / 2**30:.1f} GiB that an image of 1024x1024 keeps" in text_of("lumina")


def test_the_largest_sides_of_pictures():
    rows = table_rows(GUIDES["sd3"], "Model")
    kinds = ("sd3_medium", "sd3.5_medium", "sd3.5_large")
    for row, kind in zip(rows, kinds, strict=True):
        assert row[2:4] == [str(DENOISERS[kind].blocks), str(DENOISERS[kind].position_side * 16)]


# ---------------------------------------------------------------- what the plan computes


def gib(arguments: str, side: int = SIDE, images: int = 1) -> str:
    return f"{estimate(arguments, side, images) / 2**30:.1f}"


def estimate(arguments: str, side: int = SIDE, images: int = 1) -> int:
    """Bytes for a batch of ``images`` of ``side`` x ``side`` pixels; rank 16 unless ``arguments`` say otherwise."""
    kind = kind_of(arguments)
    trainer = trainer_of(kind, shlex.split(arguments), side)
    options = trainer.options
    in_fp8 = options.memory.fp8_base or options.memory.fp8_base_unet
    return estimate_memory(
        options,
        skeleton(kind, "--fp8_base_unet" if in_fp8 else "", side),
        parameters=parameters(kind, options) * (options.network.network_dim or 16),
        dtypes=(torch.bfloat16, torch.float32),
        use=trainer.memory_use((side, side), images),
        batch=((side, side), images),
    ).total


def kind_of(arguments: str) -> str:
    """By the name of the model's file."""
    name = FILE.search(arguments)
    assert name is not None
    return "lumina" if name[1].startswith("lumina") else name[1]


def trainer_of(kind: str, arguments: Sequence[str], side: int) -> Any:
    """With all that the hooks of its plan look at."""
    options_type, trainer_type = (
        (LuminaTrainOptions, LuminaNetworkTrainer) if kind == "lumina" else (Sd3TrainOptions, Sd3NetworkTrainer)
    )
    options = read_options(options_type, arguments)
    trainer: Any = trainer_type.__new__(trainer_type)
    trainer.options = options
    item = SimpleNamespace(bucket_wh=(side, side))
    trainer.run = SimpleNamespace(
        layouts=layouts_of(kind),
        training_set=SimpleNamespace(items=[item], all_items=[item], datasets=()),
        prompts=(),
        latent_cache=True if options.caches.latents_cached else None,
        text_cache=True if options.caches.text_cached else None,
    )
    return trainer


@cache
def layouts_of(kind: str) -> Any:
    if kind == "lumina":
        return LuminaLayouts(denoiser=part(DENOISERS[kind]), text=part(GemmaConfig(), build_gemma(GemmaConfig())))
    texts = [part(config, model) for config, model in zip((*CLIPS, T5_XXL), text_encoders(), strict=True)]
    return Sd3Layouts(denoiser=part(DENOISERS[kind]), text=Sd3TextParts(clip_l=texts[0], clip_g=texts[1], t5=texts[2]))


def part(config: Any, model: nn.Module | None = None) -> Part[Any]:
    """A file with the weights of ``model``."""
    shapes = {} if model is None else {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return Part(source=MemorySource(shapes), config=config, pieces={name: Piece(name) for name in shapes})


def parameters(kind: str, options: Any) -> int:
    """Of a LoRA of rank 1."""
    rates = dict(zip(("lora_te",) if kind == "lumina" else ("lora_te1", "lora_te2", "lora_te3"), options.text_rates, strict=True))
    return sum(lora_parts(kind).values()) + sum(size for name, size in text_parts(kind).items() if rates[prefix(name)])


def prefix(name: str) -> str:
    """Of a text encoder's module: which encoder it is."""
    return "_".join(name.split("_")[:2])


@cache
def skeleton(kind: str, flag: str = "", side: int = SIDE) -> nn.Module:
    """The published denoiser without memory, ready for weights in 8 bits where ``flag`` asks for them; for pictures of ``side``."""
    trainer = trainer_of(kind, shlex.split(f"{least(kind)} {flag}"), side)
    denoiser = trainer.build_denoiser()
    if trainer.options.memory.fp8_base_unet:
        use_fp8(denoiser, trainer.fp8_layers())
    return denoiser


def made(kind: str, **arguments: str) -> Any:
    module = lora_lumina if kind == "lumina" else lora_sd3
    return module.create_network(1.0, 1, 1.0, None, [], skeleton(kind), **arguments)


@cache
def lora_parts(kind: str) -> dict[str, int]:
    """Name -> number of weights, of each module of a LoRA of rank 1 for the denoiser."""
    return {lora.lora_name: sum(weight.numel() for weight in lora.parameters()) for lora in made(kind).unet_loras}


def split_size(kind: str) -> int:
    """Numbers in a file of split_qkv, alphas apart."""
    tensors = made(kind, split_qkv="true").file_tensors()
    return sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".alpha"))


@cache
def text_parts(kind: str) -> dict[str, int]:
    if kind == "lumina":
        network = lora_lumina.create_network(1.0, 1, 1.0, None, [build_gemma(GemmaConfig())], None)
    else:
        network = lora_sd3.create_network(1.0, 1, 1.0, None, text_encoders(), None, train_t5xxl="true")
    return {lora.lora_name: sum(weight.numel() for weight in lora.parameters()) for lora in network.text_encoder_loras}
