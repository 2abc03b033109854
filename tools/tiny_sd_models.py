"""Sizes of tiny Stable Diffusion models, and what stands beside their weights in files and folders. See tools/tiny_sd.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from library.sd import clip_layout
from library.sd.clip_layout import ClipConfig
from library.sd.unet_names import UNetConfig
from library.sd.vae_layout import VaeConfig

SIZE_NUMBERS = 6 * 256  # of the vector: sinusoids of SDXL's six sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class SdModel:
    """One model's parts. ``text``: each encoder with its prefix in a single file and the layout of its names there."""

    unet: UNetConfig
    text: tuple[tuple[str, clip_layout.Layout, ClipConfig], ...]
    vae: VaeConfig
    latent_scale: float
    has_noise_tables: bool  # in the single file, as in the published ones
    flat_projections: bool  # proj_in and proj_out are matrices in files


def sd1(*, widths: Sequence[int] = (32, 64, 96, 96), clip_width: int = 32, clip_layers: int = 3) -> SdModel:
    """What a file cannot say by shapes is as in the published model, so that a .ckpt, which has no metadata, is read right."""
    unet = _unet(widths, (1, 1, 1, 0), heads=(8,) * 4, context=clip_width)
    clip = _clip(clip_width, clip_layers, heads=max(clip_width // clip_layout.HEAD_DIM, 1), activation="quick_gelu")
    return _model(unet, (("cond_stage_model.transformer.", "hf", clip),))


def sd2(*, widths: Sequence[int] = (32, 64, 96, 96), head_dim: int = 16, clip_width: int = 32, clip_layers: int = 3) -> SdModel:
    unet = _unet(widths, (1, 1, 1, 0), heads=[width // head_dim for width in widths], context=clip_width)
    clip = _clip(clip_width, clip_layers, heads=clip_width // head_dim, activation="gelu", projection=clip_width)
    return replace(_model(unet, (("cond_stage_model.model.", "open_clip", clip),)), flat_projections=True)


def sdxl(
    *,
    widths: Sequence[int] = (32, 64, 96),
    head_dim: int = 16,
    depths: Sequence[int] = (0, 1, 2),
    clip_widths: Sequence[int] = (32, 48),
) -> SdModel:
    """``depths``: transformer blocks on each level; 0, 2, 10 in the published model."""
    first, second = clip_widths
    heads = [width // head_dim for width in widths]
    unet = _unet(widths, depths, heads=heads, context=first + second)
    unet = replace(unet, vector_width=second + SIZE_NUMBERS, linear_projections=True)
    text: tuple[tuple[str, clip_layout.Layout, ClipConfig], ...] = (
        ("conditioner.embedders.0.transformer.", "hf", _clip(first, 3, heads=first // 16, activation="quick_gelu")),
        ("conditioner.embedders.1.model.", "open_clip",
         _clip(second, 3, heads=second // 16, activation="gelu", projection=second)),
    )  # fmt: skip
    return replace(_model(unet, text), latent_scale=0.13025, has_noise_tables=False, flat_projections=True)


# kind -> size -> what makes the model. bench: a quarter of the published widths, with the published depths and heads
MODELS: dict[str, dict[str, Callable[[], SdModel]]] = {
    "sd1": {"tiny": sd1, "bench": partial(sd1, widths=(80, 160, 320, 320), clip_width=192)},
    "sd2": {"tiny": sd2, "bench": partial(sd2, widths=(80, 160, 320, 320), clip_width=256)},
    "sdxl": {
        "tiny": sdxl,
        "deep": partial(sdxl, depths=(0, 2, 10)),
        "bench": partial(sdxl, widths=(80, 160, 320), depths=(0, 2, 10), clip_widths=(192, 320)),
    },
}


def _model(unet: UNetConfig, text: tuple[tuple[str, clip_layout.Layout, ClipConfig], ...]) -> SdModel:
    vae = VaeConfig(widths=(32, 64, 96, 96), norm_groups=32)
    return SdModel(unet=unet, text=text, vae=vae, latent_scale=0.18215, has_noise_tables=True, flat_projections=False)


def _unet(widths: Sequence[int], depths: Sequence[int], *, heads: Sequence[int], context: int) -> UNetConfig:
    return UNetConfig(
        widths=tuple(widths),
        depths=tuple(depths),
        middle_depth=max(depths[-1], 1),
        heads=tuple(heads),
        context_width=context,
        time_width=4 * widths[0],
        norm_groups=32 if widths[0] % 32 == 0 else 16,
    )


def _clip(width: int, layers: int, *, heads: int, activation: str, projection: int | None = None) -> ClipConfig:
    return ClipConfig(width=width, layers=layers, heads=heads, mlp_width=4 * width, activation=activation, projection=projection)


# ---------------------------------------------------------------- what stands beside the weights


def config_entry(model: SdModel) -> dict[str, Any]:
    """Of the metadata: what shapes cannot tell."""
    return {
        "unet": {"heads": list(model.unet.heads), "norm_groups": model.unet.norm_groups},
        "text": [{"heads": config.heads, "activation": config.activation} for _, _, config in model.text],
        "vae": {"norm_groups": model.vae.norm_groups},
    }


def diffusers_unet_config(model: SdModel) -> dict[str, Any]:
    unet = model.unet
    downs = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depths]
    ups = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(unet.depths)]
    extra: dict[str, Any] = {}
    if unet.vector_width:
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": unet.vector_width,
                 "transformer_layers_per_block": [max(depth, 1) for depth in unet.depths]}  # fmt: skip
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "down_block_types": downs,
        "up_block_types": ups,
        "block_out_channels": list(unet.widths),
        "layers_per_block": unet.layers,
        "cross_attention_dim": unet.context_width,
        "attention_head_dim": unet.heads[0] if len(set(unet.heads)) == 1 else list(unet.heads),  # their name for heads
        "norm_num_groups": unet.norm_groups,
        "use_linear_projection": model.flat_projections,
        **extra,
    }


def diffusers_vae_config(model: SdModel) -> dict[str, Any]:
    levels = len(model.vae.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(model.vae.widths),
        "layers_per_block": model.vae.blocks,
        "latent_channels": model.vae.latent_channels,
        "norm_num_groups": model.vae.norm_groups,
        "scaling_factor": model.latent_scale,
    }


def transformers_config(config: ClipConfig) -> dict[str, Any]:
    name = "CLIPTextModel" if config.projection is None else "CLIPTextModelWithProjection"
    return {
        "architectures": [name],
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "max_position_embeddings": config.positions,
        "vocab_size": config.vocabulary,
        "projection_dim": config.projection or config.width,
        "layer_norm_eps": 1e-5,
        # as published, where it stands for "the id with the highest number", which is the end of a text
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def scheduler_config(*, v_prediction: bool) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
        "rescale_betas_zero_snr": v_prediction,
    }


def model_index(model: SdModel) -> dict[str, Any]:
    names = ["text_encoder", "text_encoder_2"][: len(model.text)]
    classes = ["CLIPTextModel", "CLIPTextModelWithProjection"]
    pipeline = "StableDiffusionXLPipeline" if model.unet.vector_width else "StableDiffusionPipeline"
    return {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{name: ["transformers", kind] for name, kind in zip(names, classes, strict=False)},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
