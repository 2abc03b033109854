"""What Lumina Image 2.0's modules are called in LoRA files: our names, ComfyUI's and diffusers'. Needs no torch.

ComfyUI (comfy/lora.py) takes any weight by its full name in the checkpoint, which is what its layout is written with. Its
further names for this class of models are those of Z-Image, whose q, k and v are equally wide: here they would address wrong
rows, so only the fused attention.qkv is written. diffusers' names are those of its Lumina2Transformer2DModel (0.42.1), which has
q, k and v apart; its loader takes no text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from networks.layout_names import COMFY, DIFFUSERS, NUMBER, OURS, Fused, Module, NameTable

BLOCK_NUMBER = r"(?:(?<=layers[._])|(?<=refiner[._]))\d+(?=[._])"
# path -> diffusers' path, inside a block
BLOCK = {"attention.out": "attn.to_out.0", **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)}}
MODULATION = {"adaLN_modulation.1": "norm1.linear"}
BLOCKS = {"layers": {**BLOCK, **MODULATION}, "noise_refiner": {**BLOCK, **MODULATION}, "context_refiner": BLOCK}
DENOISER = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
    **{
        f"{blocks}.{NUMBER}.{path}": f"{blocks}.{NUMBER}.{theirs}"
        for blocks, paths in BLOCKS.items()
        for path, theirs in paths.items()
    },
}
FUSED = {f"{blocks}.{NUMBER}.attention.qkv": tuple(f"{blocks}.{NUMBER}.attn.to_{name}" for name in "qkv") for blocks in BLOCKS}
TEXT_ENCODER = (
    *(f"layers.{NUMBER}.self_attn.{path}_proj" for path in "qkvo"),
    *(f"layers.{NUMBER}.mlp.{path}_proj" for path in ("gate", "up", "down")),
)
COMFY_TEXT_ENCODER = "text_encoders.gemma2_2b.transformer.model."


def qkv_split(rows: int, width: int) -> tuple[int, int, int]:
    """How many of a fused layer's ``rows`` are of q, k and v: of q as many as the model is wide, of k and v half of the rest."""
    shared = (rows - width) // 2
    return width, shared, shared


def all_rows(known: Sequence[int | None], width: int) -> int | None:
    """The reverse, from those of q, k and v; None where neither k's nor v's are known."""
    _, *shared = known
    return next((width + 2 * rows for rows in shared if rows is not None), None)


def _denoiser_module(path: str, theirs: str | tuple[str, ...]) -> Module:
    names: Mapping[str, str] = {OURS: f"lora_unet_{path.replace('.', '_')}", COMFY: f"diffusion_model.{path}"}
    if isinstance(theirs, str):
        return Module(part="denoiser", names={**names, DIFFUSERS: f"transformer.{theirs}"})
    fused = Fused(names={DIFFUSERS: tuple(f"transformer.{name}" for name in theirs)}, cut=qkv_split, all_rows=all_rows)
    return Module(part="denoiser", names=names, fused=fused)


def _text_module(path: str) -> Module:
    names: Mapping[str, str] = {OURS: f"lora_te_{path.replace('.', '_')}", COMFY: COMFY_TEXT_ENCODER + path}
    # newer versions of ComfyUI also take what stands behind the encoder's name
    return Module(part="text encoder", names=names, aliases=(f"transformer.model.{path}",))


LUMINA_NAMES = NameTable(
    "Lumina Image 2.0",
    [
        *(_denoiser_module(path, theirs) for path, theirs in DENOISER.items()),
        *(_denoiser_module(path, theirs) for path, theirs in FUSED.items()),
        *(_text_module(path) for path in TEXT_ENCODER),
    ],
    block_number=BLOCK_NUMBER,
)
