"""LoRA for Stable Diffusion 1.x and 2.x and for SDXL: the U-Net and the text encoders. Which model it is shows in what is given.

Given the MMDiT of Stable Diffusion 3 it does what networks.lora_sd3 does, with its arguments; what follows is of U-Nets.

    --network_module=networks.lora --network_dim=16 --network_args "conv_dim=8" "conv_alpha=4" "down_lr_weight=linear+0.25"

Without further arguments the Linears and 1x1 convolutions of the U-Net's transformers get a LoRA, and the text encoders'
attention and MLP layers (LoRA-LierLa). Arguments, given as ``key=value`` with --network_args:

* ``conv_dim``, ``conv_alpha`` (not given = 1): also the residual blocks and the steps between levels (LoRA-C3Lier). These two
  are for 3x3 convolutions; the Linears and 1x1 convolutions there take --network_dim and --network_alpha
* ``block_dims``, ``block_alphas``, ``conv_block_dims``, ``conv_block_alphas``: the same for each block of the U-Net, as a list
  of 25 values (SDXL: 23); rank 0 = no LoRA there
* ``down_lr_weight``, ``mid_lr_weight``, ``up_lr_weight``: what the learning rate is multiplied by in each block, as a list of
  12, 1 and 12 values (SDXL: 9, 3 and 9), or for down and up a curve: cosine, sine, linear, reverse_linear or zeros, all
  between 0 and 1, with something added if you like (``linear+0.25``). 0 = no LoRA there, and so is everything up to
  ``block_lr_zero_threshold``. Lists that are too short go on with 1, what is too much is left out
* ``exclude_patterns``, ``include_patterns``: regexes on whole module paths, ``text_model.encoder.layers.0.mlp.fc1`` or of the
  U-Net ``down_blocks.0.attentions.0.proj_in``, of SDXL's ``input_blocks.4.1.proj_in``. Excluded modules get no LoRA; included
  ones get it although they are excluded, by the user or by default: without conv_dim all that it would bring in
* ``network_reg_dims=regex=rank, regex=rank``, ``network_reg_lrs=regex=lr, ...``: the first match counts, and overrides what
  was said of its block; rank 0 leaves out, learning rate 0 leaves untrained
* ``rank_dropout``, ``module_dropout``: chances in [0, 1)
* ``loraplus_lr_ratio``, ``loraplus_unet_lr_ratio``, ``loraplus_text_encoder_lr_ratio``: learning rate of lora_up over
  lora_down
* ``verbose=true``: log a table of all modules with their ranks, alphas, learning rates and parameters

How patterns are written (in quotes when they contain commas): networks/arguments.py. Names in a file are those of
kohya-ss/sd-scripts: lora_unet_ and the path with underscores for dots; lora_te_ or, for SDXL, lora_te1_ and lora_te2_.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import NetworkError
from library.sd.unet_names import UNetConfig, original_names
from networks import lora_sd3
from networks.arguments import parse_arguments
from networks.block_weights import BlockArguments, sd_block, sdxl_block
from networks.layer import LoRAModule
from networks.network import LoRANetwork, build_network, build_network_from_weights
from networks.sd_arguments import Sd1Arguments, Sd2Arguments, SdxlArguments
from networks.selection import COMPILED, ModelRules

__all__ = ["LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]

Modules = Mapping[str, nn.Module]  # of a model, by path
TextEncoders = nn.Module | Sequence[nn.Module | None] | None

LAYERS = (nn.Linear, nn.Conv2d)
SDXL_ENCODERS = 2
WRAPPER = "module."  # of distributed training
CONVOLUTIONAL = r"(?!.*\b(proj_in|proj_out|transformer_blocks)\b).*"  # what lies outside the transformers
SD2_CONTEXT_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the network does differently for one kind of model."""

    arguments: type[BlockArguments]
    fits: Callable[[Modules], bool]  # whether a denoiser with these modules is of this kind
    text_encoders: int
    denoiser_rules: Callable[[Modules, BlockArguments], ModelRules]


