from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import NetworkError
from library.nn.fp8 import Fp8Linear, in_dtype, keep_unquantised, quantise, quantised, use_fp8
from networks.layer import Dropouts, LoRAModule, kept


def with_lora(layer: nn.Module, *, trained: bool = True, **given) -> LoRAModule:
    torch.manual_seed(1)
    lora = LoRAModule("lora_unet_x", layer.requires_grad_(False), **{"lora_dim": 4, "alpha": 2.0, "multiplier": 0.7, **given})
    if trained:
        nn.init.normal_(lora.lora_up.weight, std=0.3)
    lora.apply_to()
    return lora


def naive(lora: LoRAModule, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    pair = F.linear(F.linear(x, lora.lora_down.weight), lora.lora_up.weight)
    return F.linear(x, layer.weight, layer.bias) + pair * lora.multiplier * (lora.alpha.to(x.dtype) / lora.lora_dim)


def gradients(output: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * weight).sum(), of))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (2, 3, 4, 12)])
def test_fused_equals_the_formula_in_float64(shape, bias):
    layer = nn.Linear(12, 20, bias=bias).double()
    lora = with_lora(layer).double()
    assert lora.fused
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, lora.lora_down.weight, lora.lora_up.weight]
    ours, reference = layer(x), naive(lora, layer, x)
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)
    for one, other in zip(gradients(ours, wanted), gradients(reference, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradcheck_with_a_dropout_mask(monkeypatch):
    layer = nn.Linear(5, 6).double()
    lora = with_lora(layer, lora_dim=3, dropouts=Dropouts(neuron=0.3, rank=0.3)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = lora.dropout_mask((2, 3, 3), x.device)
    monkeypatch.setattr(lora, "dropout_mask", lambda *_: mask)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, lora.lora_down.weight, lora.lora_up.weight))


def test_non_contiguous_input_and_gradient():
    layer = nn.Linear(12, 20).double()
    lora = with_lora(layer).double()
    x = torch.randn(2, 12, 5, dtype=torch.float64).transpose(1, 2).requires_grad_()
    (one,) = torch.autograd.grad(layer(x).transpose(0, 2).exp().sum(), [x])
    (other,) = torch.autograd.grad(naive(lora, layer, x).transpose(0, 2).exp().sum(), [x])
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 9), nn.Conv2d(6, 9, 3, padding=1), nn.Conv2d(6, 9, 1)], ids=["linear", "3x3", "1x1"]
)
def test_a_new_lora_changes_nothing(layer):
    x = torch.randn(2, 6, 6, 6)
    before = layer(x)
    with_lora(layer, trained=False)
    assert torch.equal(layer(x), before)


def test_only_the_pair_is_trained():
    lora = with_lora(nn.Linear(6, 9))
    assert [name for name, _ in lora.named_parameters()] == ["lora_down.weight", "lora_up.weight"]
    assert list(lora.state_dict()) == ["alpha", "lora_down.weight", "lora_up.weight"]
    assert lora.alpha.shape == () and lora.alpha.dtype == torch.float32


def test_input_without_gradient_still_trains_the_pair():
    layer = nn.Linear(6, 9)
    lora = with_lora(layer)
    layer(torch.randn(3, 6)).sum().backward()
    assert lora.lora_down.weight.grad.abs().sum() > 0 and lora.lora_up.weight.grad.is_contiguous()
    assert layer.weight.grad is None


def test_frozen_pair_gets_no_gradient_but_passes_it_on():
    layer = nn.Linear(6, 9)
    lora = with_lora(layer).requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    merged = layer.weight + lora.scale * lora.multiplier * lora.lora_up.weight @ lora.lora_down.weight
    torch.testing.assert_close(x.grad, merged.sum(0).expand(3, 6))
    assert lora.lora_down.weight.grad is None


