"""Frozen weights in 8 bits: how far results move, and what the weights then take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.layout import AdapterConfig, DenoiserConfig
from library.anima.text import build_qwen3
from library.anima.text_layout import TextEncoderConfig
from library.nn.decoder_layers import DECODER_FP8_LAYERS
from library.nn.fp8 import FP8, fp8_layers, in_dtype, quantised, use_fp8
from library.nn.loading import load_into
from networks import lora_anima
from tools.bench_parts.figures import Figure, alternate, stopwatch
from tools.bench_parts.lora import WIDE, make_inputs

ADAPTER_LAYERS = r"llm_adapter\.blocks\.\d+\.((self|cross)_attn\.(q|k|v|o)_proj|mlp\.[02])"
ADAPTER = AdapterConfig(vocabulary=512, width=512, source_width=512, blocks=4, heads=8, head_dim=64, mlp_hidden=2048)
TINY = DenoiserConfig(width=64, blocks=2, heads=2, head_dim=32, mlp_hidden=256, adaln_dim=16, context_dim=32, adapter=None)
QWEN = TextEncoderConfig(width=512, blocks=8, heads=8, key_heads=4, head_dim=64, mlp_hidden=1536, vocabulary=512)
SPREADS = (0.03, 0.01)  # of random weights: of a layer's usual start at width 1024, and of smaller ones
LAYER_ERROR, MODEL_ERROR, LEAST_COSINE, WEIGHTS_RATIO = 0.03, 0.06, 0.99, 0.6  # targets


def measure(repeats: int, *, config: DenoiserConfig = WIDE, side: int = 64) -> list[Figure]:
    """Random weights, bfloat16 everywhere. ``side``: latent rows and columns; 64 are 1024 image tokens."""
    return [
        *layer_errors(),
        *model_figures("tiny", TINY, side=16),
        *model_figures(f"width {config.width}", config, side=side),
        *adapter_figures(),
        text_figure(),
        size_figure(),
        speed(repeats),
    ]


# ---------------------------------------------------------------- single layers


def layer_errors(shape: tuple[int, int] = (2048, 1024)) -> Iterator[Figure]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, shape[1], generator=generator)
    for spread in SPREADS:
        weight = torch.randn(shape, generator=generator) * spread
        cases = {"per channel": in_dtype(*quantised(weight), torch.float32), "plain cast": weight.to(FP8).float()}
        for name, rounded in cases.items():
            error = off(F.linear(x, rounded), F.linear(x, weight))
            yield Figure(name=f"fp8 layer of spread {spread}, {name}: error", value=error, unit="of the output",
                         at_most=LAYER_ERROR if name == "per channel" else None,
                         how=f"normal random weights, {shape[0]} x {shape[1]}")  # fmt: skip


def off(ours: Tensor, exact: Tensor) -> float:
    """Relative error, by norms."""
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


# ---------------------------------------------------------------- whole models


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one training step: the denoiser's output, the loss, and the LoRA's gradient as one vector."""

    output: Tensor
    loss: float
    gradient: Tensor


def model_figures(name: str, config: DenoiserConfig, *, side: int) -> Iterator[Figure]:
    """fp8 and a plain cast of the same layers, against the same model in bfloat16."""
    weights = random_weights(build_denoiser(config))
    inputs = make_inputs(config, side)
    exact = one_step(loaded(build_denoiser(config), weights), inputs)
    ours = one_step(loaded(build_denoiser(config), weights, layers=DENOISER_FP8_LAYERS), inputs)
    cast = one_step(loaded(build_denoiser(config), with_plain_cast(weights, config)), inputs)
    for kind, found, target in (("per channel", ours, True), ("plain cast", cast, False)):
        cosine = float(F.cosine_similarity(found.gradient, exact.gradient, dim=0))
        how = f"against bfloat16; loss {found.loss / exact.loss - 1:+.2%}"
        yield Figure(name=f"fp8 DiT, {name}, {kind}: error", value=off(found.output, exact.output), unit="of the output",
                     at_most=MODEL_ERROR if target else None, how=how)  # fmt: skip
        yield Figure(name=f"fp8 DiT, {name}, {kind}: LoRA gradient", value=cosine, unit="cosine",
                     at_least=LEAST_COSINE if target else None, how="with that of bfloat16")  # fmt: skip


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Matrices that keep the size of what passes through, norms about 1; bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        weights[name] = (1 + 0.1 * values if tensor.dim() == 1 else values / tensor.shape[-1] ** 0.5).bfloat16()
    return weights


