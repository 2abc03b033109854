from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.files.weights_source import Piece
from library.nn.fp8 import FP8, fp8_layers, in_dtype
from library.sd3.t5 import T5Encoder, build_t5, load_t5_weights
from library.sd3.t5_layout import expected_shapes, t5_part
from library.training.models.model_memory import arrange_text_encoders
from tests.golden.golden_files import relative_error
from tests.library.sd.recorder import Recorder, checkpointing_options
from tests.library.sd3.t5_files import TINY_T5, loaded_t5, t5_source, t5_tensors, their_t5, tiny_t5_part

IDS = torch.randint(0, 32100, (3, 150), generator=torch.Generator().manual_seed(1))  # farther than the farthest bucket
MASK = torch.arange(150) < torch.tensor([[150], [40], [1]])


def test_names_are_those_of_transformers():
    model = build_t5(TINY_T5)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_shapes(TINY_T5)
    assert type(model.get_submodule("encoder.block.0.layer.0.SelfAttention.q")) is nn.Linear
    assert type(model.get_submodule("encoder.block.2.layer.0.SelfAttention")).__name__ == "T5Attention"
    assert type(model.get_submodule("encoder.block.2.layer.1.DenseReluDense")).__name__ == "T5DenseGatedActDense"


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@torch.no_grad()
def test_states_are_those_of_transformers(mask):
    model = loaded_t5()
    expected = their_t5(model)(input_ids=IDS, attention_mask=None if mask is None else mask.long()).last_hidden_state
    assert relative_error(model(IDS, mask), expected) < 1e-5


@torch.no_grad()
def test_nothing_looks_at_padding_under_a_mask():
    model, other = loaded_t5(), IDS.clone()
    other[1, 40:] = 7
    assert torch.equal(model(IDS, MASK)[1, :40], model(other, MASK)[1, :40])
    assert not torch.equal(model(IDS)[1, :40], model(other)[1, :40])


def test_weights_stream_in_frozen_and_in_their_dtype():
    model = loaded_t5(dtype=torch.bfloat16)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(buffer.is_meta for buffer in model.buffers()) and not model.training
    model.to("cpu", torch.float32)  # nothing is left that cannot be moved


