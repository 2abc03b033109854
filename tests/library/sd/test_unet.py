"""The U-Net's own way through diffusers' modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from library.errors import CheckpointError, OptionError
from library.files.weights_source import Part
from library.memory.activation_offload import OffloadingRunner
from library.nn.attention import use_attention
from library.nn.attention_kernels import COMPUTE, AttentionKernel, attend
from library.nn.compiling import compile_blocks
from library.nn.fp8 import FP8, fp8_layers, use_fp8
from library.options.memory import MemoryOptions
from library.sd.denoiser import build_unet, load_unet
from library.sd.fp8_layers import UNET_FP8_LAYERS
from library.sd.unet import StableDiffusionUNet, diffusers_config
from library.sd.unet_layout import unet_part
from library.sd.unet_names import expected_shapes
from library.training.models.model_memory import arrange_denoiser, denoiser_place
from tests.library.sd.tiny_unets import SD1, SDXL, MemorySource, add_loras, batch, settings, step, tiny_unet

CPU = torch.device("cpu")
SAVERS = [{"gradient_checkpointing": True}, {"cpu_offload_checkpointing": True}]
both = pytest.mark.parametrize("config", [SD1, SDXL])


def close(ours, theirs, tolerance=1e-5):
    return all((one - other).norm() <= tolerance * other.norm() for one, other in zip(ours, theirs, strict=True))


@both
def test_names_and_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**diffusers_config(config))
    ours = build_unet(config)
    found = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()} == expected_shapes(config)
    assert all(weight.is_meta and not weight.requires_grad for weight in ours.parameters())
    kinds = {name: type(module).__name__ for name, module in theirs.named_modules() if type(module).__name__ == "ResnetBlock2D"}
    assert kinds == {name: type(module).__name__ for name, module in ours.named_modules() if name in kinds}


@both
@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 11), (6, 10)])
def test_prediction_is_that_of_diffusers_at_any_size(config, height, width):
    """Gradients too; diffusers' SDXL takes the pooled text and six sizes, so there our vector begins with what it makes of these."""
    unet = tiny_unet(config)
    theirs = UNet2DConditionModel(**diffusers_config(config)).requires_grad_(False).eval()
    theirs.load_state_dict(unet.state_dict())
    latents, timesteps, context, vector = batch(config, height=height, width=width)
    added = None
    if vector is not None:
        theirs.add_time_proj, added = nn.Identity(), {"text_embeds": vector[:, :14], "time_ids": vector[:, 14:]}
    first, second = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    ours = unet.predict(first, timesteps, context, vector)
    expected = theirs(second, timesteps, context, added_cond_kwargs=added).sample
    assert ours.shape == latents.shape
    assert close(
        [ours, *torch.autograd.grad(ours.square().sum(), first)],
        [expected, *torch.autograd.grad(expected.square().sum(), second)],
    )