def loaded(model: Any, weights: dict[str, Tensor], *, layers: str = "") -> Any:
    if layers:
        use_fp8(model, layers)
    load_into(model, weights.items(), device="cpu", dtype=torch.bfloat16)
    return model


def with_plain_cast(weights: dict[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    chosen = {f"{layer.path}.weight" for layer in use_fp8(build_denoiser(config), DENOISER_FP8_LAYERS)}
    return {name: tensor.to(FP8) if name in chosen else tensor for name, tensor in weights.items()}


def one_step(denoiser: AnimaDenoiser, inputs: tuple[Tensor, Tensor, Tensor], *, rank: int = 16) -> Outcome:
    """Forward and backward with a LoRA that is on its way: the same one for every model."""
    torch.manual_seed(1)
    network = lora_anima.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    for lora in network.unet_loras:
        nn.init.normal_(lora.lora_up.weight, std=0.01)
    latents, sigmas, context = inputs
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    output = denoiser(latents.bfloat16(), sigmas, context.bfloat16()).float()
    loss = F.mse_loss(output, target)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
    return Outcome(output.detach(), loss.item(), gradient)


def adapter_figures(tokens: int = 48) -> Iterator[Figure]:
    """What the adapter's blocks would cost in 8 bits, which they are not kept in."""
    config = DenoiserConfig(
        width=64, blocks=1, heads=2, head_dim=32, mlp_hidden=64, adaln_dim=8, context_dim=512, adapter=ADAPTER
    )
    weights = random_weights(build_denoiser(config))
    states = torch.randn(2, tokens, ADAPTER.source_width, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.arange(2 * tokens).reshape(2, tokens)
    with torch.no_grad():
        exact, ours = (
            loaded(build_denoiser(config), weights, layers=layers).encode_context(states, None, ids, None)[:, :tokens]
            for layers in ("", ADAPTER_LAYERS)
        )
    how = f"{ADAPTER.blocks} blocks of width {ADAPTER.width}; they stay in bfloat16"
    yield Figure(name="fp8 adapter would be: error", value=off(ours, exact), unit="of the context", how=how)


def text_figure(tokens: int = 64) -> Figure:
    weights = random_weights(build_qwen3(QWEN))
    ids = torch.randint(0, QWEN.vocabulary, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, ours = (
            loaded(build_qwen3(QWEN), weights, layers=layers).eval()(input_ids=ids, use_cache=False).last_hidden_state
            for layers in ("", DECODER_FP8_LAYERS)
        )
    how = f"{QWEN.blocks} layers of width {QWEN.width}, against bfloat16"
    return Figure(name="fp8 text encoder: error", value=off(ours, exact), unit="of the states", how=how)


# ---------------------------------------------------------------- size and speed


def size_figure() -> Figure:
    """Of the published model, by its shapes."""
    denoiser = build_denoiser(DenoiserConfig())
    use_fp8(denoiser, DENOISER_FP8_LAYERS)
    values = sum(parameter.numel() for parameter in denoiser.parameters())
    small = sum(layer.weight.numel() for layer in fp8_layers(denoiser))
    rows = sum(layer.out_features for layer in fp8_layers(denoiser))
    nbytes = 2 * (values - small) + small + 4 * rows  # a float32 scale for each row
    how = f"published sizes with the adapter: {nbytes / 2**30:.3g} of {2 * values / 2**30:.3g} GiB"
    return Figure(name="fp8 DiT / bfloat16: weights", value=nbytes / (2 * values), unit="x", at_most=WEIGHTS_RATIO, how=how)


def speed(repeats: int, *, side: int = 1024, rows: int = 512) -> Figure:
    """On the CPU there is no product in 8 bits, and none is meant to be fast."""
    weight = torch.randn(side, side).bfloat16()
    weight8, scale = quantised(weight)
    x = torch.randn(rows, side).bfloat16()
    pairs = alternate(stopwatch(lambda: x @ in_dtype(weight8, scale, x.dtype).t()), stopwatch(lambda: x @ weight.t()),
                      repeats=repeats)  # fmt: skip
    how = pairs.described("dequantise and multiply", "multiply")
    return Figure(name=f"fp8 product of {rows} rows / bfloat16, CPU", value=pairs.ratio, unit="x", how=how)
