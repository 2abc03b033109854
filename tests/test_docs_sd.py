"""The figures in the guides for Stable Diffusion and SDXL are those that a plan computes for the published models."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.buckets import Buckets
from library.dataset.items import DatasetSettings
from library.files.weights_source import Part, Piece
from library.nn.fp8 import use_fp8
from library.nn.memory_use import LiveEncoders
from library.options.command_line import read_options
from library.options.ddpm import DdpmTrainingOptions
from library.options.declare import groups_of, options_of
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.sampling.prompts import FLAGS
from library.sd.clip_layout import expected_shapes
from library.sd.fp8_layers import UNET_FP8_LAYERS
from library.sd.layout import StableDiffusionLayouts
from library.sd.memory_use import memory_use
from library.sd.prompt_weights import parse_weights
from library.sd.sampling import SAMPLERS
from library.training.loss.ddpm import ddpm_loss_weights, published_alpha_bars, signal_to_noise
from library.training.models.memory_estimate import estimate_memory, network_bytes, weight_bytes
from networks.block_weights import sd_block, sdxl_block
from networks.lora import create_network, original_paths
from tests.library.sd.tiny_unets import MemorySource
from tests.networks.sd_models import TEXTS, UNETS, text_encoders_of, unet_of
from tests.test_docs import ROOT, table_rows

OPTIONS: dict[str, Any] = {"sd1": StableDiffusionTrainOptions, "sd2": StableDiffusionTrainOptions, "sdxl": SdxlTrainOptions}
GUIDES = {"sd1": ROOT / "docs" / "train_network.md", "sdxl": ROOT / "docs" / "sdxl_train_network.md"}
NATIVE_SIDE = {"sd1": 512, "sdxl": 1024}  # pixels, of the recipes' pictures
RECIPE = re.compile(
    r"^### (\d+) GB.*\n\n```\naccelerate .*?train_network\.py (.*)\n```\n\n([\d.]+) GiB with `batch_size = (\d+)`", re.MULTILINE
)
UNET_ALONE = "--network_train_unet_only --cache_text_encoder_outputs"
LEAST = "--pretrained_model_name_or_path=m.safetensors --dataset_config=my.toml --output_dir=o --network_module=networks.lora"


@pytest.mark.parametrize(("kind", "titles"), [("sd1", "24 12 8 6"), ("sdxl", "24 24 16 12 8 6")])
def test_the_figures_of_the_recipes_are_what_the_plan_computes(kind, titles):
    found = RECIPE.findall(text_of(GUIDES[kind]))
    assert [title for title, *_ in found] == titles.split()
    for title, arguments, written, images in found:
        assert gib(kind, arguments, NATIVE_SIDE[kind], int(images)) == written, title


@pytest.mark.parametrize(("kind", "own", "last_own"), [("sd1", "", UNET_ALONE), ("sdxl", UNET_ALONE, "")])
def test_the_tables_of_memory_are_what_the_plan_computes(kind, own, last_own):
    rows = table_rows(GUIDES[kind], "Memory flags")
    assert len(rows) >= 4
    for flags, *written, last in rows:
        given = "" if flags == "none" else flags.strip("`")
        sides = sorted((512, 768, 1024), reverse=kind == "sdxl")
        assert [gib(kind, f"{least()} {given} {own}", side) for side in sides] == written, flags
        assert gib(kind, f"{least()} {given} {last_own}", NATIVE_SIDE[kind]) == last, flags


@pytest.mark.parametrize(
    ("kind", "flags", "images", "rank", "written"),
    [
        ("sd1", "--mixed_precision=bf16", 4, 16, "`batch_size = 4` takes 5.7 GiB"),
        ("sd1", f"--gradient_checkpointing --optimizer_type=AdamW8bit {UNET_ALONE}", 1, 8, "it is 1.9 GiB"),
        ("sdxl", UNET_ALONE, 2, 32, "two images at once are 19.3 GiB"),
        ("sdxl", f"--gradient_checkpointing {UNET_ALONE}", 8, 32, "12.4 GiB with `batch_size = 8`"),
        ("sdxl", "--gradient_checkpointing --optimizer_type=AdamW8bit", 1, 16, "it is 8.0 GiB"),
        ("sdxl", "--gradient_checkpointing --optimizer_type=AdamW8bit", 4, 16, "10.2 GiB with\n`batch_size = 4`"),
        ("sdxl", f"--gradient_checkpointing --optimizer_type=AdamW8bit {UNET_ALONE}", 1, 16, "it is 6.2 GiB"),
        ("sdxl", f"--gradient_checkpointing --optimizer_type=AdamW8bit --fp8_base_unet {UNET_ALONE}", 1, 8, "takes 3.8 GiB"),
    ],
)
def test_further_figures(kind, flags, images, rank, written):
    assert written in text_of(GUIDES[kind])
    figure = re.search(r"[\d.]+(?= GiB)", written)
    assert figure is not None
    assert figure[0] == gib(kind, f"{least()} {flags} --network_dim={rank}", NATIVE_SIDE[kind], images)


def test_sd2_takes_so_much_more():
    for flags in ("", "--fp8_base_unet", "--gradient_checkpointing"):
        more, alone = (
            estimate("sd2", f"{least()} --v2 {flags} {own}", 512) - estimate("sd1", f"{least()} {flags} {own}", 512)
            for own in ("", UNET_ALONE)
        )
        assert 0.45 < more / 2**30 < 0.65 and alone / 2**30 < 0.1


@pytest.mark.parametrize(("kind", "written"), [("sd1", "1.38 instead of 1.60 GiB"), ("sdxl", "takes 4.8 GiB in bf16")])
def test_what_the_frozen_unet_takes(kind, written):
    assert written in text_of(GUIDES[kind])
    sizes = [weight_bytes(published_unet(kind, eight_bits=fp8), torch.bfloat16) / 2**30 for fp8 in (False, True)]
    assert [f"{size:.2f}" for size in sizes] == {"sd1": ["1.60", "1.38"], "sdxl": ["4.78", "2.75"]}[kind]


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("sd1", "192 72 278 | 423,936 165,888 1,050,816"),
        ("sdxl", "722 72 192 788 | 2,659,840 165,888 737,280 3,074,240"),
    ],
)
def test_modules_and_parameters_of_a_lora(kind, numbers):
    page = text_of(GUIDES[kind])
    assert all(number in page for number in numbers.replace("|", "").split())
    unet, text = lora_parts(kind), lora_parts(kind, text=True)
    wide = lora_parts(kind, convolutions=True)
    counts = [len(unet), *text_counts(kind), len(wide)]
    assert [str(count) for count in counts] == numbers.partition(" | ")[0].split()
    sizes = [sum(unet.values()), *text_sizes(text), sum(wide.values())]
    assert [f"{size:,}" for size in sizes] == numbers.partition(" | ")[2].split()


@pytest.mark.parametrize(("kind", "text", "written"), [("sd1", True, "36.0 MiB"), ("sdxl", False, "162.3 MiB")])
def test_the_size_of_a_file(kind, text, written):
    parts = [lora_parts(kind), *([lora_parts(kind, text=True)] if text else [])]
    assert f"{4 * 16 * sum(sum(part.values()) for part in parts) / 2**20:.1f} MiB" == written
    assert written in text_of(GUIDES[kind])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_modules_in_each_block(kind):
    rows = table_rows(GUIDES[kind], "Blocks")
    of_block = blocks_of(kind)
    told = {block for row in rows for block in numbers_of(row[0])}
    assert told == set(range(25 if kind == "sd1" else 23))
    if kind == "sd1":
        for blocks, _, written, _ in rows:
            counts = {of_block.get(block, 0) for block in numbers_of(blocks)}
            assert counts == {int(written) if written.isdigit() else 0}, blocks
    else:
        assert of_block == {5: 22, 6: 22, 8: 102, 9: 102, 11: 102, 13: 102, 14: 102, 15: 102, 16: 22, 17: 22, 18: 22}


def test_the_signal_to_noise_ratios():
    snr = signal_to_noise(published_alpha_bars())
    assert [float(f"{snr[step]:.2g}") for step in (100, 500, 999)] == [8.5, 0.38, 0.0047]
    assert round(float(snr[0])) == 1175
    assert "1175 at timestep 0, 8.5 at 100, 0.38 at 500, 0.005 at\n999" in text_of(GUIDES["sd1"])


def test_the_example_of_a_crop():
    dataset = DatasetSettings(place="", subsets=(), resolution_wh=(1024, 1024), enable_bucket=True, max_bucket_reso=2048)
    placement = Buckets(dataset).place((1600, 1200))
    assert (placement.bucket_wh, placement.resized_wh, placement.crop_left_top) == ((1152, 896), (1195, 896), (21, 0))
    assert "in the bucket 1152x896 is resized to 1195x896 and cut at the left by 21 pixels" in text_of(GUIDES["sdxl"])


# ---------------------------------------------------------------- the page of all options

ADVANCED = ROOT / "docs" / "train_network_advanced.md"
FAMILIES = ("metadata", "huggingface")  # named by one of them and "the others that begin so"


def test_every_option_of_sdxl_is_explained():
    named = set(re.findall(r"--(\w+)", text_of(ADVANCED)))
    options = {option.name for group in groups_of(SdxlTrainOptions).values() for option in options_of(group)}
    assert {name for name in options - named if not name.startswith(FAMILIES)} == set()


def test_what_optimizers_take():
    rows = table_rows(ADVANCED, "Optimizer")
    assert len(rows) >= 8
    parameters = 16 * sum(lora_parts("sdxl").values())
    for names, written_bytes, written_gib, _ in rows:
        for name in re.findall(r"`(\w+)`", names):
            options = read_options(SdxlTrainOptions, shlex.split(f"{least()} --optimizer_type={name}"))
            size = network_bytes(1, torch.float32, options.optimizer, fused=False)
            assert [str(size), f"{size * parameters / 2**30:.2f} GiB"] == [
                written_bytes.removesuffix(" and more"),
                written_gib.removesuffix(" and more"),
            ], name


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        (UNET_ALONE, "6.5 instead of 12.1 GiB"),
        (f"--gradient_checkpointing {UNET_ALONE}", "6.5 instead of 12.1 GiB"),
        (f"--gradient_checkpointing --optimizer_type=AdamW8bit {UNET_ALONE}", "4.2 instead of 6.2 GiB"),
        (f"--gradient_checkpointing --optimizer_type=AdamW8bit --fp8_base_unet {UNET_ALONE}", "4.2 instead of 6.2 GiB"),
        ("", "14.0 GiB with both, 12.1 with the U-Net alone"),
    ],
)
def test_figures_of_memory_in_the_page_of_all_options(flags, written):
    assert written in text_of(ADVANCED)
    assert gib("sdxl", f"{least()} {flags}", 1024) in written


def test_figures_of_loss_weights_in_the_page_of_all_options():
    snr = signal_to_noise(published_alpha_bars())
    gamma = ddpm_loss_weights(DdpmTrainingOptions(min_snr_gamma=5), snr)
    debiased = ddpm_loss_weights(DdpmTrainingOptions(debiased_estimation_loss=True), snr)
    counted = int((gamma < 1).sum())
    assert (
        f"the {counted} timesteps with the least noise count less: {gamma[100]:.2f} at timestep 100, {gamma[50]:.2f} at 50"
        in (text_of(ADVANCED))
    )
    assert f"{debiased[100]:.2f} at timestep 100, {debiased[500]:.1f} at 500, {debiased[999]:.1f} at 999" in text_of(ADVANCED)


# ---------------------------------------------------------------- sample prompts

PROMPTS = ROOT / "docs" / "sample_prompts.md"


def test_all_samplers_are_named():
    named = {row[0]: set(re.findall(r"`([\w+]+)`", row[1])) - {"k_"} for row in table_rows(PROMPTS, "Model")}
    assert named == {"Stable Diffusion, SDXL": set(SAMPLERS), "Anima, SD 3, 3.5, Lumina": {"euler", "er_sde"}}
    assert all(SAMPLERS[name] == SAMPLERS[name.removeprefix("k_")] for name in SAMPLERS)


def test_the_examples_of_weights():
    examples = [(row[0], row[1]) for row in table_rows(PROMPTS, "Written")]
    assert [written for written, _ in examples][:2] == ["`(word)`", "`[word]`"]
    assert parse_weights("((word))") == [("word", pytest.approx(1.21))]
    assert parse_weights("[word]") == [("word", 1 / 1.1)]
    assert parse_weights("(word:1.3) (some words:0.8)") == [("word", 1.3), (" ", 1.0), ("some words", 0.8)]
    assert parse_weights(r"\(word\)") == [("(word)", 1.0)]


def test_every_flag_of_a_prompt_has_a_row():
    rows = table_rows(PROMPTS, "Flag")
    assert {flag for row in rows for flag in re.findall(r"`--(\w+)`", row[0])} >= set(FLAGS)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row[1])} >= set(FLAGS.values())


# ---------------------------------------------------------------- what the plan computes


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def least() -> str:
    return f"{LEAST} --mixed_precision=bf16 --cache_latents"


def gib(kind: str, arguments: str, side: int, images: int = 1) -> str:
    return f"{estimate(kind, arguments, side, images) / 2**30:.1f}"


def estimate(kind: str, arguments: str, side: int, images: int = 1) -> int:
    """Bytes for a batch of ``images`` of ``side`` x ``side`` pixels; rank 16 unless ``arguments`` say otherwise."""
    options = read_options(OPTIONS[kind], shlex.split(arguments))
    live = LiveEncoders(
        text=not options.caches.text_cached,
        text_in_fp8=options.memory.fp8_base,
        text_is_trained=options.trains_text_encoder,
    )
    parts = [lora_parts(kind), *([lora_parts(kind, text=True)] if options.trains_text_encoder else [])]
    found = estimate_memory(
        options,
        published_unet(kind, eight_bits=options.memory.fp8_base_unet),
        parameters=sum(sum(part.values()) for part in parts) * (options.network.network_dim or 16),
        dtypes=(torch.bfloat16, torch.float32),
        use=memory_use(published_layouts(kind), (side, side), images, live),
        batch=((side, side), images),
    )
    return found.total


def published_layouts(kind: str) -> StableDiffusionLayouts:
    def part(config: Any, shapes: dict[str, tuple[int, ...]]) -> Part[Any]:
        return Part(source=MemorySource(shapes), config=config, pieces={name: Piece(name) for name in shapes})

    return StableDiffusionLayouts(
        denoiser=part(UNETS[kind], {}), text=tuple(part(config, dict(expected_shapes(config))) for config in TEXTS[kind])
    )


@cache
def published_unet(kind: str, *, eight_bits: bool = False) -> torch.nn.Module:
    unet = unet_of(kind)
    if eight_bits:
        use_fp8(unet, UNET_FP8_LAYERS)
    return unet


@cache
def lora_parts(kind: str, *, text: bool = False, convolutions: bool = False) -> dict[str, int]:
    """Name and number of weights of each module of a LoRA of rank 1, for the U-Net or with ``text`` for the text encoders."""
    arguments: dict[str, Any] = {"conv_dim": "1"} if convolutions else {}
    encoders, unet = (text_encoders_of(kind), None) if text else ([], published_unet(kind))
    network = create_network(1.0, 1, 1.0, None, encoders, unet, **arguments)
    loras = [*network.text_encoder_loras, *network.unet_loras]
    return {lora.lora_name: sum(weight.numel() for weight in lora.parameters()) for lora in loras}


def text_counts(kind: str) -> list[int]:
    return [len(sizes) for sizes in by_encoder(lora_parts(kind, text=True)).values()]


def text_sizes(parts: dict[str, int]) -> list[int]:
    return [sum(sizes) for sizes in by_encoder(parts).values()]


def by_encoder(parts: dict[str, int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, size in parts.items():
        found.setdefault(name.partition("_text_model")[0], []).append(size)
    return found


def blocks_of(kind: str) -> dict[int | None, int]:
    """Modules of LoRA-LierLa in each block."""
    unet = published_unet(kind)
    paths = original_paths(unet) or {path: path for path, _ in unet.named_modules()}
    named = {f"lora_unet_{path.replace('.', '_')}": path for path in paths.values()}
    counts: dict[int | None, int] = {}
    for name in lora_parts(kind):
        block = (sdxl_block if kind == "sdxl" else sd_block)(named[name])
        counts[block] = counts.get(block, 0) + 1
    return counts


def numbers_of(text: str) -> list[int]:
    """``1, 2 and 4 to 6`` -> 1, 2, 4, 5, 6"""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found