def create_network(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A new network for these models; for those alone that are given. Raises NetworkError, with all problems.

    SDXL's two text encoders, and SD3's three, are told apart by their places; a place may be None.
    """
    if _is_sd3(unet, text_encoder):
        return lora_sd3.create_network(
            multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=neuron_dropout, **kwargs
        )
    family, modules = _family_of(unet, text_encoder)
    arguments = parse_arguments(family.arguments, kwargs)
    models = _models(family, arguments, text_encoder, unet, modules)
    return build_network(
        models, arguments, multiplier=multiplier, rank=network_dim, alpha=network_alpha, neuron_dropout=neuron_dropout
    )


def create_network_from_weights(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    file: str | Path,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network with the modules, ranks and alphas of a LoRA file, and the file's tensors under our names.

    ``for_inference`` changes nothing here: one class serves both. Raises NetworkError for a file of another architecture.
    """
    if _is_sd3(unet, text_encoder):
        return lora_sd3.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet, weights_sd, for_inference, **kwargs
        )
    family, modules = _family_of(unet, text_encoder)
    arguments = parse_arguments(family.arguments, kwargs)
    models = _models(family, arguments, text_encoder, unet, modules)
    given = {rules.prefix for _, rules in models}
    absent = tuple(f"{prefix}_" for prefix in (DENOISER_PREFIX, *_text_prefixes(family.text_encoders)) if prefix not in given)
    return build_network_from_weights(models, arguments, multiplier=multiplier, file=file, weights_sd=weights_sd, absent=absent)


# ---------------------------------------------------------------- which models, and what is theirs

DENOISER_PREFIX, TEXT_PREFIX = "lora_unet", "lora_te"


def _is_sd3(unet: nn.Module | None, text_encoder: TextEncoders) -> bool:
    """By the denoiser; without one by its three text encoders: the names of two are those of SDXL's."""
    return lora_sd3.block_count(unet) > 0 if unet is not None else len(_listed(text_encoder)) > SDXL_ENCODERS


def _family_of(unet: nn.Module | None, text_encoder: TextEncoders) -> tuple[Family, Modules]:
    modules = {} if unet is None else _modules_of(unet)
    encoders = _listed(text_encoder)
    if unet is None:
        count = 2 if any(map(_is_second, encoders)) else max(len(encoders), 1)
        return next(family for family in FAMILIES if family.text_encoders <= count), modules
    for family in FAMILIES:
        if family.fits(modules):
            return family, modules
    raise NetworkError(
        f"--network_module networks.lora is for the models of Stable Diffusion 1.x, 2.x, SDXL and SD3, and {type(unet).__name__} "
        "is none of them: name the network module that was made for this model, such as networks.lora_anima"
    )


def _modules_of(unet: nn.Module) -> Modules:
    return {path.replace(COMPILED, "").removeprefix(WRAPPER): module for path, module in unet.named_modules()}


def _models(
    family: Family, arguments: BlockArguments, text_encoder: TextEncoders, unet: nn.Module | None, modules: Modules
) -> list[tuple[nn.Module, ModelRules]]:
    models: list[tuple[nn.Module, ModelRules]] = []
    encoders = _listed(text_encoder)
    count = max(family.text_encoders, len(encoders))
    for place, encoder in enumerate(encoders):
        if encoder is not None:
            alone = count > len(encoders)  # CLIP-G without CLIP-L before it
            models.append((encoder, _text_rules(count - 1 if alone and _is_second(encoder) else place, count)))
    return models if unet is None else [*models, (unet, family.denoiser_rules(modules, arguments))]


def _listed(text_encoder: TextEncoders) -> list[nn.Module | None]:
    return [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder or ())


def _is_second(encoder: nn.Module | None) -> bool:
    """Of SDXL's two it is CLIP-G whose pooled state is used."""
    return hasattr(encoder, "text_projection")


def _text_prefixes(count: int) -> list[str]:
    return [TEXT_PREFIX] if count == 1 else [f"{TEXT_PREFIX}{place + 1}" for place in range(count)]


