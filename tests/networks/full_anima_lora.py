"""A LoRA on every Anima module that can have one, at tiny sizes: the files of the layout tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import lora_anima
from tests.networks.conftest import anima_linears, qwen_linears, tree_of

METADATA = {"ss_network_module": "networks.lora_anima", "ss_steps": "10", "ss_tag": "ä", "modelspec.title": "t"}


def full_lora(*, blocks: int = 28, adapter_blocks: int = 6, layers: int = 28, alpha: float = 2.0, text_encoder: bool = True):
    """The network, applied, with random weights: with the published numbers of blocks 514 modules of the denoiser and its
    adapter, and 196 of the text encoder."""
    torch.manual_seed(0)
    denoiser = tree_of(anima_linears(blocks=blocks, width=8, text_width=4, adapter_blocks=adapter_blocks))
    encoder = tree_of(qwen_linears(layers=layers, width=8)) if text_encoder else None
    network = lora_anima.create_network(1.0, 4, alpha, None, encoder, denoiser, train_llm_adapter="true", include_patterns=".*",
                                        network_reg_dims=".*mlp.*=3")  # fmt: skip
    network.apply_to(encoder, denoiser, True, True)
    randomize(network)
    return network


def randomize(network: nn.Module) -> None:
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight)


def full_tensors(**sizes) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in full_lora(**sizes).state_dict().items()}
