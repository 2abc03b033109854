"""What is said to be kept for the backward pass, against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from library.files.weights_source import Part, Piece
from library.nn.checkpointing import run_checkpointed
from library.sd.clip import ClipTextModel, build_clip
from library.sd.clip_layout import ClipConfig
from library.sd.layout import StableDiffusionLayouts
from library.sd.memory_use import LiveEncoders, encoder_values, memory_use, trained_text_values
from library.sd.unet_names import UNetConfig, expected_shapes
from library.training.models.memory_estimate import activation_bytes
from networks.layer import LoRAModule
from tests.library.sd.tiny_unets import MemorySource, add_loras, batch, settings, tiny_unet

SD1 = UNetConfig(
    widths=(32, 64, 64), depths=(1, 1, 0), middle_depth=1, heads=(2, 4, 4), context_width=8, time_width=16, norm_groups=8
)
SDXL = UNetConfig(widths=(32, 64, 128), depths=(0, 2, 4), middle_depth=4, heads=(1, 2, 4), context_width=8, vector_width=20,
                  time_width=16, norm_groups=8, linear_projections=True)  # fmt: skip


def layouts_of(config: UNetConfig) -> StableDiffusionLayouts:
    source = MemorySource(expected_shapes(config), config=settings(config))
    return StableDiffusionLayouts(denoiser=Part(source=source, config=config, pieces={}))


def kept_bytes(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """What autograd holds on to after a forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.Tensor] = {}  # by place in memory; holding the tensors keeps places apart

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("config", [SD1, SDXL])
@pytest.mark.parametrize("latent_hw", [(32, 32), (24, 40)])
def test_what_is_kept_is_what_is_said(config, latent_hw):
    unet = tiny_unet(config)
    loras = add_loras(unet, rank=1)
    inputs = batch(config, size=1, height=latent_hw[0], width=latent_hw[1], rows=77)
    weights = [*unet.parameters(), *loras.parameters()]
    use = memory_use(layouts_of(config), (latent_hw[1] * 8, latent_hw[0] * 8), 1, LiveEncoders())
    assert 4 * (sum(use.kept) + use.outside) == pytest.approx(kept_bytes(lambda: unet.predict(*inputs), weights), rel=0.1)
    unet.run_block = run_checkpointed
    assert 4 * (sum(use.carried) + use.outside) == pytest.approx(kept_bytes(lambda: unet.predict(*inputs), weights), rel=0.1)


def test_checkpointing_and_offloading_save_what_they_should_of_the_published_sdxl():
    sdxl = UNetConfig(widths=(320, 640, 1280), depths=(0, 2, 10), middle_depth=10, heads=(5, 10, 20), context_width=2048,
                      vector_width=2816, time_width=1280, linear_projections=True)  # fmt: skip
    use = memory_use(layouts_of(sdxl), (1024, 1024), 1, LiveEncoders())
    assert len(use.kept) == len(use.carried) == sdxl.blocks - 3  # nothing is kept before the first transformer
    plain, kept, offloaded = (activation_bytes(use, torch.bfloat16, checkpointing=way) for way in (None, "device", "cpu_async"))
    assert offloaded < kept < plain / 5


def test_a_larger_batch_keeps_so_much_more():
    one, four = (memory_use(layouts_of(SDXL), (256, 192), images, LiveEncoders()) for images in (1, 4))
    assert (sum(four.kept), sum(four.carried), four.outside) == (4 * sum(one.kept), 4 * sum(one.carried), 4 * one.outside)


def text_part(config: ClipConfig) -> tuple[Part[ClipConfig], ClipTextModel]:
    encoder = build_clip(config).to_empty(device="cpu").requires_grad_(False)
    for weight in encoder.parameters():
        nn.init.normal_(weight, std=0.02)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    return Part(source=MemorySource(shapes), config=config, pieces={name: Piece(name) for name in shapes}), encoder


def kept_of_text(layers: int, activation: str) -> tuple[int, int]:
    """What a trained encoder keeps, and what is said of it."""
    part, encoder = text_part(ClipConfig(width=64, layers=layers, heads=4, mlp_width=256, vocabulary=16, activation=activation))
    loras = nn.ModuleList()
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            loras.append(LoRAModule("lora", layer, lora_dim=1))
            loras[-1].apply_to()
    x = torch.randn(2, 77, 64)
    kept = kept_bytes(lambda: encoder.run(x, 0, layers), [*encoder.parameters(), *loras.parameters()])
    return kept, trained_text_values(StableDiffusionLayouts(text=(part,)), 2)["encoder_kept"]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_what_a_trained_text_encoder_keeps_is_what_is_said(activation):
    (two, told_of_two), (three, told_of_three) = kept_of_text(2, activation), kept_of_text(3, activation)
    assert (three - two) / 4 == pytest.approx(told_of_three - told_of_two, rel=0.1)


def test_weights_of_the_encoders_in_use():
    config = ClipConfig(width=64, layers=2, heads=4, mlp_width=256, vocabulary=16)
    part, encoder = text_part(config)
    layouts = StableDiffusionLayouts(text=(part, part))
    everything = 2 * sum(p.numel() for p in encoder.parameters())
    linears = 2 * sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
    assert sum(encoder_values(layouts, LiveEncoders())) == 0
    assert sum(encoder_values(layouts, LiveEncoders(text=True, vae=True))) == everything
    assert sum(encoder_values(layouts, LiveEncoders(text=True, text_in_fp8=True))) == everything - linears // 2
