from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from library.errors import CheckpointError
from library.nn.fp8 import fp8_layers
from library.sd.clip_tokenizer import END_ID
from library.sd.text import load_text_encoder, text_models
from library.sdxl.text import SdxlConditioning, SdxlTextEncoder, build_text_encoder
from tests.golden.golden_files import relative_error
from tests.library.sd.clip_files import TINY_G, TINY_L, their_clip, their_tokenizer, tiny_part

SHORT, WEIGHTED, LONG = "a cat", "a (red:1.5) cat [asleep]", " ".join(["a red cat"] * 40)
CAPTIONS = [SHORT, WEIGHTED, LONG, ""]
WIDTH = TINY_L.width + TINY_G.width


def loaded(**settings) -> SdxlTextEncoder:
    parts = [tiny_part(TINY_L), tiny_part(TINY_G, "open_clip", seed=1)]
    encoder = build_text_encoder(parts, **settings)
    load_text_encoder(encoder, parts)
    return encoder


@pytest.fixture(scope="module")
def encoder() -> SdxlTextEncoder:
    return loaded()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_models_are_in_the_order_of_the_learning_rates(encoder):
    assert text_models(encoder) == [encoder.clip_l, encoder.clip_g] and not encoder.training
    assert [tokenizer.kind.encoder for tokenizer in encoder.tokenizers] == ["CLIP-L", "OpenCLIP-G"]
    assert len(list(fp8_layers(loaded(fp8=True)))) == 6 * (TINY_L.layers + TINY_G.layers)


@pytest.mark.parametrize("tokens", [75, 150])
def test_a_full_row_that_ends_like_padding(tokens):
    """A "!" before a bracket has the id of the padding, behind which nobody sets an end mark."""
    caption = "a " * 74 + "!( more"
    encoder = loaded(max_token_length=tokens)
    row = encoder.tokenizers[1].rows(caption, tokens=tokens).ids[0]
    assert row[75] == 0 and (END_ID in row) == (tokens == 75)
    (pooled,) = encoder.encode([caption]).pooled
    states = encoder.clip_g.run(encoder.clip_g.embed(torch.tensor([row])), 0, TINY_G.layers)
    assert torch.equal(pooled, encoder.clip_g.pooled(states, torch.tensor([76]))[0])


def test_a_second_encoder_without_a_projection_is_refused():
    with pytest.raises(CheckpointError, match="no text_projection"):
        build_text_encoder([tiny_part(TINY_L), tiny_part(dataclasses.replace(TINY_G, projection=None))])


@pytest.mark.parametrize(("tokens", "length"), [(None, 77), (75, 77), (150, 152), (225, 227)])
def test_shapes(tokens, length):
    found = loaded(max_token_length=tokens).encode(CAPTIONS)
    assert found.states.shape == (4, length, WIDTH) and found.pooled.shape == (4, TINY_G.projection)


@pytest.mark.parametrize("tokens", [75, 225])
def test_a_caption_does_not_depend_on_its_batch(tokens):
    encoder = loaded(max_token_length=tokens, weighted_captions=True)
    for caption, found in zip(CAPTIONS, encoder.encode(CAPTIONS).split(), strict=True):
        alone = encoder.encode([caption])
        assert relative_error(found.states, alone.states) < 1e-5 and relative_error(found.pooled, alone.pooled) < 1e-5


def test_the_layers_that_are_computed():
    encoder, called = loaded(max_token_length=225), []
    for name, model in (("l", encoder.clip_l), ("g", encoder.clip_g)):
        for number, layer in enumerate(model.text_model.encoder.layers):
            layer.mlp.fc1.register_forward_hook(
                lambda module, inputs, output, name=name, number=number: called.append((name, number, len(output)))
            )
    with torch.enable_grad():
        encoder.encode([SHORT, LONG])
    # of CLIP-L not the last layer, of CLIP-G the last for the first rows only, of which the pooled vector is made
    assert called == [("l", 0, 6), ("l", 1, 6), ("g", 0, 6), ("g", 1, 6), ("g", 2, 6), ("g", 3, 2)]


