from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.files.open_weights import open_weights
from library.lumina.denoiser import NextDit
from library.lumina.gemma import build_gemma, run_gemma
from library.lumina.gemma_layout import GemmaConfig, gemma_part
from library.lumina.layout import LuminaLayouts, NextDitConfig, nextdit_part
from library.lumina.memory_use import encoder_values, kept_values, memory_use, trained_text_values
from library.nn.memory_use import LiveEncoders
from networks import lora_lumina
from tests.library.anima.test_memory_use import kept_bytes
from tests.library.lumina.tiny_nextdit import TINY

CONFIG = replace(
    TINY, width=192, heads=4, kv_heads=2, head_dim=48, axes_dims=(16, 16, 16), mlp_hidden=768, context_width=64, time_width=16
)
GEMMA = GemmaConfig(width=256, heads=4, key_heads=2, head_dim=64, mlp_hidden=768, vocabulary=64)


def of_denoiser(config: NextDitConfig, lengths: tuple[int, ...], latent_hw: tuple[int, int]) -> int:
    denoiser = NextDit(config).to(torch.bfloat16).requires_grad_(False)
    network = lora_lumina.create_network(1.0, 4, 4, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    images = len(lengths)
    states = torch.randn(images, max(lengths), config.context_width, dtype=torch.bfloat16)
    inputs = torch.randn(images, 16, *latent_hw), torch.rand(images), states, lengths
    return kept_bytes(lambda: denoiser(*inputs), (*denoiser.parameters(), *network.parameters()))


@pytest.mark.parametrize("lengths", [(60,), (60, 60), (60, 30)])
def test_what_a_block_keeps_is_what_is_said(lengths):
    latent_hw = (32, 48)
    tokens = sum(lengths) + len(lengths) * 16 * 24
    two, three = (of_denoiser(replace(CONFIG, blocks=blocks), lengths, latent_hw) for blocks in (2, 3))
    assert (three - two) / 2 == pytest.approx(kept_values(CONFIG, tokens), rel=0.06)


def of_text_encoder(config: GemmaConfig, tokens: int) -> int:
    model = build_gemma(config).to(torch.bfloat16).requires_grad_(False)
    model = model.to_empty(device="cpu") if any(weight.is_meta for weight in model.parameters()) else model
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    network = lora_lumina.create_network(1.0, 4, 4, None, [model], None)
    network.apply_to([model], None, True, False)
    ids = torch.randint(0, config.vocabulary, (1, tokens))
    return kept_bytes(lambda: run_gemma(model, ids), (*model.parameters(), *network.parameters()))


def test_what_a_trained_text_encoder_keeps_is_what_is_said():
    three, four = (replace(GEMMA, blocks=blocks) for blocks in (3, 4))
    of_one_layer = of_text_encoder(four, 200) - of_text_encoder(three, 200)
    told = [trained_text_values(config, 200, 1)["encoder_kept"] for config in (three, four)]
    assert of_one_layer / 2 == pytest.approx(told[1] - told[0], rel=0.06)


def test_all_blocks_and_the_encoders_in_use_count(tiny_lumina):
    text = gemma_part(open_weights(tiny_lumina["gemma2"], flag="--gemma2"))
    dit = nextdit_part(open_weights(tiny_lumina["dit"], flag="--pretrained_model_name_or_path"), prefix="")
    layouts = LuminaLayouts(denoiser=dit, text=text)
    use = memory_use(layouts, (64, 96), 2, LiveEncoders(text=True, text_is_trained=True))
    config = dit.config
    assert len(use.kept) == len(use.carried) == config.blocks + config.context_refiners + config.noise_refiners
    assert use.carried[-1] == 2 * (256 + 4 * 6) * config.width and use.kept[-1] == kept_values(config, 2 * (256 + 4 * 6))
    model = build_gemma(text.config)
    assert use.encoders == sum(weight.numel() for weight in model.parameters()) and use.encoder_kept > use.encoder_carried > 0
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert sum(encoder_values(layouts, LiveEncoders(text=True, text_in_fp8=True))) == use.encoders - linears // 2
    assert sum(encoder_values(layouts, LiveEncoders())) == 0
