from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from library.errors import CheckpointError
from library.files.weights_source import Piece
from library.nn.fp8 import FP8, fp8_layers
from library.sd.clip import ClipTextModel, build_clip, causal_mask, load_clip
from library.sd.clip_layout import ClipConfig, expected_shapes
from library.training.models.model_memory import arrange_text_encoders
from tests.golden.golden_files import relative_error
from tests.library.sd.clip_files import TINY_G, TINY_L, clip_source, their_clip, tiny_part
from tests.library.sd.recorder import Recorder, checkpointing_options

IDS = torch.randint(0, 49000, (3, 77), generator=torch.Generator().manual_seed(1))


def loaded(config: ClipConfig, *, fp8: bool = False, dtype: torch.dtype = torch.float32) -> ClipTextModel:
    model = build_clip(config, fp8=fp8)
    load_clip(model, tiny_part(config), device="cpu", dtype=dtype)
    return model


@pytest.mark.parametrize("config", [TINY_L, TINY_G])
def test_names_are_the_same_with_every_version_of_transformers(config):
    model = build_clip(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_shapes(config)
    assert type(model.get_submodule("text_model.encoder.layers.0.self_attn.q_proj")) is nn.Linear
    assert type(model.get_submodule("text_model.encoder.layers.0.self_attn")).__name__ == "CLIPAttention"
    assert type(model.get_submodule("text_model.encoder.layers.0.mlp")).__name__ == "CLIPMLP"


@pytest.mark.parametrize("config", [TINY_L, TINY_G])
@torch.no_grad()
def test_states_are_those_of_transformers(config):
    model = loaded(config)
    ids = IDS.clone()
    ids[:, 0], ids[:, -1] = 49406, 49407
    ids[0, 12:] = 49407
    found = their_clip(model)(input_ids=ids, output_hidden_states=True)
    for number, states in enumerate(found.hidden_states[:-1]):  # transformers 5 norms the last
        assert relative_error(model.run(model.embed(ids), 0, number), states) < 1e-5
    last = model.run(model.embed(ids), 0, config.layers)
    assert relative_error(model.normed(last), found.last_hidden_state) < 1e-5
    if config.projection is not None:
        assert relative_error(model.pooled(last, torch.tensor([12, 76, 76])), found.text_embeds) < 1e-5


@pytest.mark.parametrize("config", [TINY_L, TINY_G])
@torch.no_grad()
def test_masked_states_are_those_of_transformers(config):
    model = loaded(config)
    lengths = torch.tensor([13, 77, 2])
    mask = torch.arange(77) < lengths[:, None]
    ids = IDS.clone()
    ids[:, 0], ids[torch.arange(3), lengths - 1] = 49406, 49407
    ids[~mask] = 0
    found = their_clip(model)(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    own = model.run(model.embed(ids), 0, config.layers - 1, causal_mask(mask))
    assert relative_error(own, found.hidden_states[-2]) < 1e-5  # rows of padding too
    assert torch.equal(own[0, :13], model.run(model.embed(ids), 0, config.layers - 1)[0, :13])  # what is causal sees none


@torch.no_grad()
def test_a_model_without_a_projection_pools_what_is_there():
    model = loaded(TINY_L)
    x = model.embed(IDS)
    assert torch.equal(model.pooled(x, torch.tensor([3, 4, 5]))[1], model.normed(x)[1, 4])


def test_weights_stream_in_frozen_and_in_their_dtype():
    model = loaded(TINY_G, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(buffer.is_meta for buffer in model.buffers()) and not model.training
    model.to("cpu", torch.float32)  # nothing is left that cannot be moved


def test_weights_that_do_not_fit_are_told():
    part = tiny_part(TINY_L)
    pieces = {name: piece for name, piece in part.pieces.items() if "fc1" not in name} | {"more": Piece("logit_scale")}
    part = dataclasses.replace(part, pieces=pieces)
    with pytest.raises(CheckpointError, match="6 missing"):
        load_clip(build_clip(TINY_L), part, device="cpu", dtype=torch.float32)


def test_only_the_layers_that_are_asked_for_are_computed():
    model, called = loaded(TINY_L), []
    for number, layer in enumerate(model.text_model.encoder.layers):
        layer.mlp.fc1.register_forward_hook(lambda *_, number=number: called.append(number))
    model.run(model.embed(IDS), 0, 2)
    assert called == [0, 1]


def test_fp8_takes_the_layers_and_nothing_else():
    model = loaded(TINY_G, fp8=True)
    assert {layer.path.split(".", 4)[4] for layer in fp8_layers(model)} == {
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"
    }  # fmt: skip
    assert all(layer.weight.dtype == FP8 for layer in fp8_layers(model))
    assert len(list(fp8_layers(model))) == 6 * TINY_G.layers
    with torch.no_grad():
        exact, rounded = (m.run(m.embed(IDS), 0, 3) for m in (loaded(TINY_G), model))
    assert 1e-4 < relative_error(rounded, exact) < 0.2


def test_gradients_flow_through_frozen_layers_and_checkpointing_changes_nothing():
    """A stand-in of a LoRA: something trained is added behind a projection of the first layer."""
    results, saved = [], []
    for checkpointing in (None, "plain"):
        model = loaded(TINY_L)
        trained = nn.Parameter(torch.zeros(TINY_L.width))
        model.text_model.encoder.layers[0].self_attn.v_proj.register_forward_hook(
            lambda _m, _i, out, trained=trained: out + trained
        )
        arrange_text_encoders(checkpointing_options(checkpointing), [model])
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model.normed(model.run(model.embed(IDS), 0, 3)).square().mean()
        loss.backward()
        results.append((loss.detach(), trained.grad))
        saved.append(sum(sizes))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0 and saved[1] < saved[0] / 3


@torch.no_grad()
def test_nothing_asks_the_device_for_a_value():
    model = loaded(TINY_G)
    with Recorder() as recorder:
        model.pooled(model.run(model.embed(IDS), 0, 4), torch.tensor([3, 4, 5]))
    assert not recorder.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def test_heads_come_from_the_files_settings():
    source = clip_source(dataclasses.replace(TINY_L, heads=4), "hf")
    assert json.loads(source.metadata["config"])["text"][0]["heads"] == 4
    assert (
        build_clip(tiny_part(dataclasses.replace(TINY_L, heads=4)).config).text_model.encoder.layers[0].self_attn.num_heads == 4
    )