def test_weights_that_do_not_fit_are_told():
    part = tiny_t5_part()
    pieces = {name: piece for name, piece in part.pieces.items() if "wi_0" not in name} | {"more": Piece("shared.weight")}
    with pytest.raises(CheckpointError, match="3 missing"):
        load_t5_weights(build_t5(TINY_T5), dataclasses.replace(part, pieces=pieces), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_close(dtype):
    found = loaded_t5(dtype=dtype)(IDS)
    assert found.dtype == dtype and relative_error(found, loaded_t5()(IDS)) < (0.02 if dtype == torch.float16 else 0.1)


def with_large_sums(dtype: torch.dtype) -> T5Encoder:
    """Halves of 3,000 in the middle layer: their product passes 65,504, and so does what the layer adds to the stream."""
    model = build_t5(TINY_T5)
    tensors = t5_tensors()
    for name in ("wi_0", "wi_1"):
        tensors[f"encoder.block.1.layer.1.DenseReluDense.{name}.weight"] *= 1000
    load = dataclasses.replace(tiny_t5_part(), source=t5_source())
    load.source.held.update({name: t for name, t in tensors.items() if "block.1.layer.1" in name})
    load_t5_weights(model, load, device="cpu", dtype=dtype)
    return model


@torch.no_grad()
def test_float16_does_not_overflow():
    sums: list[torch.Tensor] = []
    exact = with_large_sums(torch.float32)
    exact.encoder.block[1].layer[1].DenseReluDense.wo.register_forward_hook(lambda _m, args, out: sums.extend([args[0], out]))
    expected = exact(IDS)
    assert all(float(value.abs().max()) > 4 * 65504 for value in sums)
    found = with_large_sums(torch.float16)(IDS)
    assert found.isfinite().all() and relative_error(found, expected) < 0.02
    with torch.autocast("cpu", dtype=torch.float16):
        assert relative_error(with_large_sums(torch.float32)(IDS), expected) < 0.02


def test_gradients_are_right_where_float16_is_kept_from_overflowing():
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = with_large_sums(dtype)
        trained = nn.Parameter(torch.zeros(TINY_T5.mlp_width))
        layer = model.encoder.block[1].layer[1].DenseReluDense.wi_1
        layer.register_forward_hook(lambda _m, _i, out, trained=trained: out * (1 + trained.to(out.dtype)))
        (model(IDS).float() * torch.linspace(-1, 1, TINY_T5.width)).mean().mul(100).backward()
        gradients.append(trained.grad)
    assert relative_error(gradients[1], gradients[0]) < 0.05 and gradients[0].abs().max() > 0


def test_nothing_is_dropped_in_training_mode():
    model = loaded_t5()
    with torch.no_grad():
        assert torch.equal(model.train()(IDS), model.eval()(IDS))
        theirs = their_t5(model).train()
        assert not torch.equal(theirs(input_ids=IDS).last_hidden_state, theirs(input_ids=IDS).last_hidden_state)


def test_gradients_flow_through_frozen_layers_and_checkpointing_changes_nothing():
    """A stand-in of a LoRA: something trained is added behind a projection of the first layer."""
    results, saved = [], []
    for checkpointing in (None, "plain"):
        model = loaded_t5()
        trained = nn.Parameter(torch.zeros(TINY_T5.heads * TINY_T5.head_dim))
        model.encoder.block[0].layer[0].SelfAttention.v.register_forward_hook(lambda _m, _i, out, trained=trained: out + trained)
        arrange_text_encoders(checkpointing_options(checkpointing), [model])
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model(IDS[:, :16], MASK[:, :16]).square().mean()
        loss.backward()
        results.append((loss.detach(), trained.grad))
        saved.append(sum(sizes))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0 and saved[1] < saved[0] / 3


@torch.no_grad()
def test_nothing_asks_the_device_for_a_value():
    model = loaded_t5(dtype=torch.float16)
    with Recorder() as recorder:
        model(IDS, MASK)
    assert not recorder.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def test_fp8_takes_the_layers_and_nothing_else():
    model = loaded_t5(fp8=True)
    ends = {"SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"}
    ends |= {f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")}
    assert {layer.path.split(".", 5)[5] for layer in fp8_layers(model)} == ends
    assert len(list(fp8_layers(model))) == 7 * TINY_T5.layers and all(layer.weight.dtype == FP8 for layer in fp8_layers(model))
    rounded = loaded_t5()
    for layer in fp8_layers(model):
        rounded.get_submodule(layer.path).weight.data = in_dtype(layer.weight, layer.weight_scale, torch.float32)
    with torch.no_grad():
        expected = rounded(IDS)
        assert relative_error(model(IDS), expected) < 1e-5 and relative_error(expected, loaded_t5()(IDS)) > 1e-3
        assert relative_error(loaded_t5(fp8=True, dtype=torch.float16)(IDS), expected) < 0.2  # rounded twice


@torch.no_grad()
def test_a_file_in_float8(tmp_path):
    """Plain float8 is read as it is: in a wider dtype exactly, and in 8 bits without another rounding."""
    held = {name: tensor.to(FP8) for name, tensor in t5_source().held.items()}
    save_safetensors(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", held)
    part = t5_part(open_weights(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", flag="--t5xxl"), prefix="")
    models = [build_t5(part.config, fp8=fp8) for fp8 in (False, True)]
    for model in models:
        load_t5_weights(model, part, device="cpu", dtype=torch.bfloat16)
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    assert torch.equal(models[0].get_parameter(f"{name}.weight"), held[f"{name}.weight"].to(torch.bfloat16))
    assert torch.equal(models[0](IDS), models[1](IDS)) and models[1].get_parameter(f"{name}.weight").dtype == FP8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(dtype):
    expected = with_large_sums(torch.float32)(IDS, MASK)
    found = with_large_sums(dtype).to("cuda")(IDS.cuda(), MASK.cuda()).cpu()
    assert relative_error(found, expected) < {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
