from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import CheckpointError
from library.nn.fp8 import (
    FP8,
    Fp8Linear,
    fp8_layers,
    fp8_product,
    frozen_product,
    in_dtype,
    keep_unquantised,
    quantise,
    quantised,
    use_fp8,
)
from library.nn.fp8_speed import CLEARLY_FASTER, choose_fp8_products, gain, why_not
from library.nn.loading import load_into


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 4, bias=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.second(F.silu(self.first(x))))


def small_in_fp8(layers: str = "first|second") -> Small:
    with torch.device("meta"):
        model = Small()
    use_fp8(model, layers)
    return model


def fp8_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Fp8Linear:
    out_features, in_features = weight.shape
    holder = nn.Sequential(nn.Linear(in_features, out_features, bias=bias is not None, device="meta"))
    (layer,) = use_fp8(holder, "0")
    layer.take_weight(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-30, 1e-5, 0.02, 1.0, 700.0, 6e4])
def test_every_value_stays_within_a_sixteenth(dtype, size):
    torch.manual_seed(0)
    weight = (torch.randn(64, 48) * size).clamp(-6e4, 6e4).to(dtype)
    weight8, scale = quantised(weight)
    assert weight8.dtype == FP8 and scale.shape == (64, 1) and scale.dtype == torch.float32
    back, weight = in_dtype(weight8, scale, torch.float64), weight.double()
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((back - weight).abs() <= torch.maximum(weight.abs() * 2**-4, largest * 2**-17)).all())


def test_scales_are_powers_of_two_that_use_the_whole_range():
    weight8, scale = quantised(torch.randn(512, 16) * torch.logspace(-20, 20, 512)[:, None])
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    largest = weight8.float().abs().amax(1)
    assert bool((largest >= 224).all() and (largest <= 448).all())


@pytest.mark.parametrize("largest", [448.0, 448.00003, 447.99997, 3.5, 2.0**-140])
def test_the_largest_value_never_overflows(largest):
    weight8, scale = quantised(torch.tensor([[largest, -largest / 3]]))
    back = in_dtype(weight8, scale, torch.float32)
    assert bool(back.isfinite().all()) and back[0, 0] == pytest.approx(largest, rel=2**-4)


def test_rows_of_zeros():
    weight8, scale = quantised(torch.zeros(2, 3))
    assert scale.tolist() == [[1.0], [1.0]] and not weight8.float().any()


def test_what_was_float8_already_stays_bit_by_bit():
    stored = (torch.randn(32, 64) * 0.03).to(FP8)
    weight8, scale = quantised(stored.bfloat16())
    assert torch.equal(in_dtype(weight8, scale, torch.bfloat16), stored.bfloat16())
    again, same_scale = quantised(in_dtype(weight8, scale, torch.bfloat16))
    assert torch.equal(again.view(torch.uint8), weight8.view(torch.uint8)) and torch.equal(scale, same_scale)


def test_the_whole_range_of_the_format_stays_bit_by_bit():
    stored = torch.arange(256, dtype=torch.uint8).view(FP8)
    stored = stored[stored.float().isfinite()][None]  # 448 is among them, and so is the smallest
    weight8, scale = quantised(stored.bfloat16())
    assert scale.item() == 1 and torch.equal(weight8.float(), stored.float())


def test_bfloat16_holds_exactly_what_is_stored():
    weight8, scale = quantised(torch.randn(32, 64) * torch.logspace(-6, 3, 32)[:, None])
    assert torch.equal(in_dtype(weight8, scale, torch.bfloat16).double(), in_dtype(weight8, scale, torch.float64))