def test_the_pooled_vector_is_of_the_first_piece_and_without_weights(encoder):
    longer = loaded(max_token_length=225, weighted_captions=True)
    assert relative_error(longer.encode([WEIGHTED]).pooled, longer.encode(["a red cat asleep"]).pooled) < 1e-5
    # the row of a longer caption ends differently, but behind the first 75 tokens; the end mark of a short one is within
    assert relative_error(longer.encode([SHORT]).pooled, encoder.encode([SHORT]).pooled) < 1e-5


def test_weights_count_in_prompts_always_and_in_captions_if_asked(encoder):
    weighted = loaded(weighted_captions=True)
    prompt = encoder.encode_prompts([WEIGHTED]).states
    assert relative_error(prompt, weighted.encode([WEIGHTED]).states) < 1e-6
    assert relative_error(prompt, encoder.encode([WEIGHTED]).states) > 0.1
    row = weighted.tokenizers[0].rows(WEIGHTED, weighted=True)
    plain = encoder.encode(["a red cat asleep"]).states
    assert relative_error(prompt, plain * torch.tensor(row.weights)[..., None]) < 1e-6


def test_prompts_are_as_long_as_the_captions_of_the_run():
    assert loaded(max_token_length=150).encode_prompts([SHORT, LONG]).states.shape == (2, 152, WIDTH)


def test_the_cache_gives_back_what_it_got(encoder):
    conditioning = encoder.encode(CAPTIONS)
    entries = [part.cache_tensors() for part in conditioning.split()]
    assert {name: tuple(tensor.shape) for name, tensor in entries[0].items()} == {"states": (77, WIDTH), "pooled": (20,)}
    assert all(tensor.is_contiguous() for tensor in entries[1].values())
    tensors = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
    back = SdxlConditioning.from_cache(tensors, {"states": [77] * 4, "pooled": [20] * 4})
    for found in (back, SdxlConditioning.stack(conditioning.split())):
        assert torch.equal(found.states, conditioning.states) and torch.equal(found.pooled, conditioning.pooled)
    moved = conditioning.to("meta")
    assert moved.states.is_meta and moved.pooled.is_meta


def test_gradients_reach_both_encoders():
    encoder, added = loaded(max_token_length=150), []
    for model in text_models(encoder):
        added.append(torch.zeros(model.config.width, requires_grad=True))
        model.text_model.encoder.layers[0].mlp.fc2.register_forward_hook(lambda _m, _i, out, more=added[-1]: out + more)
        model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.enable_grad():
        found = encoder.encode([SHORT, LONG])
        for output, reached in ((found.states, added), (found.pooled, added[1:])):
            grads = torch.autograd.grad(output.square().mean(), reached, retain_graph=True)
            assert all(grad.abs().max() > 0 and math.isfinite(grad.sum()) for grad in grads)


def test_diffusers_encodes_the_same(encoder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    (tmp_path / "l").mkdir(), (tmp_path / "g").mkdir()
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=their_clip(encoder.clip_l), text_encoder_2=their_clip(encoder.clip_g),
        tokenizer=their_tokenizer(tmp_path / "l"), tokenizer_2=their_tokenizer(tmp_path / "g", pad="!"),
        add_watermarker=False,
    )  # fmt: skip
    states, _, pooled, _ = pipeline.encode_prompt([SHORT, LONG], device="cpu", do_classifier_free_guidance=False)
    ours = encoder.encode([SHORT, LONG])
    assert relative_error(ours.states, states) < 1e-5 and relative_error(ours.pooled, pooled) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_the_device():
    parts = [tiny_part(TINY_L), tiny_part(TINY_G, "open_clip", seed=1)]
    encoder = build_text_encoder(parts, max_token_length=225, weighted_captions=True)
    load_text_encoder(encoder, parts, device="cuda")
    expected = loaded(max_token_length=225, weighted_captions=True).encode(CAPTIONS)
    encoder.encode(CAPTIONS)  # libraries load, memory is taken
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = encoder.encode(CAPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(found.states.cpu(), expected.states) < 1e-2
    assert relative_error(found.pooled.cpu(), expected.pooled) < 1e-2
