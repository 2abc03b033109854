"""Fused Linears whose parts, such as q, k and v, have a LoRA each: how they act, and how they are saved and read."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import NetworkError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.nn.fp8 import use_fp8
from networks.arguments import NetworkArguments, argument, parse_bool
from networks.fused_parts import blocks_of, is_split
from networks.layer import Dropouts, LoRAModule, SplitLoRAModule
from networks.network import build_network, build_network_from_weights
from networks.selection import ModelRules

SIZES = (9, 3, 3)  # as in attention where several queries share their keys and values
WIDTH = 12
NAME = "lora_unet_block_qkv"


@dataclass(frozen=True, kw_only=True)
class Arguments(NetworkArguments):
    split_qkv: bool = argument(parse_bool, "", default=False)

    @property
    def splits_fused(self) -> bool:
        return self.split_qkv


RULES = ModelRules(
    prefix="lora_unet",
    label="unet",
    candidates=r"(block\..+)",
    parts_of=lambda path, layer: SIZES if path.endswith("qkv") else (),
)


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    block = nn.ModuleDict({"qkv": nn.Linear(WIDTH, sum(SIZES)), "proj": nn.Linear(WIDTH, WIDTH)})
    return nn.ModuleDict({"block": block}).to(dtype).requires_grad_(False)


def applied(unet: nn.Module, *, trained: bool = True, rank: int = 2, alpha: float = 1.0, multiplier: float = 1.0, **given):
    torch.manual_seed(1)
    arguments = Arguments(**{"split_qkv": True, **given})
    network = build_network([(unet, RULES)], arguments, multiplier=multiplier, rank=rank, alpha=alpha, neuron_dropout=None)
    network.apply_to(None, unet)
    for lora in network.loras if trained else ():
        nn.init.normal_(lora.lora_up.weight, std=0.3)
    return network


def from_file(file, unet: nn.Module, **given):
    return build_network_from_weights([(unet, RULES)], Arguments(**given), multiplier=1.0, file=file, weights_sd=None)


def qkv_of(network) -> SplitLoRAModule:
    (lora,) = [lora for lora in network.loras if lora.lora_name == NAME]
    return lora


def by_the_formula(lora: SplitLoRAModule, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Each part as a LoRA of its own."""
    downs, ups = lora.lora_down.weight.split(lora.part_rank), lora.lora_up.weight.split(lora.parts)
    parts = [F.linear(F.linear(x, down), up) for down, up in zip(downs, ups, strict=True)]
    return F.linear(x, layer.weight, layer.bias) + torch.cat(parts, -1) * lora.strength


def gradients(output: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).to(output).view(output.shape)).sum(), of))


