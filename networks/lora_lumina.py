"""LoRA for Lumina Image 2.0: the denoiser's layers, its refiners and final layer, on request its embedders, and Gemma 2.

    --network_module=networks.lora_lumina --network_dim=16 --network_args "attn_dim=16" "mlp_dim=8" "train_block_indices=0-12"

Arguments, given as ``key=value`` with --network_args:

* ``attn_dim``, ``mlp_dim``, ``mod_dim``: ranks of the denoiser's attention, feed_forward and adaLN_modulation layers;
  ``refiner_dim``: of the refiners' layers that these leave. 0 leaves a part without a LoRA; not given, --network_dim counts
* ``embedder_dims=[x,t,cap]``: ranks of x_embedder, t_embedder and cap_embedder, which otherwise have no LoRA
* ``train_blocks``: all, transformer (the main layers), refiners, noise_refiner or context_refiner; the final layer has a LoRA
  with all only
* ``train_block_indices``: which of the main layers have one: all, none, or a list such as 0-5,8
* ``split_qkv=true``: a LoRA of its own for each of q, k and v, whose rows are 2304, 768 and 768 of one layer. Files hold them as
  one LoRA of three times the rank, which acts as strongly everywhere
* ``exclude_patterns``, ``include_patterns``: regexes on whole module paths (``layers.0.attention.qkv``; the text encoder's are
  like ``layers.0.self_attn.q_proj``). Excluded modules get no LoRA; included ones get it although they are excluded, by the user
  or by the arguments above
* ``network_reg_dims=regex=rank, regex=rank``, ``network_reg_lrs=regex=lr, ...``: the first match counts and wins over all ranks
  above; rank 0 leaves out, learning rate 0 leaves untrained
* ``rank_dropout``, ``module_dropout``: chances in [0, 1)
* ``loraplus_lr_ratio``, ``loraplus_unet_lr_ratio``, ``loraplus_text_encoder_lr_ratio``: learning rate of lora_up over lora_down
* ``verbose=true``: log a table of all modules with their ranks, alphas, learning rates and parameters
* ``conv_dim``, ``conv_alpha``: taken, but nothing uses them: the model has no convolutions

How patterns are written (in quotes when they contain commas): networks/arguments.py. Names in a file are lora_unet_ and lora_te_
with the module's path, dots as underscores, as ComfyUI reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.arguments import parse_arguments
from networks.block_indices import check_indices, other_blocks
from networks.lumina_arguments import EMBEDDERS, TRAINED, LuminaArguments
from networks.lumina_layouts import qkv_split
from networks.network import LoRANetwork, build_network, build_network_from_weights
from networks.selection import COMPILED, ModelRules

__all__ = ["create_network", "create_network_from_weights"]

BLOCKS = r"(?:layers|noise_refiner|context_refiner)\.\d+"
CANDIDATES = rf"(?:module\.)?((?:{BLOCKS}|t_embedder|cap_embedder|final_layer)\..+|x_embedder)"
EMBEDDER = rf"(?:{'|'.join(EMBEDDERS)})(?:\..*)?"
PREFIXES = DENOISER_PREFIX, TEXT_PREFIX = "lora_unet", "lora_te"  # of names in a file
TEXT_ENCODER = ModelRules(
    prefix=TEXT_PREFIX,
    label="textencoder",
    candidates=r"(?:.*\.)?(layers\.\d+\.(?:self_attn|mlp)\..+)",  # whatever wraps the decoder
)

TextEncoders = nn.Module | Sequence[nn.Module | None] | None


def denoiser_rules(arguments: LuminaArguments) -> ModelRules:
    trained = "|".join(TRAINED[arguments.train_blocks])
    embedders = () if arguments.embedder_dims else (EMBEDDER,)
    return ModelRules(
        prefix=DENOISER_PREFIX,
        label="unet",
        candidates=CANDIDATES,
        excludes=(rf"(?!{trained}|{EMBEDDER}$).*", *embedders, *other_blocks("layers", arguments.train_block_indices)),
        ranks=arguments.part_ranks,
        parts_of=qkv_rows,
    )


def create_network(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: TextEncoders,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A new network for these models; without text encoders, for the denoiser alone. Raises NetworkError, with all problems."""
    arguments = parse_arguments(LuminaArguments, kwargs)
    if unet is not None:
        check_indices("train_block_indices", arguments.train_block_indices, blocks=layers_of(unet))
    models = _models(text_encoders, unet, arguments)
    return build_network(
        models, arguments, multiplier=multiplier, rank=network_dim, alpha=network_alpha, neuron_dropout=neuron_dropout
    )


def create_network_from_weights(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    file: str | Path,
    vae: nn.Module | None,
    text_encoders: TextEncoders,
    unet: nn.Module | None,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network with the modules (embedders too), ranks and alphas of a LoRA file, and the file's tensors.

    ``for_inference`` changes nothing here: one class serves both. Raises NetworkError for a file of another architecture.
    """
    arguments = parse_arguments(LuminaArguments, kwargs)
    models = _models(text_encoders, unet, arguments)
    given = {rules.prefix for _, rules in models}
    absent = tuple(f"{prefix}_" for prefix in PREFIXES if prefix not in given)
    return build_network_from_weights(models, arguments, multiplier=multiplier, file=file, weights_sd=weights_sd, absent=absent)


def _models(
    text_encoders: TextEncoders, unet: nn.Module | None, arguments: LuminaArguments
) -> list[tuple[nn.Module, ModelRules]]:
    encoders = [text_encoders] if isinstance(text_encoders, nn.Module) else list(text_encoders or ())
    models = [(encoder, TEXT_ENCODER) for encoder in encoders if encoder is not None]
    return models if unet is None else [*models, (unet, denoiser_rules(arguments))]


def layers_of(unet: nn.Module) -> int:
    """How many main layers the denoiser has."""
    paths = [path.replace(COMPILED, "") for path, _ in unet.named_modules()]
    return sum(re.fullmatch(r"(?:module\.)?layers\.\d+", path) is not None for path in paths)


def qkv_rows(path: str, layer: nn.Module) -> tuple[int, ...]:
    """Rows of q, k and v in the fused layer."""
    if not path.endswith(".attention.qkv") or not isinstance(layer, nn.Linear):
        return ()
    return qkv_split(layer.out_features, layer.in_features)
