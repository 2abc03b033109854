"""LoRA for Stable Diffusion 3 and 3.5: the MMDiT's joint blocks, on request its embedders, and the text encoders.

    --network_module=networks.lora_sd3 --network_dim=16 --network_args "train_block_indices=0-11" "x_attn_dim=32"

networks.lora does the same for this model. Without further arguments every Linear of the joint blocks gets a LoRA, and the
attention and MLP layers of CLIP-L and CLIP-G. Arguments, given as ``key=value`` with --network_args:

* ``context_attn_dim``, ``context_mlp_dim``, ``context_mod_dim``, ``x_attn_dim`` (SD3.5-medium's second attention, too),
  ``x_mlp_dim``, ``x_mod_dim``: the rank in the text's (context) and the image's (x) half of a block, of its attention, MLP and
  modulation; 0 = no LoRA there. Alpha is --network_alpha everywhere
* ``emb_dims=[4,4,4,4,4,4]``: ranks of context_embedder, t_embedder, x_embedder, y_embedder and the final layer's modulation and
  linear, which otherwise have none
* ``train_block_indices``: the joint blocks that have a LoRA: all, none, or a list such as 0-5,8
* ``split_qkv=true``: a LoRA of its own for each of q, k and v, each of the rank. A file holds them as one of three times rank and
  alpha, so that every program reads the strength of the training
* ``train_t5xxl=true``: also the attention and MLP layers of T5, where text encoders are trained
* ``exclude_patterns``, ``include_patterns``: regexes on whole module paths (``joint_blocks.0.x_block.attn.qkv``,
  ``text_model.encoder.layers.0.mlp.fc1``, ``encoder.block.0.layer.0.SelfAttention.q``). Excluded modules get no LoRA; included
  ones get it although they are excluded, by the user or by default: embedders, blocks that train_block_indices leaves out
* ``network_reg_dims=regex=rank, regex=rank``, ``network_reg_lrs=regex=lr, ...``: the first match counts, and overrides the ranks
  above; rank 0 leaves out, learning rate 0 leaves untrained
* ``rank_dropout``, ``module_dropout``: chances in [0, 1)
* ``loraplus_lr_ratio``, ``loraplus_unet_lr_ratio``, ``loraplus_text_encoder_lr_ratio``: learning rate of lora_up over lora_down
* ``verbose=true``: log a table of all modules with their ranks, alphas, learning rates and parameters

--text_encoder_lr takes one rate for each of CLIP-L, CLIP-G and T5; the last one given is also that of those after it.

How patterns are written (in quotes when they contain commas): networks/arguments.py. Names in a file are lora_unet_, lora_te1_
(CLIP-L), lora_te2_ (CLIP-G) and lora_te3_ (T5) with the module's path, dots as underscores, as ComfyUI reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import NetworkError
from networks.arguments import parse_arguments
from networks.block_indices import check_indices, other_blocks
from networks.network import LoRANetwork, Models, build_network, build_network_from_weights
from networks.sd3_arguments import EMBEDDERS, Sd3Arguments
from networks.selection import COMPILED, ModelRules

__all__ = ["create_network", "create_network_from_weights"]

BLOCKS = "joint_blocks"
BLOCK = re.compile(rf"(?:.*\.)?{BLOCKS}\.(\d+)")
QKV = re.compile(r".*\.attn2?\.qkv")
PREFIXES = DENOISER_PREFIX, *TEXT_PREFIXES = "lora_unet", "lora_te1", "lora_te2", "lora_te3"  # of names in a file
T5 = 2  # its place among the text encoders


def denoiser_rules(arguments: Sd3Arguments) -> ModelRules:
    embedders = "|".join(EMBEDDERS)
    return ModelRules(
        prefix=DENOISER_PREFIX,
        label="unet",
        candidates=rf"(?:module\.)?({BLOCKS}\.\d+\.(?:context|x)_block\..+|{embedders})",
        excludes=(*other_blocks(BLOCKS, arguments.train_block_indices), *(() if arguments.emb_dims else (embedders,))),
        kinds=(nn.Linear, nn.Conv2d),
        parts_of=parts_of,
        ranks=arguments.part_ranks,
    )


def parts_of(path: str, layer: nn.Module) -> tuple[int, ...]:
    """q, k and v, of equal size."""
    return (layer.out_features // 3,) * 3 if isinstance(layer, nn.Linear) and QKV.fullmatch(path) else ()


def clip_rules(place: int) -> ModelRules:
    return ModelRules(
        prefix=TEXT_PREFIXES[place],
        label=f"textencoder {place + 1}",
        # whatever is around it: names in files do not follow the versions of transformers, some of which lack text_model
        candidates=r"(?:.*\.)?(encoder\.layers\.\d+\.(?:self_attn|mlp)\..+)",
        renamed=lambda path: f"text_model.{path}",
    )


TEXT_RULES = (
    clip_rules(0),
    clip_rules(1),
    ModelRules(
        prefix=TEXT_PREFIXES[T5],
        label=f"textencoder {T5 + 1}",
        candidates=r"(?:.*\.)?(encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention|DenseReluDense)\..+)",
    ),
)


def create_network(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: nn.Module | Sequence[nn.Module | None] | None,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A new network for these models; for those alone that are given. Raises NetworkError, with all problems.

    ``text_encoders``: CLIP-L, CLIP-G and T5, told apart by their places; a place may be None.
    """
    arguments = parse_arguments(Sd3Arguments, kwargs)
    encoders = _listed(text_encoders)
    if arguments.train_t5xxl and 0 < len(encoders) <= T5:  # a T5 that is not trained has an empty place
        raise NetworkError("--network_args: train_t5xxl is to train T5, and there is none: give it with --t5xxl, or drop the "
                           "argument")  # fmt: skip
    return build_network(
        models_of(encoders, unet, arguments, with_t5=arguments.train_t5xxl), arguments, multiplier=multiplier, rank=network_dim,
        alpha=network_alpha, neuron_dropout=neuron_dropout,
    )  # fmt: skip