def test_channels_of_their_own_scale_beat_a_plain_cast():
    """Weights as small as a DiT's lie among float8's subnormal numbers when they are cast as they are."""
    weight = torch.randn(256, 256) * 0.01
    scaled = (in_dtype(*quantised(weight), torch.float32) - weight).norm() / weight.norm()
    cast = (weight.to(FP8).float() - weight).norm() / weight.norm()
    assert 0.02 < scaled < 0.03 and cast > 1.5 * scaled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    model = small_in_fp8()
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    weights["second.weight"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"second\.weight has values that are not finite"):
        load_into(model, weights.items(), device="cpu", dtype=torch.bfloat16)


# ---------------------------------------------------------------- a model's layers


def test_chosen_linears_change_in_place_and_names_stay():
    with torch.device("meta"):
        model = Small()
    names, first = list(model.state_dict()), model.first
    chosen = use_fp8(model, "first|second|embed")
    assert chosen == [model.first, model.second] == list(fp8_layers(model)) and model.first is first
    assert list(model.state_dict()) == names and isinstance(model.first, nn.Linear) and type(model.head) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == names


def test_weights_are_loaded_in_8_bits():
    model = small_in_fp8()
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    load_into(model, weights.items(), device="cpu", dtype=torch.bfloat16)
    assert model.first.weight.dtype == model.second.weight.dtype == FP8
    assert isinstance(model.first.weight, nn.Parameter) and not model.first.weight.requires_grad
    assert model.first.weight_scale.shape == (12, 1) and model.first.weight_scale.dtype == torch.float32
    assert model.first.bias.dtype == model.head.weight.dtype == model.embed.weight.dtype == torch.bfloat16
    assert list(model.state_dict()) == list(weights)
    x = torch.randn(7, 8)
    plain = Small()
    plain.load_state_dict(weights)
    ours, exact = model(x.bfloat16()).float(), plain(x)
    assert 0 < (ours - exact).norm() < 0.08 * exact.norm()


def test_a_model_moves_with_its_scales():
    model = small_in_fp8()
    load_into(model, {n: torch.randn(t.shape) for n, t in model.state_dict().items()}.items(), device="cpu", dtype=torch.float32)
    assert model.to("meta").first.weight_scale.is_meta


def test_waiting_weights_are_rounded_once():
    model = small_in_fp8()
    keep_unquantised(model)
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    load_into(model, weights.items(), device="cpu", dtype=torch.bfloat16)
    assert model.first.weight.dtype == torch.bfloat16 and model.first.weight_scale is None
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(model.first(x), F.linear(x, model.first.weight, model.first.bias))
    with torch.no_grad():
        model.first.weight.add_(0.25)
    expected = quantised(model.first.weight)
    quantise(model)
    assert torch.equal(model.first.weight.float(), expected[0].float()) and torch.equal(model.first.weight_scale, expected[1])
    before = model.first.weight
    quantise(model)  # again: nothing waits
    assert model.first.weight is before and not any(layer.waits for layer in fp8_layers(model))


