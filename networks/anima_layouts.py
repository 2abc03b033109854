"""What Anima's modules are called in LoRA files: our names, ComfyUI's and diffusers'. Needs no torch.

Stated as data, because a name with underscores cannot be cut into a path by rule: ``adaln_modulation_self_attn_1`` is
``adaln_modulation_self_attn.1``. ComfyUI's paths are those of the published checkpoint (its comfy/lora.py takes any weight by
its full name); diffusers' are those of its CosmosTransformer3DModel and AnimaTextConditioner (diffusers 0.42.1,
loaders/lora_conversion_utils.py), which its AnimaLoraLoaderMixin loads. It loads no text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from networks.layout_names import COMFY, DIFFUSERS, NUMBER, OURS, Module, NameTable

PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
# path -> diffusers' path, inside a block
BLOCK = {
    **{f"self_attn.{path}": f"attn1.{theirs}" for path, theirs in PROJECTIONS.items()},
    **{f"cross_attn.{path}": f"attn2.{theirs}" for path, theirs in PROJECTIONS.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{part}.{layer}": f"norm{number}.linear_{layer}"
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for layer in (1, 2)
    },
}
DENOISER = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    **{f"blocks.{NUMBER}.{path}": f"transformer_blocks.{NUMBER}.{theirs}" for path, theirs in BLOCK.items()},
}
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER = (  # diffusers has the same paths
    "embed",
    "out_proj",
    *(f"blocks.{NUMBER}.{part}.{path}" for part in ("self_attn", "cross_attn") for path in HEADS),
    *(f"blocks.{NUMBER}.mlp.{layer}" for layer in (0, 2)),
)
TEXT_ENCODER = (
    "embed_tokens",
    *(f"layers.{NUMBER}.self_attn.{path}" for path in HEADS),
    *(f"layers.{NUMBER}.mlp.{path}_proj" for path in ("gate", "up", "down")),
)
COMFY_TEXT_ENCODER = "text_encoders.qwen3_06b.transformer.model."
# the converter of kohya-ss/sd-scripts takes these underscores for dots; ComfyUI leaves such weights out
WRONG_PATHS = {
    **{
        f"blocks.{NUMBER}.adaln_modulation_{part}.{layer}": f"blocks.{NUMBER}.adaln_modulation.{part}.{layer}"
        for part in ("self_attn", "cross_attn")
        for layer in (1, 2)
    },
    **{f"t_embedder.1.linear_{layer}": f"t.embedder.1.linear_{layer}" for layer in (1, 2)},
}


def _module(part: str, ours: str, path: str, comfy: str, diffusers: str | None, aliases: tuple[str, ...] = ()) -> Module:
    names: Mapping[str, str] = {OURS: ours + path.replace(".", "_"), COMFY: comfy + path}
    return Module(part=part, names=names if diffusers is None else {**names, DIFFUSERS: diffusers}, aliases=aliases)


def _denoiser_module(path: str, theirs: str) -> Module:
    wrong = (f"diffusion_model.{WRONG_PATHS[path]}",) if path in WRONG_PATHS else ()
    return _module("denoiser", "lora_unet_", path, "diffusion_model.", f"transformer.{theirs}", wrong)


ANIMA_NAMES = NameTable(
    "Anima",
    [
        *(_denoiser_module(path, theirs) for path, theirs in DENOISER.items()),
        *(
            _module("denoiser", "lora_unet_llm_adapter_", path, "diffusion_model.llm_adapter.", f"text_conditioner.{path}")
            for path in ADAPTER
        ),
        *(
            # newer versions of ComfyUI also take what stands behind the encoder's name
            _module("text encoder", "lora_te_", path, COMFY_TEXT_ENCODER, None, (f"transformer.model.{path}",))
            for path in TEXT_ENCODER
        ),
    ],
)
