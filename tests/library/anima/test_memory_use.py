from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch

from library.anima.architecture import AnimaLayouts
from library.anima.denoiser import AnimaDenoiser
from library.anima.memory_use import CAPTION_TOKENS, LiveEncoders, encoder_values, kept_values, trained_text_values
from library.anima.text import build_qwen3
from library.anima.text_layout import TextEncoderConfig, read_text_encoder_layout
from networks import lora_anima
from tests.library.anima.tiny_dit import TINY

CONFIG = replace(TINY, width=192, heads=3, head_dim=64, mlp_hidden=768, context_dim=64, adaln_dim=16, adapter=None)


def of_denoiser(blocks: int, latent_hw: tuple[int, int]) -> int:
    denoiser = AnimaDenoiser(replace(CONFIG, blocks=blocks)).to(torch.bfloat16).requires_grad_(False)
    network = lora_anima.create_network(1.0, 4, 4, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    inputs = torch.randn(1, 16, *latent_hw), torch.tensor([0.5]), torch.randn(1, 8, 64, dtype=torch.bfloat16)
    return kept_bytes(lambda: denoiser(*inputs), (*denoiser.parameters(), *network.parameters()))


def of_text_encoder(config: TextEncoderConfig, tokens: int) -> int:
    encoder = build_qwen3(config).to_empty(device="cpu").to(torch.bfloat16).requires_grad_(False)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    network = lora_anima.create_network(1.0, 4, 4, None, [encoder], None)
    network.apply_to([encoder], None, True, False)
    ids = torch.randint(0, config.vocabulary, (1, tokens))
    return kept_bytes(lambda: encoder(input_ids=ids, use_cache=False), (*encoder.parameters(), *network.parameters()))


def kept_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """What autograd really keeps of a forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.Tensor] = {}  # by place in memory; holding the tensors keeps places apart

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("latent_hw", [(64, 64), (48, 96)])
def test_what_a_block_keeps_is_what_is_said(latent_hw):
    tokens = latent_hw[0] * latent_hw[1] // 4
    of_one_block = of_denoiser(3, latent_hw) - of_denoiser(2, latent_hw)
    assert of_one_block / 2 == pytest.approx(kept_values(CONFIG, tokens), rel=0.06)


def test_what_a_trained_text_encoder_keeps_is_what_is_said():
    sizes = TextEncoderConfig(width=256, heads=8, key_heads=4, head_dim=64, mlp_hidden=768, vocabulary=64)
    two, three = (replace(sizes, blocks=blocks) for blocks in (2, 3))
    of_one_layer = of_text_encoder(three, CAPTION_TOKENS) - of_text_encoder(two, CAPTION_TOKENS)
    told = [trained_text_values(config, 1)["encoder_kept"] for config in (two, three)]
    assert of_one_layer / 2 == pytest.approx(told[1] - told[0], rel=0.06)


def test_weights_of_the_encoders_in_use(tiny_anima):
    layout = read_text_encoder_layout(tiny_anima["qwen3"])
    layouts = AnimaLayouts(text=layout)
    encoder = build_qwen3(layout.config)
    everything = sum(p.numel() for p in encoder.parameters())
    linears = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    assert sum(encoder_values(layouts, LiveEncoders())) == 0
    assert sum(encoder_values(layouts, LiveEncoders(text=True))) == everything
    assert sum(encoder_values(layouts, LiveEncoders(text=True, text_in_fp8=True))) == everything - linears // 2