def create_network_from_weights(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    file: str | Path,
    vae: nn.Module | None,
    text_encoders: nn.Module | Sequence[nn.Module | None] | None,
    unet: nn.Module | None,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network with the modules (T5's too), ranks and alphas of a LoRA file, and the file's tensors under our names.

    ``for_inference`` changes nothing here: one class serves both. Raises NetworkError for a file of another architecture.
    """
    arguments = parse_arguments(Sd3Arguments, kwargs)
    models = models_of(_listed(text_encoders), unet, arguments, with_t5=True)
    given = {rules.prefix for _, rules in models}
    absent = tuple(f"{prefix}_" for prefix in PREFIXES if prefix not in given)
    return build_network_from_weights(models, arguments, multiplier=multiplier, file=file, weights_sd=weights_sd, absent=absent)


def models_of(encoders: Sequence[nn.Module | None], unet: nn.Module | None, arguments: Sd3Arguments, *, with_t5: bool) -> Models:
    """The models with their rules, text encoders first. Raises NetworkError for a denoiser that is no MMDiT."""
    chosen = encoders if with_t5 else encoders[:T5]
    models = [(encoder, rules) for encoder, rules in zip(chosen, TEXT_RULES, strict=False) if encoder is not None]
    if unet is None:
        return models
    blocks = block_count(unet)
    if not blocks:
        raise NetworkError(
            f"--network_module networks.lora_sd3 is for the MMDiT of Stable Diffusion 3, and {type(unet).__name__} is none: name "
            "the network module that was made for this model"
        )
    check_indices("train_block_indices", arguments.train_block_indices, blocks=blocks)
    return [*models, (unet, denoiser_rules(arguments))]


def block_count(unet: nn.Module) -> int:
    """0 for other models."""
    paths = (BLOCK.fullmatch(path.replace(COMPILED, "")) for path, _ in unet.named_modules())
    return len({match[1] for match in paths if match})


def _listed(text_encoders: nn.Module | Sequence[nn.Module | None] | None) -> list[nn.Module | None]:
    return [text_encoders] if isinstance(text_encoders, nn.Module) else list(text_encoders or ())
