"""Anima with weights in 8 bits: which layers, how they load, how far off they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.anima.architecture import ANIMA
from library.anima.checkpoint import build_denoiser, denoiser_tensors, load_denoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.layout import DenoiserConfig, expected_shapes, read_denoiser_layout
from library.anima.text import build_text_encoder, load_text_encoder
from library.anima.text_layout import TextEncoderConfig, read_text_encoder_layout
from library.anima.tokenizers import TokenizerFiles
from library.errors import CheckpointError
from library.nn.fp8 import FP8, fp8_layers, in_dtype, use_fp8
from library.nn.loading import load_into
from library.options.anima import AnimaOptions, AnimaTrainOptions
from library.options.memory import BlockMemoryOptions
from library.options.models import ModelOptions
from networks.lora_anima import create_network
from tests.golden.golden_files import relative_error
from tests.library.anima.tiny_dit import TINY, batch, save_tiny, tiny_denoiser, tiny_weights
from tests.library.anima.tiny_qwen import TINY_QWEN, save_tiny_qwen

PER_BLOCK = 10  # four of each attention, two of the MLP


def fp8_denoiser(dtype: torch.dtype = torch.float32):
    denoiser = build_denoiser(TINY)
    use_fp8(denoiser, DENOISER_FP8_LAYERS)
    load_into(denoiser, tiny_weights().items(), device="cpu", dtype=dtype)
    return denoiser


def test_attention_and_mlp_are_chosen_and_nothing_else():
    denoiser = build_denoiser(TINY)
    paths = {layer.path for layer in use_fp8(denoiser, DENOISER_FP8_LAYERS)}
    assert len(paths) == PER_BLOCK * TINY.blocks
    assert {path.split(".", 2)[2] for path in paths} == {
        *(f"{part}.{name}_proj" for part in ("self_attn", "cross_attn") for name in ("q", "k", "v", "output")),
        "mlp.layer1",
        "mlp.layer2",
    }


def test_the_published_model_takes_little_more_than_half():
    """No weight is made: by the shapes alone."""
    denoiser = build_denoiser(DenoiserConfig())
    chosen = {layer.path for layer in use_fp8(denoiser, DENOISER_FP8_LAYERS)}
    sizes = {name: tensor.numel() for name, tensor in denoiser.named_parameters()}
    assert sizes.keys() == expected_shapes(DenoiserConfig()).keys()
    small = sum(size for name, size in sizes.items() if name.removesuffix(".weight") in chosen)
    everything = sum(sizes.values())
    assert 0.57 < (2 * everything - small) / (2 * everything) < 0.60


def test_a_checkpoint_streams_into_8_bits(tmp_path):
    """Peak: one tensor in the model's dtype, since each is rounded before the next is read."""
    layout = read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors"))
    denoiser = build_denoiser(layout.config)
    chosen = use_fp8(denoiser, DENOISER_FP8_LAYERS)
    names = list(denoiser.state_dict())

    def watched():
        for name, tensor in denoiser_tensors(layout):
            assert all(layer.weight.is_meta or layer.weight.dtype == FP8 for layer in chosen)
            yield name, tensor

    load_into(denoiser, watched(), device="cpu", dtype=torch.bfloat16)
    assert list(denoiser.state_dict()) == names
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16, FP8}
    assert denoiser.dtype == torch.bfloat16


def test_a_float8_checkpoint_loses_nothing_more(tmp_path):
    changes = {name.replace(".", "__"): tensor.to(FP8) for name, tensor in tiny_weights().items()}
    layout = read_denoiser_layout(save_tiny(tmp_path / "dit.safetensors", **changes))
    plain, rounded = build_denoiser(layout.config), build_denoiser(layout.config)
    use_fp8(rounded, DENOISER_FP8_LAYERS)
    for denoiser in (plain, rounded):
        load_denoiser(denoiser, layout, device="cpu", dtype=torch.bfloat16)
    for layer in fp8_layers(rounded):
        weight = plain.get_submodule(layer.path).weight
        assert torch.equal(in_dtype(layer.weight, layer.weight_scale, torch.bfloat16), weight)
    assert torch.equal(plain(*batch()), rounded(*batch()))