@pytest.mark.parametrize("frozen_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(frozen_dtype):
    layer = nn.Linear(64, 48).to(frozen_dtype)
    lora = with_lora(layer)
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    reference = naive(lora, layer.float(), x)
    layer.to(frozen_dtype)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference, rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert x.grad.dtype == lora.lora_down.weight.grad.dtype == lora.lora_up.weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(reference.square().sum(), [lora.lora_down.weight, lora.lora_up.weight])
    for ours, other in zip([lora.lora_down.weight.grad, lora.lora_up.weight.grad], expected, strict=True):
        assert (ours - other).norm() < 0.02 * other.norm()


def test_bfloat16_model_without_autocast():
    layer = nn.Linear(64, 48).bfloat16()
    lora = with_lora(layer)
    out = layer(torch.randn(7, 64, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and lora.lora_up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_dropout(reentrant):
    layer = nn.Linear(6, 9)
    lora = with_lora(layer, dropouts=Dropouts(neuron=0.5, rank=0.2, module=0.2))
    x = torch.randn(2, 4, 6, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        lora.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append((x.grad, lora.lora_down.weight.grad.clone(), lora.lora_up.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(rank=0.5, neuron=0.2, module=0.1)], ids=["plain", "dropout"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend, dropouts):
    torch.compiler.reset()
    block = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6, bias=False))
    loras = [with_lora(layer, dropouts=dropouts) for layer in (block[0], block[2])]
    x = torch.randn(2, 4, 6, requires_grad=True)
    found = []
    for run in (block, torch.compile(block, backend=backend, fullgraph=True)):
        torch.manual_seed(3)
        x.grad = None
        loras[0].zero_grad()
        run(x).square().sum().backward()
        found.append((x.grad, loras[0].lora_down.weight.grad, loras[0].lora_up.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_compiles_under_autocast():
    torch.compiler.reset()
    layer = nn.Linear(6, 9)
    lora = with_lora(layer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(torch.ones(2, 6))
        out = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.ones(2, 6))
    out.float().sum().backward()
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=0)  # compiled, the LoRA's term is rounded before it is added
    assert out.dtype == torch.bfloat16 and lora.lora_up.weight.grad.dtype == torch.float32


def test_weight_is_read_when_needed():
    layer = nn.Linear(6, 9, bias=False, device="meta")
    lora = with_lora(layer)
    assert lora.lora_down.weight.device.type == "cpu"
    layer.weight = nn.Parameter(torch.randn(9, 6), requires_grad=False)
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), naive(lora, layer, x))


def test_two_loras_on_one_layer_add_up():
    layer = nn.Linear(6, 9).double()
    plain = nn.Linear(6, 9).double()
    plain.load_state_dict(layer.state_dict())
    first, second = with_lora(layer).double(), with_lora(layer, alpha=8.0).double()
    assert first.fused and not second.fused
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    expected = naive(first, plain, x) + naive(second, plain, x) - plain(x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(gradients(layer(x), [x]), gradients(expected, [x]))


def test_someone_elses_forward_is_kept():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Doubled(6, 9)
    x = torch.randn(2, 6)
    before = layer(x)
    lora = with_lora(layer)
    pair = x @ lora.lora_down.weight.t() @ lora.lora_up.weight.t()
    torch.testing.assert_close(layer(x), before + pair * lora.scale * lora.multiplier)


def test_multiplier_zero_and_disabled_are_the_frozen_layer():
    layer = nn.Linear(6, 9)
    x = torch.randn(2, 6)
    before = layer(x)
    lora = with_lora(layer)
    assert not torch.equal(layer(x), before)
    lora.enabled = False
    assert torch.equal(layer(x), before)
    lora.enabled, lora.multiplier = True, 0.0
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dropouts", [Dropouts(neuron=0.5), Dropouts(rank=0.5), Dropouts(module=0.5)])
@pytest.mark.parametrize("layer", [nn.Linear(8, 9), nn.Conv2d(8, 9, 3, stride=2)], ids=["linear", "conv"])
def test_dropout_acts_in_training_only(layer, dropouts):
    torch.manual_seed(0)
    layer = type(layer)(8, 9, *([3, 2] if isinstance(layer, nn.Conv2d) else []))
    lora = with_lora(layer, dropouts=dropouts)
    x = torch.randn(4, 8, 8, 8)
    lora.eval()
    quiet = layer(x)
    assert torch.equal(layer(x), quiet)
    lora.train()
    assert len({layer(x).sum().item() for _ in range(16)}) > 1


def test_dropout_masks():
    lora = with_lora(nn.Linear(8, 9), dropouts=Dropouts(rank=0.25))
    mask = lora.dropout_mask((3, 5, 4), torch.device("cpu"))
    assert mask.shape == (3, 1, 4)  # one draw per sample and rank, shared by its tokens
    assert set(mask.flatten().tolist()) <= {0.0, torch.tensor(1 / 0.75).item()}
    conv = with_lora(nn.Conv2d(8, 9, 3), dropouts=Dropouts(rank=0.25))
    assert conv.dropout_mask((3, 4, 6, 6), torch.device("cpu")).shape == (3, 4, 1, 1)
    always = with_lora(nn.Linear(8, 9), dropouts=Dropouts(module=0.999))
    assert always.dropout_mask((3, 4), torch.device("cpu")).item() == 0.0
    draws = kept(torch.rand(200_000), 0.3)
    assert abs(draws.mean() - 1.0) < 0.01


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 9),
        nn.Conv2d(6, 9, 1),
        nn.Conv2d(6, 9, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(6, 9, (3, 1), padding="same"),
    ],
    ids=["linear", "1x1", "3x3", "3x1"],
)
def test_merge_equals_forward(layer):
    layer = layer.double()
    lora = with_lora(layer)
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    expected = layer(x)
    lora.add_to_weight(lora.state_dict())
    lora.enabled = False
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_merge_keeps_the_weights_dtype_and_identity():
    layer = nn.Linear(6, 9).bfloat16()
    lora = with_lora(layer)
    weight, before = layer.weight, layer.weight.float()
    lora.add_to_weight({key: value.half() for key, value in lora.state_dict().items()})
    delta = 0.7 * 0.5 * lora.lora_up.weight.half().float() @ lora.lora_down.weight.half().float()
    assert layer.weight is weight and weight.dtype == torch.bfloat16
    assert torch.equal(weight, (before + delta).bfloat16())


def test_merge_into_a_model_that_is_not_loaded():
    lora = with_lora(nn.Linear(6, 9, device="meta"))
    with pytest.raises(NetworkError, match="not loaded yet"):
        lora.add_to_weight(lora.state_dict())


def test_loaded_alpha_changes_the_strength():
    lora = with_lora(nn.Linear(6, 9))
    lora.load_state_dict({**lora.state_dict(), "alpha": torch.tensor(8.0)})
    assert lora.scale == 2.0
    lora.load_pair({"lora_down.weight": torch.zeros(4, 6), "lora_up.weight": torch.zeros(9, 4)})
    assert lora.scale == 1.0


def test_resuming_with_a_rounded_alpha_keeps_the_strength():
    lora = with_lora(nn.Linear(6, 9), alpha=0.3).bfloat16()
    scale = lora.scale
    lora.load_state_dict(lora.state_dict())
    assert lora.scale == scale != float(lora.alpha) / 4


def test_norm():
    lora = with_lora(nn.Conv2d(6, 9, 3))
    product = lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1)
    torch.testing.assert_close(lora.norm(), (product * lora.scale).norm())