def _text_rules(place: int, count: int) -> ModelRules:
    return ModelRules(
        prefix=_text_prefixes(count)[place],
        label="textencoder" if count == 1 else f"textencoder {place + 1}",
        # whatever is around it: names in files do not follow the versions of transformers, some of which lack text_model
        candidates=r"(?:.*\.)?(encoder\.layers\.\d+\.(?:self_attn|mlp)\..+)",
        renamed=lambda path: f"text_model.{path}",
    )


def _sd_rules(modules: Modules, arguments: BlockArguments) -> ModelRules:
    return _unet_rules(arguments, renamed=str, block_of=sd_block)


def _sdxl_rules(modules: Modules, arguments: BlockArguments) -> ModelRules:
    names = original_names(unet_frame(modules))
    return _unet_rules(arguments, renamed=lambda path: names.get(path, path), block_of=sdxl_block)


def _unet_rules(arguments: BlockArguments, *, renamed: Callable[[str], str], block_of: Callable[[str], int | None]) -> ModelRules:
    return ModelRules(
        prefix=DENOISER_PREFIX,
        label="unet",
        candidates=r"(?:module\.)?((?:down_blocks|mid_block|up_blocks)\..+)",
        excludes=() if arguments.has_convolutions else (CONVOLUTIONAL,),
        kinds=LAYERS,
        renamed=renamed,
        block_of=block_of,
    )


def original_paths(unet: nn.Module) -> dict[str, str]:
    """Path of each module of an SDXL U-Net -> the original checkpoint's, which files go by; nothing for other models."""
    modules = _modules_of(unet)
    return original_names(unet_frame(modules)) if _is_sdxl(modules) else {}


def unet_frame(modules: Modules) -> UNetConfig:
    """The levels, widths and depths of a U-Net of diffusers' class; its other sizes, which no name depends on, are made up."""
    levels = _count(modules, r"down_blocks\.(\d+)\.resnets\.0")
    depths = tuple(_count(modules, rf"down_blocks\.{level}\.attentions\.0\.transformer_blocks\.(\d+)") for level in range(levels))
    return UNetConfig(
        widths=tuple(_width(modules[f"down_blocks.{level}.resnets.0.conv1"]) for level in range(levels)),
        depths=depths,
        middle_depth=_count(modules, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)"),
        heads=(1,) * levels,
        context_width=1,
        vector_width=1,
        time_width=1,
        layers=_count(modules, r"down_blocks\.0\.resnets\.(\d+)"),
    )


def _count(modules: Modules, pattern: str) -> int:
    return sum(re.fullmatch(pattern, path) is not None for path in modules)


def _width(convolution: nn.Module) -> int:
    assert isinstance(convolution, nn.Conv2d)
    return convolution.out_channels


def _is_sd(modules: Modules) -> bool:
    return "mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in modules


def _is_sd2(modules: Modules) -> bool:
    """By the published sizes: wider text states, and heads of one size instead of the same number everywhere."""
    keys = [module for path, module in modules.items() if path.endswith("attn2.to_k")]
    heads = {module.heads for path, module in modules.items() if path.endswith(".attn2") and hasattr(module, "heads")}
    wide = any(isinstance(key, nn.Linear) and key.in_features == SD2_CONTEXT_WIDTH for key in keys)
    return _is_sd(modules) and (wide or len(heads) > 1)


def _is_sdxl(modules: Modules) -> bool:
    return _is_sd(modules) and "add_embedding" in modules


FAMILIES = (  # the first that fits counts
    Family(arguments=SdxlArguments, fits=_is_sdxl, text_encoders=2, denoiser_rules=_sdxl_rules),
    Family(arguments=Sd2Arguments, fits=_is_sd2, text_encoders=1, denoiser_rules=_sd_rules),
    Family(arguments=Sd1Arguments, fits=_is_sd, text_encoders=1, denoiser_rules=_sd_rules),
)
