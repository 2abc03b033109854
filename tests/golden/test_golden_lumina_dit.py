"""Lumina's Next-DiT against the recorded numbers of golden/lumina."""

from __future__ import annotations

import pytest
import torch

from golden_files import Golden, load_golden, relative_error
from library.lumina.checkpoint import build_denoiser
from library.lumina.denoiser import NextDit
from library.lumina.layout import IGNORED, config_from_shapes
from library.nn.loading import load_into

TOLERANCE, GRADIENT_TOLERANCE = 3e-5, 3e-4


def golden_denoiser(golden: Golden) -> NextDit:
    weights = {name: tensor for name, tensor in golden.weights.items() if name not in IGNORED}
    config = config_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, {})
    denoiser = build_denoiser(config)
    load_into(denoiser, weights.items(), device="cpu", dtype=torch.float32)
    return denoiser


@pytest.fixture(scope="module")
def forward() -> Golden:
    return load_golden("lumina/dit_forward.safetensors")


def test_sizes_are_read_off_the_shapes(forward):
    about, config = forward.about["config"], golden_denoiser(forward).config
    assert (config.heads, config.kv_heads, config.head_dim) == (about["n_heads"], about["n_kv_heads"], 24)
    assert list(config.axes_dims) == about["axes_dims"] and list(config.axes_lens) == about["axes_lens"]
    assert (config.norm_eps, config.qk_norm_eps) == (about["norm_eps"], about["qk_norm_eps"])


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("case", ["case0_8x8", "case1_12x6"])
def test_forward_and_gradients(forward, case, packs):
    denoiser = golden_denoiser(forward)
    denoiser.packs = packs
    inputs = {name.removeprefix(f"{case}/"): t for name, t in forward.inputs.items() if name.startswith(f"{case}/")}
    gradients = {n.split("/grad/")[1]: t for n, t in forward.outputs.items() if n.startswith(f"{case}/grad/")}
    for name in gradients:
        denoiser.get_parameter(name).requires_grad_()

    lengths = inputs["cap_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    velocity = denoiser(inputs["x"], inputs["t"], inputs["cap_feats"], lengths)
    loss = (velocity * inputs["loss_weight"]).mean()
    loss.backward()

    assert relative_error(velocity.detach(), forward.outputs[f"{case}/velocity"]) < TOLERANCE
    assert relative_error(loss.detach(), forward.outputs[f"{case}/loss"][0]) < TOLERANCE
    assert gradients
    for name, expected in gradients.items():
        assert relative_error(denoiser.get_parameter(name).grad, expected) < GRADIENT_TOLERANCE, name