def test_grouped_convolution_is_refused():
    with pytest.raises(NetworkError, match="lora_unet_x.*groups"):
        LoRAModule("lora_unet_x", nn.Conv2d(4, 4, 3, groups=2), lora_dim=2)


# ---------------------------------------------------------------- frozen weights in 8 bits


def in_fp8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Fp8Linear:
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"))
    (layer,) = use_fp8(holder, "0")
    layer.take_weight(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def twin_of(layer: Fp8Linear) -> nn.Linear:
    """The plain Linear of the weights that are stored, in float64."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double()
    twin.weight.data = in_dtype(layer.weight, layer.weight_scale, torch.float64)
    if layer.bias is not None:
        twin.bias.data = layer.bias.double()
    return twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12)])
def test_fused_beside_8_bit_weights_equals_the_formula_in_float64(shape, bias):
    layer = in_fp8(torch.randn(20, 12) * 0.05, torch.randn(20, dtype=torch.float64) if bias else None)
    twin = twin_of(layer)
    lora = with_lora(layer)
    lora.double()
    assert lora.fused
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, lora.lora_down.weight, lora.lora_up.weight]
    ours, reference = layer(x), naive(lora, twin, x)
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)
    for one, other in zip(gradients(ours, wanted), gradients(reference, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_fused_and_formula_agree_beside_8_bit_weights():
    """Two LoRAs on one layer: the second takes the formula, through the first one's forward."""
    layer = in_fp8(torch.randn(20, 12))
    twin = twin_of(layer)
    first, second = with_lora(layer).double(), with_lora(layer, alpha=8.0).double()
    assert first.fused and not second.fused
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    expected = naive(first, twin, x) + naive(second, twin, x) - twin(x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(gradients(layer(x), [x]), gradients(expected, [x]))


def test_8_bit_weights_under_autocast():
    layer = in_fp8(torch.randn(48, 64))
    twin = twin_of(layer).float()
    lora = with_lora(layer)
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    reference = naive(lora, twin, x)
    assert out.dtype == torch.bfloat16 and (out - reference).norm() < 0.01 * reference.norm()
    out.float().square().sum().backward()
    expected = torch.autograd.grad(reference.square().sum(), [lora.lora_down.weight, lora.lora_up.weight])
    for ours, other in zip([lora.lora_down.weight.grad, lora.lora_up.weight.grad], expected, strict=True):
        assert ours.dtype == torch.float32 and (ours - other).norm() < 0.02 * other.norm()


def test_backward_keeps_8_bit_weights_as_they_are():
    layer = in_fp8(torch.randn(64, 48))
    with_lora(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 48, requires_grad=True))
    assert max(t.numel() * t.dtype.itemsize for t in kept) == 64 * 48
    assert sum(t.numel() == 64 * 48 for t in kept) == 1


def test_8_bit_weights_compile_without_graph_breaks():
    torch.compiler.reset()
    layer = in_fp8(torch.randn(9, 6))
    lora = with_lora(layer)
    x = torch.randn(2, 4, 6, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x.grad = None
        lora.zero_grad()
        run(x).square().sum().backward()
        found.append((x.grad, lora.lora_down.weight.grad, lora.lora_up.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_merge_into_8_bit_weights_is_refused_and_before_the_rounding_it_is_not():
    layer = in_fp8(torch.randn(9, 6))
    lora = with_lora(layer)
    with pytest.raises(NetworkError, match="lora_unet_x cannot be merged: .*8 bits already; merge first"):
        lora.add_to_weight(lora.state_dict())
    waiting = nn.Sequential(nn.Linear(6, 9, device="meta"))
    (layer,) = use_fp8(waiting, "0")
    keep_unquantised(waiting)
    layer.take_weight(torch.randn(9, 6))
    before = layer.weight.clone()
    lora = with_lora(layer)
    lora.add_to_weight(lora.state_dict())
    quantise(waiting)
    merged = before + 0.7 * 0.5 * lora.lora_up.weight @ lora.lora_down.weight
    expected = quantised(merged.detach())
    assert torch.equal(layer.weight.float(), expected[0].float()) and torch.equal(layer.weight_scale, expected[1])
