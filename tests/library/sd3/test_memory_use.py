from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from library.files.open_weights import open_weights
from library.nn.memory_use import LiveEncoders
from library.sd3.architecture import SD3
from library.sd3.denoiser import Mmdit
from library.sd3.layout import MmditConfig
from library.sd3.memory_use import T5Use, kept_values, memory_use, t5_layer_values, weights_in_use
from library.sd3.t5 import build_t5
from library.sd3.t5_layout import T5Config
from networks import lora_sd3
from tests.library.anima.test_memory_use import kept_bytes
from tests.library.sd3.test_architecture import options_for
from tests.library.sd3.tiny_mmdit import TINY

CONFIG = replace(TINY, width=256, heads=4, mlp_hidden=1024, position_side=32, context_width=64, pooled_width=32, dual_blocks=())
KINDS = {
    "medium": lambda blocks: replace(CONFIG, blocks=blocks, qk_norm=False),
    "5-medium": lambda blocks: replace(CONFIG, blocks=blocks, dual_blocks=tuple(range(blocks - 1))),
    "5-large": lambda blocks: replace(CONFIG, blocks=blocks),
}
CONTEXT = 120


def of_denoiser(config: MmditConfig, latent_hw: tuple[int, int], images: int) -> int:
    denoiser = Mmdit(config).to(torch.bfloat16).requires_grad_(False)
    network = lora_sd3.create_network(1.0, 4, 4, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    context, pooled = torch.randn(images, CONTEXT, config.context_width), torch.randn(images, config.pooled_width)
    inputs = torch.randn(images, 16, *latent_hw), torch.full((images,), 500.0), context, pooled
    return kept_bytes(lambda: denoiser(*inputs), (*denoiser.parameters(), *denoiser.buffers(), *network.parameters()))


@pytest.mark.parametrize(("latent_hw", "images"), [((32, 32), 1), ((24, 48), 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_keeps_is_what_is_said(kind, latent_hw, images):
    three, four = KINDS[kind](3), KINDS[kind](4)
    of_one_block = of_denoiser(four, latent_hw, images) - of_denoiser(three, latent_hw, images)
    told = kept_values(four, 0, context=images * CONTEXT, image=images * latent_hw[0] * latent_hw[1] // 4)
    assert of_one_block / 2 == pytest.approx(told, rel=0.06)


def of_t5(config: T5Config, tokens: int) -> int:
    model = build_t5(config).to_empty(device="cpu").to(torch.bfloat16).requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    denoiser = Mmdit(TINY)
    network = lora_sd3.create_network(1.0, 4, 4, None, [None, None, model], denoiser, train_t5xxl="true")
    network.apply_to([None, None, model], denoiser, True, False)
    ids = torch.randint(0, config.vocabulary, (1, tokens))
    return kept_bytes(lambda: model(ids), (*model.parameters(), *network.parameters()))


def test_what_a_trained_t5_keeps_is_what_is_said():
    two = T5Config(width=256, layers=2, heads=4, head_dim=64, mlp_width=512, vocabulary=64)
    of_one_layer = of_t5(replace(two, layers=3), 200) - of_t5(two, 200)
    assert of_one_layer / 2 == pytest.approx(t5_layer_values(two, 200), rel=0.06)


def test_weights_of_the_encoders_in_use(tiny_sd3):
    layouts = SD3.read_layouts(options_for(tiny_sd3["sd3_whole"]))
    t5 = build_t5(layouts.text.t5.config)
    of_t5 = sum(p.numel() for p in t5.parameters())
    rounded = sum(m.weight.numel() for m in t5.modules() if isinstance(m, nn.Linear))
    in_use = {name: sum(weights_in_use(layouts, LiveEncoders(text=True), T5Use(runs=runs))) for name, runs in (("all", True),
              ("clips", False))}  # fmt: skip
    assert in_use["all"] - in_use["clips"] == of_t5
    stored = {name: shape for name, shape in open_weights(tiny_sd3["sd3_whole"], flag="").shapes.items() if ".clip_" in name}
    assert in_use["clips"] == sum(torch.Size(shape).numel() for shape in stored.values() if shape)
    halved = LiveEncoders(text=True, text_in_fp8=True)
    of_clips = sum(weights_in_use(layouts, halved, T5Use(runs=False)))
    assert sum(weights_in_use(layouts, halved, T5Use())) - of_clips == of_t5 - rounded // 2
    assert not sum(weights_in_use(layouts, LiveEncoders(), T5Use()))
    assert sum(weights_in_use(layouts, LiveEncoders(vae=True), T5Use())) > 0


def test_the_use_of_a_batch(tiny_sd3):
    layouts = SD3.read_layouts(options_for(tiny_sd3["sd35_medium_whole"]))
    use = memory_use(layouts, (256, 128), 2, LiveEncoders())
    assert len(use.kept) == len(use.carried) == 3 and use.kept[0] > use.kept[1] == use.kept[2]  # the first is dual
    assert use.carried[0] == 2 * (128 + 77 + 256) * 128 and use.encoders == use.encoder_kept == 0
    trained = LiveEncoders(text=True, text_is_trained=True)
    clips, all_three = (memory_use(layouts, (256, 128), 2, trained, T5Use(is_trained=trains)) for trains in (False, True))
    config = layouts.text.t5.config
    assert all_three.encoder_kept - clips.encoder_kept == config.layers * t5_layer_values(config, 2 * 256)
    assert all_three.encoder_carried > clips.encoder_carried > 0
