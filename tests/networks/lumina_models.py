"""Module trees with the names of Lumina Image 2.0's denoiser and of Gemma 2, of published or of tiny sizes."""

from __future__ import annotations

import torch
from torch import nn

from tests.networks.conftest import tree_of

PUBLISHED = {"width": 2304, "kv_width": 768, "hidden": 9216, "time_width": 1024, "layers": 26}
TINY = {"width": 16, "kv_width": 8, "hidden": 24, "time_width": 12, "layers": 2}


def denoiser_linears(*, width: int, kv_width: int, hidden: int, time_width: int, layers: int) -> dict[str, tuple[int, int]]:
    """Every Linear of a denoiser file: path -> (outputs, inputs)."""
    linears = {}
    for blocks, count in (("context_refiner", 2), ("noise_refiner", 2), ("layers", layers)):
        for n in range(count):
            linears |= {
                f"{blocks}.{n}.attention.qkv": (width + 2 * kv_width, width),
                f"{blocks}.{n}.attention.out": (width, width),
                f"{blocks}.{n}.feed_forward.w1": (hidden, width),
                f"{blocks}.{n}.feed_forward.w2": (width, hidden),
                f"{blocks}.{n}.feed_forward.w3": (hidden, width),
            }
            if blocks != "context_refiner":
                linears[f"{blocks}.{n}.adaLN_modulation.1"] = (4 * width, time_width)
    return linears | {
        "x_embedder": (width, 64),
        "t_embedder.mlp.0": (time_width, 256),
        "t_embedder.mlp.2": (time_width, time_width),
        "cap_embedder.1": (width, width),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (width, time_width),
    }


def gemma_linears(*, layers: int, width: int, heads_width: int, kv_width: int, hidden: int) -> dict[str, tuple[int, int]]:
    shapes = {
        "self_attn.q_proj": (heads_width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, heads_width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    return {f"model.layers.{n}.{path}": shape for n in range(layers) for path, shape in shapes.items()}


def denoiser(*, published: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return tree_of(denoiser_linears(**(PUBLISHED if published else TINY)), device="meta" if published else "cpu")


def gemma(*, published: bool = False, layers: int | None = None) -> nn.Module:
    if published:
        sizes = {"width": 2304, "heads_width": 2048, "kv_width": 1024, "hidden": 9216}
        return tree_of(gemma_linears(layers=layers or 26, **sizes), device="meta")
    return tree_of(gemma_linears(layers=layers or 2, width=16, heads_width=16, kv_width=8, hidden=24))


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """So that the network does something, and its strength is seen."""
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.3)
