"""LoRA for Anima: the denoiser's attention and MLP layers, on request its LLM adapter, and the Qwen3 text encoder.

    --network_module=networks.lora_anima --network_dim=16 --network_args "exclude_patterns=.*mlp.*" "rank_dropout=0.1"

Arguments, given as ``key=value`` with --network_args:

* ``train_llm_adapter=true``: also the Linears in the LLM adapter's blocks
* ``exclude_patterns``, ``include_patterns``: regexes on whole module paths (``blocks.0.self_attn.q_proj``; those of the text
  encoder begin with ``layers.``). Excluded modules get no LoRA; included ones get it although they are excluded, by the user or
  by default: modulation, norms, embedders and the final layer
* ``network_reg_dims=regex=rank, regex=rank``, ``network_reg_lrs=regex=lr, ...``: the first match counts; rank 0 leaves out,
  learning rate 0 leaves untrained
* ``rank_dropout``, ``module_dropout``: chances in [0, 1)
* ``loraplus_lr_ratio``, ``loraplus_unet_lr_ratio``, ``loraplus_text_encoder_lr_ratio``: learning rate of lora_up over lora_down
* ``verbose=true``: log a table of all modules with their ranks, alphas, learning rates and parameters

Flags of the trainer that arrive here as well: ``--self_attn_lr``, ``--cross_attn_lr``, ``--mlp_lr``, ``--mod_lr`` and
``--llm_adapter_lr``, learning rates of the denoiser's parts. 0 leaves a part without a LoRA; ``--mod_lr`` and
``--llm_adapter_lr`` above 0 let in the modulation layers and the LLM adapter, which otherwise have none.

How patterns are written (in quotes when they contain commas): networks/arguments.py. Names in a file are lora_unet_ and lora_te_
with the module's path, dots as underscores, as ComfyUI reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.anima_arguments import COMPONENT_RATES, AnimaArguments
from networks.arguments import parse_arguments
from networks.network import LoRANetwork, build_network, build_network_from_weights
from networks.selection import ModelRules

__all__ = ["COMPONENT_RATES", "create_network", "create_network_from_weights"]

DENOISER_PARTS = r"blocks\.\d+|x_embedder|t_embedder|final_layer"
ADAPTER_PARTS = r"llm_adapter\.blocks\.\d+"  # never its embedding or output projection
DENOISER_EXCLUDES = (r".*(_modulation|_norm|_embedder|final_layer).*",)
COMPONENTS = (
    ("llm_adapter", r"llm_adapter\..*"),
    ("self_attn", r"blocks\.\d+\.self_attn\..*"),
    ("cross_attn", r"blocks\.\d+\.cross_attn\..*"),
    ("mlp", r"blocks\.\d+\.mlp\..*"),
    ("mod", r"blocks\.\d+\.[^.]*modulation.*"),
)
PREFIXES = DENOISER_PREFIX, TEXT_PREFIX = "lora_unet", "lora_te"  # of names in a file
TEXT_ENCODER = ModelRules(
    prefix=TEXT_PREFIX,
    label="textencoder 1",
    candidates=r"(?:.*\.)?(layers\.\d+\..+)",  # whatever wraps the decoder: a causal-LM head, our own encoder class
    excludes=DENOISER_EXCLUDES,
)


def denoiser_rules(*, with_adapter: bool) -> ModelRules:
    parts = f"{DENOISER_PARTS}|{ADAPTER_PARTS}" if with_adapter else DENOISER_PARTS
    return ModelRules(prefix=DENOISER_PREFIX, label="unet", candidates=rf"(?:module\.)?((?:{parts})\..+)",
                      excludes=DENOISER_EXCLUDES, components=COMPONENTS)  # fmt: skip


def create_network(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A new network for these models; without text encoders, for the denoiser alone. Raises NetworkError, with all problems."""
    arguments = parse_arguments(AnimaArguments, kwargs)
    with_adapter = arguments.train_llm_adapter or bool(arguments.llm_adapter_lr)
    models = _models(text_encoders, unet, with_adapter=with_adapter)
    return build_network(
        models, arguments, multiplier=multiplier, rank=network_dim, alpha=network_alpha, neuron_dropout=neuron_dropout
    )


def create_network_from_weights(  # noqa: PLR0913  # the protocol of network modules
    multiplier: float,
    file: str | Path,
    vae: nn.Module | None,
    text_encoders: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module | None,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network with the modules (the adapter's too), ranks and alphas of a LoRA file, and the file's tensors.

    ``for_inference`` changes nothing here: one class serves both. Raises NetworkError for a file of another architecture.
    """
    arguments = parse_arguments(AnimaArguments, kwargs)
    models = _models(text_encoders, unet, with_adapter=True)
    given = {rules.prefix for _, rules in models}
    absent = tuple(f"{prefix}_" for prefix in PREFIXES if prefix not in given)
    return build_network_from_weights(models, arguments, multiplier=multiplier, file=file, weights_sd=weights_sd, absent=absent)


def _models(text_encoders: nn.Module | Sequence[nn.Module] | None, unet: nn.Module | None, *,
            with_adapter: bool) -> list[tuple[nn.Module, ModelRules]]:  # fmt: skip
    encoders = [text_encoders] if isinstance(text_encoders, nn.Module) else list(text_encoders or ())
    models = [(encoder, TEXT_ENCODER) for encoder in encoders if encoder is not None]
    return models if unet is None else [*models, (unet, denoiser_rules(with_adapter=with_adapter))]
