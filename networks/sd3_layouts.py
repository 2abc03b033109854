"""What the modules of Stable Diffusion 3 and 3.5 are called in LoRA files: our names, ComfyUI's and diffusers'. Needs no torch.

Our names are those of kohya-ss/sd-scripts, the checkpoint's paths. ComfyUI (comfy/lora.py) takes them as they are, T5's when all
three text encoders are loaded. diffusers' are those of its SD3Transformer2DModel (diffusers 0.42.1,
loaders/single_file_utils.py, convert_sd3_transformer_checkpoint_to_diffusers), which has q, k and v apart; the layers that make
only shift and scale, the last ones, make them there in the other order. Its loader takes both CLIPs; T5 it leaves out without a
word, so T5's names are read, and never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from networks.layout_names import COMFY, DIFFUSERS, NUMBER, OURS, Fused, Module, NameTable
from networks.sd_layouts import clip_modules, joined_name

BLOCK_NUMBER = (
    r"(?:(?<=joint_blocks[._])|(?<=transformer_blocks[._])|(?<=encoder[._]layers[._])|(?<=encoder[._]block[._]))\d+(?=[._])"
)
# path -> diffusers' path, inside a block; of fused layers those of q, k and v
BLOCK: dict[str, str | tuple[str, ...]] = {
    "x_block.attn.qkv": tuple(f"attn.to_{name}" for name in "qkv"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": tuple(f"attn2.to_{name}" for name in "qkv"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": tuple(f"attn.add_{name}_proj" for name in "qkv"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
EMBEDDERS = {
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    **{f"t_embedder.mlp.{n}": f"time_text_embed.timestep_embedder.linear_{place}" for place, n in ((1, 0), (2, 2))},
    **{f"y_embedder.mlp.{n}": f"time_text_embed.text_embedder.linear_{place}" for place, n in ((1, 0), (2, 2))},
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
# what may make shift and scale alone: of the text's half that of the last block
SWAPPED = ("context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1")
T5_PATHS = (
    *(f"encoder.block.{NUMBER}.layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"encoder.block.{NUMBER}.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)


def thirds(rows: int, inputs: int) -> tuple[int, ...]:
    return (rows // 3,) * 3


def three_times(known: Sequence[int | None], inputs: int) -> int | None:
    """All rows, where q, k and v have as many each."""
    return next((3 * rows for rows in known if rows is not None), None)


def _denoiser_module(path: str, theirs: str | tuple[str, ...]) -> Module:
    ours, full = joined_name("lora_unet", path), f"diffusion_model.{path}"
    swapped = frozenset({DIFFUSERS} if path.endswith(SWAPPED) else ())
    if isinstance(theirs, str):
        return Module(
            part="denoiser", names={OURS: ours, DIFFUSERS: f"transformer.{theirs}"}, aliases=(full,), swapped_in=swapped
        )
    fused = Fused(names={DIFFUSERS: tuple(f"transformer.{name}" for name in theirs)}, cut=thirds, all_rows=three_times)
    return Module(part="denoiser", names={OURS: ours}, aliases=(full,), fused=fused)


def _denoiser_modules() -> Iterator[Module]:
    for path, theirs in BLOCK.items():
        inside = f"transformer_blocks.{NUMBER}."
        names = inside + theirs if isinstance(theirs, str) else tuple(inside + name for name in theirs)
        yield _denoiser_module(f"joint_blocks.{NUMBER}.{path}", names)
    yield from (_denoiser_module(path, theirs) for path, theirs in EMBEDDERS.items())


def _t5_modules() -> Iterator[Module]:
    for path in T5_PATHS:
        aliases = (f"text_encoders.t5xxl.transformer.{path}", f"text_encoder_3.{path}")
        yield Module(part="text encoder", names={OURS: joined_name("lora_te3", path)}, aliases=aliases)


SD3_NAMES = NameTable(
    "SD3",
    [
        *_denoiser_modules(),
        *clip_modules("lora_te1", "text_encoder", ("clip_l",)),
        *clip_modules("lora_te2", "text_encoder_2", ("clip_g",)),
        *_t5_modules(),
    ],
    block_number=BLOCK_NUMBER,
    as_ours=(COMFY,),
)