@both
def test_weights_are_loaded_in_their_place_and_format(config):
    weights = tiny_unet(config, seed=5).state_dict()
    part = unet_part(MemorySource(weights, config=settings(config)), prefix="", layout="diffusers")
    unet = build_unet(part.config)
    load_unet(unet, part, device="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in unet.state_dict().items())
    prediction = unet.predict(*batch(config))
    assert prediction.dtype == torch.float32 and prediction.isfinite().all()
    cut = Part(source=part.source, config=config, pieces=dict(list(part.pieces.items())[1:]))
    with pytest.raises(CheckpointError, match="1 missing: conv_in"):
        load_unet(build_unet(config), cut, device="cpu", dtype=torch.float32)


def test_projections_as_matrices_and_as_convolutions_give_the_same():
    weights = tiny_unet(SD1).state_dict()
    flat = {name: tensor.flatten(1) if "proj_" in name and tensor.dim() == 4 else tensor for name, tensor in weights.items()}
    part = unet_part(MemorySource(flat, config=settings(SD1)), prefix="", layout="diffusers")
    assert part.config == SD1
    unet = build_unet(SD1)
    load_unet(unet, part, device="cpu", dtype=torch.float32)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    assert isinstance(unet.mid_block.attentions[0].proj_in, nn.Conv2d)


def test_nothing_is_drawn_in_training_mode():
    unet = tiny_unet(SDXL)
    assert not [module for module in unet.modules() if isinstance(module, nn.Dropout)]
    evaluated = unet.eval().predict(*batch(SDXL))
    assert torch.equal(unet.train().predict(*batch(SDXL)), evaluated)


def test_a_vector_is_asked_for_where_the_model_takes_one():
    latents, timesteps, context, _ = batch(SDXL)
    with pytest.raises(AssertionError, match="vector of 20"):
        tiny_unet(SDXL).predict(latents, timesteps, context)


# ---------------------------------------------------------------- blocks, and how they run


@both
def test_blocks_are_called_in_their_order(config):
    unet, calls = tiny_unet(config), []

    def run(number, block, x, *inputs):
        calls.append((number, block))
        return block(x, *inputs)

    unet.run_block = run
    unet.predict(*batch(config))
    assert [number for number, _ in calls] == list(range(config.blocks))
    assert all(called is block for (_, called), block in zip(calls, unet.blocks, strict=True))


@both
@pytest.mark.parametrize("memory", SAVERS)
def test_every_saver_gives_the_same_bits(config, memory):
    plain, saving = tiny_unet(config), tiny_unet(config)
    networks = add_loras(plain, convolutions=True), add_loras(saving, convolutions=True)
    arrange_denoiser(SimpleNamespace(memory=MemoryOptions(**memory)), saving, CPU)
    assert isinstance(saving.run_block, OffloadingRunner) == ("cpu_offload_checkpointing" in memory)
    assert denoiser_place(SimpleNamespace(memory=MemoryOptions(**memory)), saving, CPU) is CPU
    expected = step(plain, networks[0], batch(config))
    assert all(torch.equal(one, other) for one, other in zip(step(saving, networks[1], batch(config)), expected, strict=True))
    with torch.no_grad():
        assert torch.equal(saving.predict(*batch(config)), expected[0])


# ---------------------------------------------------------------- attention


@both
@pytest.mark.parametrize("split", [False, True])
def test_attention_is_computed_by_the_chosen_kernel(config, split, monkeypatch):
    calls = []

    def noted(q, k, v):
        calls.append(tuple(q.shape))
        return attend(q, k, v)

    monkeypatch.setitem(COMPUTE, "torch", noted)
    unet = tiny_unet(config)
    loras = add_loras(unet)
    expected = step(unet, loras, batch(config))
    plain_calls = len(calls)
    use_attention(unet, AttentionKernel("torch", split=split), device=CPU, dtype=torch.float32, trains=True)
    calls.clear()
    assert close(step(unet, loras, batch(config)), expected)
    transformer_blocks = sum(len(getattr(module, "transformer_blocks", ())) for module in unet.modules())
    assert plain_calls == 2 * transformer_blocks
    assert len(calls) == (2 if split else 1) * plain_calls
    assert {shape[2:] for shape in calls} <= {
        (heads, width // heads) for heads, width in zip(config.heads, config.widths, strict=True)
    }


def test_a_package_is_tried_with_the_widest_heads():
    with pytest.raises(OptionError, match="needs a CUDA GPU"):
        use_attention(tiny_unet(SD1), AttentionKernel("xformers"), device=CPU, dtype=torch.float32, trains=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_a_step_waits_for_nothing_on_a_gpu(config):
    unet = tiny_unet(config).cuda()
    loras = add_loras(unet).cuda()
    inputs = tuple(None if tensor is None else tensor.cuda() for tensor in batch(config))
    step(unet, loras, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(unet, loras, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- 8 bits


@pytest.mark.parametrize(("config", "bound"), [(SD1, 0.1), (SDXL, 0.1)])
def test_weights_in_8_bits_move_little(config, bound):
    """Random weights move more than trained ones: each is off by up to 2^-4 of itself, 2 % on average."""
    weights = tiny_unet(config).state_dict()
    part = unet_part(MemorySource(weights, config=settings(config)), prefix="", layout="diffusers")
    unet = build_unet(config)
    use_fp8(unet, UNET_FP8_LAYERS)
    load_unet(unet, part, device="cpu", dtype=torch.float32)
    blocks = [block for block in unet.blocks if hasattr(block, "attn1")]
    assert len(list(fp8_layers(unet))) == 10 * len(blocks)
    assert all(layer.weight.dtype == FP8 for layer in fp8_layers(unet))
    assert all(
        FP8 not in {weight.dtype for name, weight in unet.named_parameters() if "transformer_blocks" not in name} for _ in (0,)
    )
    exact = tiny_unet(config).predict(*batch(config))
    rounded = unet.predict(*batch(config))
    assert 0 < (rounded - exact).norm() < bound * exact.norm()
    loras = add_loras(unet)
    assert all(gradient.isfinite().all() for gradient in step(unet, loras, batch(config)))


# ---------------------------------------------------------------- compiled


class Counting:
    graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.fixture
def fresh_compiler():
    with torch._dynamo.config.patch(cache_size_limit=8, accumulated_cache_size_limit=256):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def blocks_of_a_kind(unet: StableDiffusionUNet) -> int:
    """Blocks that differ in the shapes of their weights."""
    return len({(type(block), *(tuple(weight.shape) for weight in block.parameters())) for block in unet.blocks})


@pytest.mark.slow  # several graphs
@both
def test_a_graph_for_each_width_serves_all_sizes(config, fresh_compiler):
    plain, compiled, backend = tiny_unet(config), tiny_unet(config), Counting()
    networks = add_loras(plain), add_loras(compiled)
    compile_blocks(compiled, backend, fullgraph=True)
    for height, width in ((8, 12), (12, 8), (9, 11), (16, 16)):
        inputs = batch(config, size=3, height=height, width=width)
        assert close(step(compiled, networks[1], inputs), step(plain, networks[0], inputs), 1e-3)
    assert backend.graphs <= blocks_of_a_kind(compiled) + 2  # before the first LoRA there are no gradients
    counted = backend.graphs
    arrange_denoiser(SimpleNamespace(memory=MemoryOptions(gradient_checkpointing=True)), compiled, CPU)
    assert close(step(compiled, networks[1], inputs), step(plain, networks[0], inputs), 1e-3)
    assert backend.graphs == counted


def test_layers_are_not_found_twice_by_networks_that_look_for_names_and_classes():
    """lycoris.kohya takes layers named time_embedding.linear_1, and all in classes called TimestepEmbedding."""
    unet = build_unet(SDXL)
    assert not [path for path, module in unet.named_modules() if type(module).__name__ == "TimestepEmbedding"]
    assert isinstance(unet.time_embedding, TimestepEmbedding)