@pytest.mark.parametrize("fused", [True, False])
def test_each_part_has_a_pair_of_its_own(fused):
    unet = model(torch.float64)
    layer = unet["block"]["qkv"]
    if not fused:  # somebody else's patch: the formula as it is
        layer.forward = lambda x: nn.Linear.forward(layer, x)
    lora = qkv_of(applied(unet, alpha=3.0, multiplier=0.7).double())
    assert lora.fused == fused and lora.strength == pytest.approx(0.7 * 3.0 / 2)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    of = [x, lora.lora_down.weight, lora.lora_up.weight]
    ours, reference = layer(x), by_the_formula(lora, layer, x)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, of), gradients(reference, of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_gradcheck_with_dropouts(monkeypatch):
    unet = model(torch.float64)
    lora = qkv_of(applied(unet).double())
    lora.dropouts = Dropouts(neuron=0.3, rank=0.3, module=0.1)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = lora.dropout_mask((2, 3, 6), x.device)
    assert mask is not None and mask.shape == (2, 3, 6)  # every rank of every part by itself
    monkeypatch.setattr(lora, "dropout_mask", lambda *_: mask)
    pair = lora.lora_down.weight, lora.lora_up.weight
    assert torch.autograd.gradcheck(lambda x, *_: unet["block"]["qkv"](x), (x, *pair))


def test_the_parts_do_not_see_each_other():
    unet = model()
    lora = qkv_of(applied(unet))
    (grad,) = torch.autograd.grad(unet["block"]["qkv"](torch.randn(4, WIDTH))[:, 9:12].sum(), lora.lora_down.weight)
    assert grad[2:4].abs().min() > 0 and not grad[:2].any() and not grad[4:].any()


def test_compiled_code_takes_the_formula(monkeypatch):
    unet = model()
    network = applied(unet)
    x = torch.randn(2, 5, WIDTH)
    plain = unet["block"]["qkv"](x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(unet["block"]["qkv"](x), plain)
    assert qkv_of(network).fused


def test_checkpointing_repeats_its_dropouts():
    unet = model()
    lora = qkv_of(applied(unet, rank_dropout=0.4, module_dropout=0.2))
    x, found = torch.randn(2, 4, WIDTH), []
    for run in (unet["block"]["qkv"], lambda x: checkpoint(unet["block"]["qkv"], x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(gradients(run(x), [lora.lora_down.weight, lora.lora_up.weight]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_8_bit_layers_and_autocast():
    unet = model(torch.bfloat16)
    use_fp8(unet["block"], "qkv")
    layer = unet["block"]["qkv"]
    layer.take_weight(torch.randn(sum(SIZES), WIDTH).bfloat16())
    lora = qkv_of(applied(unet))
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    weight = layer.weight.float() * layer.weight_scale
    change = lora.scale * lora.file_tensors()["lora_up.weight"] @ lora.lora_down.weight
    torch.testing.assert_close(out.float(), F.linear(x, weight + change, layer.bias.float()), rtol=0.1, atol=0.1)
    assert all(grad.dtype == torch.float32 for grad in gradients(out.float(), [lora.lora_down.weight, lora.lora_up.weight]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_as_on_the_cpu():
    """Its products write into columns of the output and of the gradients."""
    found = []
    for device in ("cpu", "cuda"):
        unet = model(torch.float64).to(device)
        lora = qkv_of(applied(unet).double().to(device))
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator).to(device).requires_grad_()
        out = unet["block"]["qkv"](x)
        found.append([out, *gradients(out, [x, lora.lora_down.weight, lora.lora_up.weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-10, atol=1e-10)


def test_a_new_one_changes_nothing_and_starts_as_others_do():
    unet = model()
    x = torch.randn(3, WIDTH)
    before = unet["block"]["qkv"](x)
    lora = qkv_of(applied(unet, trained=False))
    assert torch.equal(unet["block"]["qkv"](x), before)
    bound = WIDTH**-0.5  # of kaiming_uniform with a = sqrt(5)
    assert 0.5 * bound < lora.lora_down.weight.abs().max() <= bound


# --- files


def test_the_file_has_one_pair_of_full_strength(tmp_path):
    unet = model()
    network, file = applied(unet, rank=2, alpha=1.0), tmp_path / "a.safetensors"
    network.save_weights(file, None, {})
    saved = dict(read_tensors(read_header(file)))
    lora = qkv_of(network)
    assert saved[f"{NAME}.lora_down.weight"].shape == (6, WIDTH) and saved[f"{NAME}.lora_up.weight"].shape == (15, 6)
    assert float(saved[f"{NAME}.alpha"]) == 3.0
    change = saved[f"{NAME}.lora_up.weight"] @ saved[f"{NAME}.lora_down.weight"] * 3.0 / 6  # as every program reads it
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(
        unet["block"]["qkv"](x), F.linear(x, model()["block"]["qkv"].weight + change, unet["block"]["qkv"].bias)
    )
    blocks = blocks_of(saved[f"{NAME}.lora_up.weight"], SIZES)
    assert blocks is not None and torch.equal(torch.cat(blocks), lora.lora_up.weight)


def same_state(one, other) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in one.state_dict().items())


@pytest.mark.parametrize("way", ["network_weights", "dim_from_weights", "dim_from_weights without the argument"])
@pytest.mark.parametrize("alpha", [0.3, 0.0, 7.0])
def test_a_file_comes_back_exactly(tmp_path, way, alpha):
    network, file = applied(model(), rank=2, alpha=alpha), tmp_path / "a.safetensors"
    network.save_weights(file, None, {})
    other = model()
    if way == "network_weights":
        again = applied(other, trained=False, rank=2, alpha=5.0)
    else:
        again, _ = from_file(file, other, **({"split_qkv": True} if way == "dim_from_weights" else {}))
        again.apply_to(None, other)
    again.load_weights(file)
    assert isinstance(qkv_of(again), SplitLoRAModule) and same_state(network, again)
    assert qkv_of(again).strength == qkv_of(network).strength
    second = tmp_path / "b.safetensors"
    again.save_weights(second, None, {})
    assert file.read_bytes() == second.read_bytes()


def test_the_state_of_a_run_comes_back_in_place():
    """Trainers copy a state into what state_dict() gives."""
    network, other = applied(model()), applied(model(), trained=False)
    own = other.state_dict()
    for key, tensor in network.state_dict().items():
        own[key].copy_(tensor)
    assert same_state(network, other)


def test_a_file_that_has_learned_nothing_is_what_the_arguments_say(tmp_path):
    applied(model(), trained=False).save_weights(tmp_path / "a.safetensors", None, {})
    assert isinstance(qkv_of(from_file(tmp_path / "a.safetensors", model(), split_qkv=True)[0]), SplitLoRAModule)
    assert type(qkv_of(from_file(tmp_path / "a.safetensors", model())[0])) is LoRAModule


def test_a_pair_for_all_parts_is_copied_to_each(tmp_path):
    unet, other = model(), model()
    plain, file = applied(unet, split_qkv=False, rank=2, alpha=0.5), tmp_path / "a.safetensors"
    plain.save_weights(file, None, {})
    split = applied(other, rank=2, alpha=9.0)
    split.load_weights(file)
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(other["block"]["qkv"](x), unet["block"]["qkv"](x))


def test_a_pair_for_all_parts_of_another_rank_is_refused(tmp_path):
    applied(model(), split_qkv=False, rank=6).save_weights(tmp_path / "a.safetensors", None, {})
    with pytest.raises(NetworkError, match=r"rank 6 for all its 3 parts .* leave out split_qkv"):
        qkv_of(applied(model(), rank=2)).load_pair(parts_of(tmp_path / "a.safetensors"))


def test_a_network_without_the_argument_says_what_the_file_has(tmp_path):
    applied(model(), rank=2).save_weights(tmp_path / "a.safetensors", None, {})
    with pytest.raises(
        NetworkError, match="rank 6 in the file, rank 2 of each of its 3 parts, 2 here.*add split_qkv=true to --netw"
    ):
        applied(model(), rank=2, split_qkv=False).load_weights(tmp_path / "a.safetensors")
    with pytest.raises(NetworkError, match="has other ranks: .*set --network_dim to the file's rank"):
        applied(model(), rank=4).load_weights(tmp_path / "a.safetensors")


def parts_of(file) -> dict[str, torch.Tensor]:
    return {key.partition(".")[2]: tensor for key, tensor in read_tensors(read_header(file)) if key.startswith(NAME)}


def test_the_argument_does_nothing_for_a_file_with_one_pair(tmp_path, caplog):
    applied(model(), split_qkv=False).save_weights(tmp_path / "a.safetensors", None, {})
    with caplog.at_level(logging.WARNING):
        network, _ = from_file(tmp_path / "a.safetensors", model(), split_qkv=True)
    assert type(qkv_of(network)) is LoRAModule
    assert f"one LoRA for all of {NAME}, so split_qkv does nothing there" in caplog.text


def as_the_reference_writes(network, file, *, metadata: dict[str, str]) -> None:
    tensors = network.file_tensors()
    save_safetensors(file, {**tensors, f"{NAME}.alpha": tensors[f"{NAME}.alpha"] / 3}, metadata)


SPLIT = {"ss_network_args": json.dumps({"split_qkv": "True"}), "ss_network_alpha": "1.0"}


@pytest.mark.parametrize(
    ("metadata", "is_known"),
    [
        (SPLIT, True),
        ({**SPLIT, "ss_network_alpha": "2.0"}, False),  # not the alpha of a part: something else has been done to the file
        ({"ss_network_alpha": "1.0"}, False),
        ({**SPLIT, "ss_network_args": "not JSON"}, False),
        ({**SPLIT, "ss_network_alpha": "?"}, False),
        ({**SPLIT, "modelspec.implementation_version": "atelier/1"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("way", ["network_weights", "dim_from_weights", "merge"])
def test_files_of_the_reference_are_read_as_strong_as_they_were_trained(tmp_path, caplog, metadata, is_known, way):
    unet, file = model(), tmp_path / "theirs.safetensors"
    as_the_reference_writes(applied(unet), file, metadata=metadata)
    x, other = torch.randn(4, WIDTH), model()
    before = other["block"]["qkv"](x)
    with caplog.at_level(logging.INFO):
        if way == "network_weights":
            applied(other).load_weights(file)
        else:
            network, weights = from_file(file, other)
            if way == "merge":
                network.merge_to(None, other, weights)
            else:
                network.apply_to(None, other)
                network.load_weights(file)
    share = 1.0 if is_known else 1 / 3
    torch.testing.assert_close(other["block"]["qkv"](x) - before, (unet["block"]["qkv"](x) - before) * share)
    assert ("with the strength that they were trained with" in caplog.text) == is_known


def test_alpha_0_of_the_reference_is_the_rank_of_a_part(tmp_path):
    unet, file = model(), tmp_path / "theirs.safetensors"
    as_the_reference_writes(applied(unet, alpha=0), file, metadata={**SPLIT, "ss_network_alpha": "0"})
    assert float(qkv_of(from_file(file, model())[0]).strength) == 1.0


# --- what else networks do


def test_merging_gives_what_training_gave_and_can_be_undone():
    unet = model()
    x, before = torch.randn(4, WIDTH), model()["block"]["qkv"].weight
    network = applied(unet, multiplier=0.7)
    with_lora = unet["block"]["qkv"](x)
    network.backup_weights()
    network.pre_calculation()
    torch.testing.assert_close(unet["block"]["qkv"](x), with_lora)
    network.restore_weights()
    assert torch.equal(unet["block"]["qkv"].weight, before)
    for weights in (network.state_dict(), network.file_tensors()):
        other = model()
        applied(other, multiplier=0.7).merge_to(None, None, weights)
        torch.testing.assert_close(F.linear(x, other["block"]["qkv"].weight, other["block"]["qkv"].bias), with_lora)


def test_the_largest_norm_is_that_of_the_whole_change():
    network = applied(model(), alpha=4.0)
    lora = qkv_of(network)
    change = lora.scale * lora.file_tensors()["lora_up.weight"] @ lora.lora_down.weight
    torch.testing.assert_close(lora.norm(), torch.linalg.matrix_norm(change))
    changed, _, largest = network.apply_max_norm_regularization(0.5)
    assert int(changed) == 2 and float(largest) <= 0.5 + 1e-5
    torch.testing.assert_close(lora.norm(), torch.tensor(0.5))


def test_optimizer_groups_and_lora_plus():
    network = applied(model(), loraplus_lr_ratio=4.0)
    groups, names = network.prepare_optimizer_params(None, 0.1, 0.1)
    assert names == ["unet", "unet plus"] and [group["lr"] for group in groups] == [0.1, 0.4]
    lora = qkv_of(network)
    assert any(weight is lora.lora_down.weight for weight in groups[0]["params"])
    assert any(weight is lora.lora_up.weight for weight in groups[1]["params"])


def test_verbose_tells_the_rank_of_each_part(caplog):
    network = applied(model(), rank=2, alpha=1.0, verbose=True)
    with caplog.at_level(logging.INFO):
        network.prepare_optimizer_params(None, 0.1, 0.1)
    (line,) = [line for line in caplog.messages if line.startswith("block.qkv")]
    assert line.split()[1:5] == ["3", "x", "2", "1"]


def test_recognising_split_pairs():
    up = torch.block_diag(torch.ones(9, 2), torch.ones(3, 2), torch.ones(3, 2))
    assert is_split(up, SIZES) and not is_split(up, ()) and not is_split(up, (3, 9, 3)) and not is_split(up, (9, 6))
    assert not is_split(torch.zeros(15, 6), SIZES) and blocks_of(torch.zeros(15, 6), SIZES) is not None
    assert blocks_of(up[:, :5], SIZES) is None and blocks_of(up[:14], SIZES) is None
