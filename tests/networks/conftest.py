"""Module trees with the names of the real models: what the selection goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

Linears = Mapping[str, tuple[int, int]]  # dotted path -> (outputs, inputs)


def tree_of(linears: Linears, *, device: str = "cpu") -> nn.Module:
    """Nested modules with a Linear at each path, registered in the given order."""
    root = nn.Module()
    for path, (outputs, inputs) in linears.items():
        *parents, last = path.split(".")
        place = root
        for name in parents:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, nn.Linear(inputs, outputs, bias=False, device=device).requires_grad_(False))
    return root


def anima_linears(*, blocks: int, width: int, text_width: int, adapter_blocks: int) -> dict[str, tuple[int, int]]:
    """Every Linear of an Anima denoiser file."""
    w, t = width, text_width
    linears = {"x_embedder.proj.1": (w, 68), "t_embedder.1.linear_1": (w, w), "t_embedder.1.linear_2": (3 * w, w)}
    for n in range(blocks):
        block = f"blocks.{n}."
        for part in ("self_attn", "cross_attn", "mlp"):
            linears |= {f"{block}adaln_modulation_{part}.1": (8, w), f"{block}adaln_modulation_{part}.2": (3 * w, 8)}
        linears |= {f"{block}self_attn.{name}_proj": (w, w) for name in ("q", "k", "v", "output")}
        linears |= {f"{block}cross_attn.{name}_proj": (w, t if name in "kv" else w) for name in ("q", "k", "v", "output")}
        linears |= {f"{block}mlp.layer1": (4 * w, w), f"{block}mlp.layer2": (w, 4 * w)}
    linears |= {
        "final_layer.linear": (64, w),
        "final_layer.adaln_modulation.1": (8, w),
        "final_layer.adaln_modulation.2": (2 * w, 8),
    }
    for n in range(adapter_blocks):
        block = f"llm_adapter.blocks.{n}."
        linears |= {f"{block}{part}.{name}_proj": (t, t) for part in ("self_attn", "cross_attn") for name in "qkvo"}
        linears |= {f"{block}mlp.0": (4 * t, t), f"{block}mlp.2": (t, 4 * t)}
    return linears | {"llm_adapter.out_proj": (t, t)}


def qwen_linears(*, layers: int, width: int) -> dict[str, tuple[int, int]]:
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return {f"model.layers.{n}.{name}": (width, width) for n in range(layers) for name in names} | {"lm_head": (32, width)}


@pytest.fixture
def make_tree() -> Callable[..., nn.Module]:
    return tree_of


@pytest.fixture
def tiny_denoiser() -> nn.Module:
    """Two blocks of width 16, adapter width 8, float32 on the CPU."""
    torch.manual_seed(0)
    return tree_of(anima_linears(blocks=2, width=16, text_width=8, adapter_blocks=1))


@pytest.fixture
def published_denoiser() -> nn.Module:
    """The published sizes, without memory for them."""
    return tree_of(anima_linears(blocks=28, width=2048, text_width=1024, adapter_blocks=6), device="meta")


@pytest.fixture
def published_text_encoder() -> nn.Module:
    return tree_of(qwen_linears(layers=28, width=1024), device="meta")


@pytest.fixture
def tiny_text_encoder() -> nn.Module:
    return tree_of(qwen_linears(layers=1, width=16))
