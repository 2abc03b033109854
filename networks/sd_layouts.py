"""What the modules of Stable Diffusion 1.x, 2.x and SDXL are called in LoRA files: our names, ComfyUI's and diffusers'.

Our names are those of kohya-ss/sd-scripts: diffusers' paths for 1.x and 2.x, the original checkpoint's for SDXL's U-Net. ComfyUI
(comfy/lora.py) takes them as they are, so what is written for it are our names; its dotted ones and those of older versions of
diffusers are read. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from library.sd.unet_names import HEAD, UNetConfig, original_names
from networks.layout_names import COMFY, DIFFUSERS, NUMBER, OURS, STABLE_DIFFUSION, Module, NameTable

# the published frames; of the sizes only which ones are equal matters, and one transformer block stands for all
SD_FRAME = UNetConfig(widths=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), middle_depth=1, heads=(8, 8, 8, 8), context_width=768,
                      time_width=1280)  # fmt: skip
SDXL_FRAME = UNetConfig(widths=(320, 640, 1280), depths=(0, 1, 1), middle_depth=1, heads=(5, 10, 20), context_width=2048,
                        vector_width=2816, time_width=1280)  # fmt: skip
PROJECTIONS = (".proj_in", ".proj_out")  # of a spatial transformer: Linears or 1x1 convolutions
BLOCK_NUMBER = r"(?:(?<=transformer_blocks[._])|(?<=encoder[._]layers[._]))\d+(?=[._])"
LAYER = f"text_model.encoder.layers.{NUMBER}"
TEXT_PATHS = (
    *(f"{LAYER}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"{LAYER}.mlp.{name}" for name in ("fc1", "fc2")),
)
DENOISER, TEXT_ENCODER = "denoiser", "text encoder"


def trainable_paths(frame: UNetConfig) -> dict[str, str]:
    """diffusers' path of each layer that can have a LoRA -> the original one; ``{n}`` stands for a transformer block's number."""
    return {
        path.replace("transformer_blocks.0", f"transformer_blocks.{NUMBER}"): original.replace(
            "transformer_blocks.0", f"transformer_blocks.{NUMBER}"
        )
        for path, original in original_names(frame).items()
        if path not in HEAD and "norm" not in path
    }


def _denoiser_modules(frame: UNetConfig, *, original: bool, flat: bool = False) -> Iterator[Module]:
    """``original``: our names follow the original checkpoint; ``flat``: diffusers' model has Linears where ours may have 1x1
    convolutions."""
    for path, theirs in trainable_paths(frame).items():
        ours, other = (theirs, path) if original else (path, theirs)
        old = path.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")  # before diffusers used PEFT
        aliases = (
            joined_name("lora_unet", other),
            f"diffusion_model.{theirs}",
            path,
            *((f"unet.{old}", old) if old != path else ()),
        )
        is_linear = flat and path.endswith(PROJECTIONS)
        yield Module(
            part=DENOISER,
            names={OURS: joined_name("lora_unet", ours), DIFFUSERS: f"unet.{path}"},
            aliases=aliases,
            linear_in=frozenset({DIFFUSERS} if is_linear else ()),
        )


def clip_modules(prefix: str, theirs: str, comfy: tuple[str, ...], *also: str) -> Iterator[Module]:
    """``theirs``: diffusers' name of the encoder; ``comfy``: ComfyUI's; ``also``: further prefixes in place of ours."""
    for path in TEXT_PATHS:
        flat = path.removeprefix("text_model.")  # transformers 5 has no such level in its CLIPTextModel
        yield Module(
            part=TEXT_ENCODER,
            names={OURS: joined_name(prefix, path), DIFFUSERS: f"{theirs}.{path}"},
            aliases=(
                f"{theirs}.{flat}",
                *(f"text_encoders.{name}.transformer.{path}" for name in comfy),
                *(joined_name(name, path) for name in also),
            ),
        )


def joined_name(prefix: str, path: str) -> str:
    """``lora_unet_`` and a path with underscores for dots."""
    return f"{prefix}_{path.replace('.', '_')}"


def _table(architecture: str, *parts: Iterator[Module]) -> NameTable:
    modules = [module for part in parts for module in part]
    return NameTable(architecture, modules, block_number=BLOCK_NUMBER, as_ours=(COMFY,))


def _sd_text() -> Iterator[Module]:
    return clip_modules("lora_te", "text_encoder", ("clip_l", "clip_h"), "lora_te1")


SD1_NAMES = _table(STABLE_DIFFUSION, _denoiser_modules(SD_FRAME, original=False), _sd_text())
SD2_NAMES = _table(STABLE_DIFFUSION, _denoiser_modules(SD_FRAME, original=False, flat=True), _sd_text())
SDXL_NAMES = _table(
    "SDXL",
    _denoiser_modules(SDXL_FRAME, original=True),
    clip_modules("lora_te1", "text_encoder", ("clip_l",)),
    clip_modules("lora_te2", "text_encoder_2", ("clip_g",)),
)