def test_values_that_a_merge_has_spoiled_are_refused():
    model = small_in_fp8()
    keep_unquantised(model)
    load_into(model, {n: torch.randn(t.shape) for n, t in model.state_dict().items()}.items(), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model.first.weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"first\.weight.*merged into it"):
        quantise(model)


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12)])
def test_equals_a_linear_of_the_dequantised_weight(shape, bias):
    torch.manual_seed(0)
    layer = fp8_linear(torch.randn(20, 12) * 0.1, torch.randn(20, dtype=torch.float64) if bias else None)
    weight = in_dtype(layer.weight, layer.weight_scale, torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), F.linear(x, weight, layer.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    gradient = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(out, [x], gradient)[0] for out in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_backward_keeps_the_8_bit_weight_and_nothing_else():
    layer = fp8_linear(torch.randn(64, 48))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 5, 48, requires_grad=True))
    assert sorted(t.dtype.itemsize * t.numel() for t in kept) == [64 * 4, 64 * 48]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype):
    layer = fp8_linear(torch.randn(20, 12), torch.randn(20))
    x = torch.randn(3, 12, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    weight = in_dtype(layer.weight, layer.weight_scale, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.linear(x.bfloat16(), weight, layer.bias.bfloat16()))
    out.sum().backward()
    assert x.grad.dtype == x_dtype


def test_float16_does_not_overflow_where_the_result_fits():
    """Sums of the stored values, up to 448 each, pass 65504; those of the weights do not."""
    layer = fp8_linear(torch.full((4, 4096), 0.01))
    out = layer(torch.ones(2, 4096, dtype=torch.float16))
    torch.testing.assert_close(out, torch.full((2, 4), 40.96, dtype=torch.float16), rtol=2**-4, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    layer = fp8_linear(torch.randn(20, 12))
    x = torch.randn(3, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), [x])
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_the_weight_is_read_when_it_is_needed():
    """Block swapping puts other bytes behind the same parameter."""
    layer = fp8_linear(torch.randn(20, 12))
    moved = layer.weight.detach().clone()
    x = torch.randn(3, 12, requires_grad=True)
    expected = layer(x)
    layer.weight.data = torch.zeros_like(moved.view(torch.uint8)).view(FP8)
    assert not layer(x).any()
    layer.weight.data = moved
    assert torch.equal(layer(x), expected) and not layer.weight.requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend):
    torch.compiler.reset()
    model = nn.Sequential(fp8_linear(torch.randn(20, 12), torch.randn(20)), nn.SiLU(), fp8_linear(torch.randn(12, 20)))
    x = torch.randn(3, 12, requires_grad=True)
    found = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        x.grad = None
        out = run(x)
        out.square().sum().backward()
        found.append((out, x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- the product in 8 bits


def has_scaled_mm() -> bool:
    try:
        fp8_product(torch.ones(16, 16, dtype=torch.bfloat16), *quantised(torch.ones(16, 16)), None)
    except (RuntimeError, AttributeError):
        return False
    return True


@pytest.mark.skipif(not has_scaled_mm(), reason="this torch cannot multiply float8 on the CPU")
@pytest.mark.parametrize("bias", [True, False])
def test_fast_product(bias):
    torch.manual_seed(0)
    rows = torch.randn(48, 64, dtype=torch.bfloat16) * torch.logspace(-6, 3, 48)[:, None].bfloat16()
    rows[3] = 0
    weight8, scale = quantised(torch.randn(32, 64) * torch.logspace(-3, 1, 32)[:, None])
    add = torch.randn(32, dtype=torch.bfloat16) if bias else None
    fast = frozen_product(rows, weight8, scale, add, fast=True)
    exact = frozen_product(rows, weight8, scale, add, fast=False)
    assert fast.dtype == torch.bfloat16
    # each factor of each summand is within 2^-4; bfloat16 rounds the sum
    bound = 2**-4 * (rows.float().abs() @ in_dtype(weight8, scale, torch.float32).abs().t()) + 2**-7 * exact.float().abs()
    assert bool(((fast - exact).float().abs() <= bound + (0.0 if add is None else 2**-7 * add.float().abs())).all())


@pytest.mark.skipif(not has_scaled_mm(), reason="this torch cannot multiply float8 on the CPU")
def test_fast_layer_has_the_gradient_of_the_dequantised_weight():
    layer = fp8_linear(torch.randn(32, 64))
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), [x])
    slow = layer(x)
    layer.fast = True
    fast = layer(x)
    assert not torch.equal(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast.sum(), [x])[0], expected, rtol=0, atol=0)


def test_without_a_gpu_layers_dequantise():
    model = small_in_fp8()
    line = choose_fp8_products(model, torch.device("cpu"), dtype=torch.bfloat16)
    assert line == "dequantised for their products (products in 8 bits need an NVIDIA GPU)"
    assert not any(layer.fast for layer in fp8_layers(model))