def test_output_and_lora_gradients_are_near_those_of_full_weights():
    found = []
    for denoiser in (tiny_denoiser(), fp8_denoiser()):
        torch.manual_seed(0)
        network = create_network(1.0, 4, 4.0, None, None, denoiser)
        network.apply_to(None, denoiser, False, True)
        for lora in network.unet_loras:
            torch.nn.init.normal_(lora.lora_up.weight, std=0.02)
        out = denoiser(*batch())
        out.square().mean().backward()
        found.append((out.detach(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])))
    (exact, exact_gradient), (ours, gradient) = found
    assert 0 < relative_error(ours, exact) < 0.06
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99


@pytest.mark.parametrize("key", ["blocks.0.mlp.layer1.scale_weight", "blocks.0.mlp.layer1.weight_scale", "scaled_fp8"])
def test_float8_with_scales_in_the_file_is_told(tmp_path, key):
    path = save_tiny(tmp_path / "dit.safetensors", **{key.replace(".", "__"): torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"float8 with scales of their own \(1 of them, such as {key}\).*bfloat16"):
        read_denoiser_layout(path)
    path = save_tiny_qwen(tmp_path / "qwen.safetensors", **{"model__layers__0__mlp__up_proj__scale_weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"float8 with scales of their own \(1 of them.*bfloat16"):
        read_text_encoder_layout(path)


# ---------------------------------------------------------------- text encoder


def qwen(path, *, fp8: bool, dtype: torch.dtype = torch.float32):
    layout = read_text_encoder_layout(path)
    encoder = build_text_encoder(layout, TokenizerFiles(), fp8=fp8)
    load_text_encoder(encoder, layout, dtype=dtype)
    return encoder


@pytest.fixture(scope="module")
def qwen_file(tmp_path_factory):
    return save_tiny_qwen(tmp_path_factory.mktemp("qwen") / "qwen3.safetensors")


def test_text_encoder_keeps_embedding_and_norms(qwen_file):
    encoder = qwen(qwen_file, fp8=True, dtype=torch.bfloat16)
    by_dtype = {dtype: [n for n, p in encoder.model.named_parameters() if p.dtype == dtype] for dtype in (FP8, torch.bfloat16)}
    assert len(by_dtype[FP8]) == 7 * TINY_QWEN.blocks and all("_proj" in name for name in by_dtype[FP8])
    assert all("norm" in name or "embed" in name for name in by_dtype[torch.bfloat16])
    states, exact = (qwen(qwen_file, fp8=fp8).encode(["a cat"]).prompt_embeds.detach() for fp8 in (True, False))
    assert 0 < relative_error(states, exact) < 0.2  # so narrow a model averages little away


def test_a_lora_on_the_text_encoder_gets_its_gradients_through_8_bit_layers(qwen_file):
    found = []
    for fp8 in (False, True):
        encoder = qwen(qwen_file, fp8=fp8)
        torch.manual_seed(0)
        network = create_network(1.0, 4, 4.0, None, [encoder.model], tiny_denoiser())
        network.apply_to([encoder.model], None, True, False)
        for lora in network.text_encoder_loras:
            torch.nn.init.normal_(lora.lora_up.weight, std=0.02)
        assert all(lora.fused for lora in network.text_encoder_loras)
        encoder.encode(["a watercolor painting of a cat"]).prompt_embeds.square().sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_the_published_text_encoder_keeps_only_its_embedding_wide():
    from library.anima.text import build_qwen3
    from library.nn.decoder_layers import DECODER_FP8_LAYERS

    model = build_qwen3(TextEncoderConfig(blocks=2))
    assert len(use_fp8(model, DECODER_FP8_LAYERS)) == 14
    assert {type(m).__name__ for m in model.modules() if getattr(m, "weight", None) is not None} == {
        "Fp8Linear", "Embedding", "Qwen3RMSNorm",
    }  # fmt: skip


# ---------------------------------------------------------------- caches


def test_texts_that_were_encoded_in_8_bits_are_cached_apart(tiny_anima):
    options = AnimaTrainOptions(
        model=ModelOptions(pretrained_model_name_or_path=str(tiny_anima["dit"]), vae=str(tiny_anima["vae"])),
        anima=AnimaOptions(qwen3=str(tiny_anima["qwen3"])),
    )
    layouts = ANIMA.read_layouts(options)

    def recipe(**memory: bool):
        return ANIMA.text_recipe(layouts, replace(options, memory=BlockMemoryOptions(**memory)))

    assert recipe(fp8_base=True) != recipe()
    assert recipe(fp8_base_unet=True) == recipe()