def test_what_is_clearly_faster_is_chosen_shape_by_shape(monkeypatch):
    speeds = {(12, 8): CLEARLY_FASTER, (4, 12): CLEARLY_FASTER - 0.01}
    monkeypatch.setattr("library.nn.fp8_speed.why_not", lambda device, dtype: None)
    monkeypatch.setattr("library.nn.fp8_speed.gain", lambda shape, device, **_: speeds[shape])
    model = small_in_fp8()
    line = choose_fp8_products(model, torch.device("cuda"), dtype=torch.bfloat16)
    assert (model.first.fast, model.second.fast) == (True, False)
    assert line == "1 of them multiply in 8 bits (speed against dequantising: 12x8: 1.15x, 4x12: 1.14x)"


@pytest.mark.parametrize(
    ("others", "expected", "told"),
    [
        ((None, {(12, 8): 3.0, (4, 12): 1.0}), (True, False), "12x8: 2.00x, 4x12: 1.00x"),
        (("this needs a newer GPU",), (False, False), "this needs a newer GPU"),
    ],
)
def test_processes_that_train_together_multiply_alike(monkeypatch, others, expected, told):
    """``others``: what the second process answers to what the first one asks."""
    monkeypatch.setattr("library.nn.fp8_speed.why_not", lambda device, dtype: None)
    monkeypatch.setattr("library.nn.fp8_speed.gain", lambda shape, device, **_: 2.0)
    answers = iter(others)
    model = small_in_fp8()
    line = choose_fp8_products(model, torch.device("cuda"), dtype=torch.bfloat16, gather=lambda own: [own, next(answers)])
    assert (model.first.fast, model.second.fast) == expected and told in line


@pytest.mark.parametrize(
    ("product", "clock", "found"),
    [
        ("right", {False: 3.0, True: 2.0}, 1.5),
        ("wrong", {False: 3.0, True: 2.0}, 0.0),
        ("not a number", {False: 3.0, True: 2.0}, 0.0),
        ("impossible", {False: 3.0, True: 2.0}, 0.0),
    ],
)
def test_a_product_is_tried_before_it_is_timed(monkeypatch, product, clock, found):
    def stand_in(rows, weight, scale, bias, *, fast):
        if fast and product == "impossible":
            raise RuntimeError("no such kernel")
        exact = rows.float() @ in_dtype(weight, scale, torch.float32).t()
        factor = {"right": 1.02, "wrong": 1.2, "not a number": float("nan")}.get(product, 1.0)
        stand_in.last = fast
        return exact * factor if fast else exact

    def stand_in_clock(work, device):
        work()
        return clock[stand_in.last]

    monkeypatch.setattr("library.nn.fp8_speed.frozen_product", stand_in)
    monkeypatch.setattr("library.nn.fp8_speed.seconds", stand_in_clock)
    assert gain((32, 16), torch.device("cpu"), dtype=torch.bfloat16, tokens=8) == found
    assert gain((32, 24), torch.device("cpu"), dtype=torch.bfloat16, tokens=8) == 0.0  # 24 is no multiple of 16


def test_only_bfloat16_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "bfloat16" in why_not(torch.device("cuda"), torch.float16)
    assert "8.9" in why_not(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert why_not(torch.device("cuda"), torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_choice_is_measured_and_the_numbers_fit():
    device = torch.device("cuda")
    holder = nn.Sequential(nn.Linear(256, 512, bias=False, device="meta"))
    (layer,) = use_fp8(holder, "0")
    layer.take_weight(torch.randn(512, 256, device=device, dtype=torch.bfloat16))
    choose_fp8_products(holder, device, dtype=torch.bfloat16, tokens=1024)
    x = torch.randn(64, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach() @ in_dtype(layer.weight, layer.weight_scale, torch.bfloat16).t()
    out = layer(x)
    assert (out - exact).norm() < 0.05 * exact.norm()
    out.sum().backward()
    expected = torch.ones_like(out) @ in_dtype(layer.weight, layer.weight_scale, torch.bfloat16)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)
