from __future__ import annotations

import dataclasses

import pytest
import torch

from library.errors import OptionError
from library.nn.fp8 import fp8_layers
from library.sd.clip_tokenizer import CLIP_L
from library.sd.text import (
    SdConditioning,
    SdPrompts,
    SdTextEncoder,
    build_text_encoder,
    equally_long,
    load_text_encoder,
    text_models,
)
from tests.golden.golden_files import relative_error
from tests.library.sd.clip_files import TINY_L, their_clip, their_tokenizer, tiny_part

SHORT, WEIGHTED, LONG = "a cat", "a (red:1.5) cat [asleep]", " ".join(["a red cat"] * 40)
CAPTIONS = [SHORT, WEIGHTED, LONG, ""]


def loaded(**settings) -> SdTextEncoder:
    parts = [tiny_part(TINY_L)]
    encoder = build_text_encoder(parts, **{"v2": False, **settings})
    load_text_encoder(encoder, parts)
    return encoder


@pytest.fixture(scope="module")
def encoder() -> SdTextEncoder:
    return loaded()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_an_encoder_as_it_is_built(encoder):
    assert text_models(encoder) == [encoder.model] and not encoder.training
    assert encoder.tokenizer.kind == CLIP_L and loaded(v2=True).tokenizer.kind.pad_id == 0
    assert len(list(fp8_layers(loaded(fp8=True)))) == 6 * TINY_L.layers


@pytest.mark.parametrize(("tokens", "length"), [(None, 77), (75, 77), (150, 152), (225, 227)])
def test_all_captions_of_a_run_are_equally_long(tokens, length):
    assert loaded(max_token_length=tokens).encode(CAPTIONS).states.shape == (4, length, TINY_L.width)


@pytest.mark.parametrize("tokens", [75, 225])
def test_a_caption_does_not_depend_on_its_batch(tokens):
    encoder = loaded(max_token_length=tokens, weighted_captions=True)
    together = encoder.encode(CAPTIONS)
    for caption, found in zip(CAPTIONS, together.split(), strict=True):
        assert relative_error(found.states, encoder.encode([caption]).states) < 1e-5


def test_rows_that_are_alike_are_encoded_once(encoder):
    encoder = loaded(max_token_length=225)
    batches = []
    encoder.model.text_model.embeddings.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    without = encoder.encode([SHORT, SHORT, ""])
    with torch.enable_grad():
        each = encoder.encode([SHORT, SHORT, ""])
    assert batches == [2, 9]  # "a cat", and what is padding or the caption ""
    assert relative_error(without.states, each.states) < 1e-5


def test_clip_skip_leaves_layers_out(encoder):
    skipping, called = loaded(clip_skip=2), []
    for number, layer in enumerate(skipping.model.text_model.encoder.layers):
        layer.layer_norm1.register_forward_hook(lambda *_, number=number: called.append(number))
    ids = torch.tensor(skipping.tokenizer.rows(SHORT).ids)
    model = encoder.model
    expected = model.normed(model.run(model.embed(ids), 0, 2))
    assert torch.equal(skipping.encode([SHORT]).states, expected) and called == [0, 1]
    assert torch.equal(loaded(clip_skip=1).encode([SHORT]).states, encoder.encode([SHORT]).states)


def test_clip_skip_beyond_the_layers_is_refused():
    with pytest.raises(OptionError, match=r"--clip_skip is 4.*3 layers"):
        loaded(clip_skip=4)


def test_weights_count_only_where_they_are_read(encoder):
    weighted, plain = loaded(weighted_captions=True), encoder
    row = weighted.tokenizer.rows(WEIGHTED, weighted=True)
    ((before, after),) = zip(plain.encode(["a red cat asleep"]).states, weighted.encode([WEIGHTED]).states, strict=True)
    assert relative_error(after, before * torch.tensor(row.weights[0])[:, None]) < 1e-6
    assert set(row.weights[0]) == {1.0, 1.5, 1 / 1.1}
    assert torch.equal(weighted.encode([SHORT]).states, plain.encode([SHORT]).states)


def test_weights_keep_the_dtype():
    parts = [tiny_part(TINY_L)]
    encoder = build_text_encoder(parts, v2=False, weighted_captions=True)
    load_text_encoder(encoder, parts, dtype=torch.bfloat16)
    assert encoder.encode([WEIGHTED]).states.dtype == torch.bfloat16
    assert encoder.encode_prompts([WEIGHTED]).conditioning().states.dtype == torch.bfloat16


def test_the_cache_gives_back_what_it_got(encoder):
    conditioning = encoder.encode(CAPTIONS)
    entries = [part.cache_tensors() for part in conditioning.split()]
    assert [(name, tensor.shape, tensor.is_contiguous()) for name, tensor in entries[0].items()] == [("states", (77, 16), True)]
    back = SdConditioning.from_cache({"states": torch.stack([e["states"] for e in entries])}, {"states": [77] * 4})
    assert torch.equal(back.states, conditioning.states)
    assert torch.equal(SdConditioning.stack(conditioning.split()).states, conditioning.states)
    assert conditioning.to("meta").states.is_meta


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(("text", "rows"), [(SHORT, 1), (LONG, 2), (LONG * 9, 3)])
def test_prompts_are_as_long_as_they_need(encoder, text, rows):
    assert encoder.encode_prompts([text]).conditioning().states.shape == (1, 77 * rows, TINY_L.width)


def test_a_short_prompt_without_weights_is_a_caption(encoder):
    assert relative_error(encoder.encode_prompts([SHORT]).conditioning().states, encoder.encode([SHORT]).states) < 1e-6


def test_the_shorter_is_padded_with_rows_without_text(encoder):
    positive, negative = equally_long(encoder.encode_prompts([LONG]), encoder.encode_prompts([SHORT]))
    empty = encoder.encode([""]).states
    assert positive.states.shape == negative.states.shape == (1, 154, TINY_L.width)
    assert relative_error(negative.states, torch.cat([encoder.encode([SHORT]).states, empty], dim=1)) < 1e-6


def test_weights_of_prompts_leave_the_mean_where_it_was(encoder):
    prompts = encoder.encode_prompts([WEIGHTED])
    for rows in (1, 2, 3):
        states, _ = prompts._extended(rows)
        found = prompts.conditioning(rows).states
        assert found.mean().item() == pytest.approx(states.mean().item(), rel=1e-4)
        assert relative_error(found, states.flatten(1, 2)) > 0.05


def test_prompts_together_are_prompts_one_by_one(encoder):
    together, apart = encoder.encode_prompts(CAPTIONS), [encoder.encode_prompts([text]) for text in CAPTIONS]
    assert together.rows == (1, 1, 2, 1)
    stacked = SdPrompts.stack(apart)
    entries = [part.cache_tensors() for part in together.split()]
    names = {name: [len(entry[name]) for entry in entries] for name in entries[0]}
    padded = {name: torch.nn.utils.rnn.pad_sequence([entry[name] for entry in entries], batch_first=True) for name in names}
    for found in (stacked, SdPrompts.from_cache(padded, names), SdPrompts.stack(together.split()), together.to("cpu")):
        assert found.rows == together.rows
        for rows in (2, 3):
            assert relative_error(found.conditioning(rows).states, together.conditioning(rows).states) < 1e-5


def test_prompts_of_stable_diffusion_2_are_padded_with_end_marks():
    encoder = loaded(v2=True)
    rows = encoder.tokenizer.prompt_rows(SHORT)
    assert rows.ids == loaded().tokenizer.prompt_rows(SHORT).ids and encoder.tokenizer.rows(SHORT).ids != rows.ids


# ---------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_diffusers_encodes_the_same(encoder, clip_skip, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=their_clip(encoder.model), tokenizer=their_tokenizer(tmp_path), unet=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    found, _ = pipeline.encode_prompt([SHORT, LONG], "cpu", 1, False, clip_skip=clip_skip)
    ours = loaded(clip_skip=None if clip_skip is None else clip_skip + 1)  # diffusers counts the layers that are left out
    assert relative_error(ours.encode([SHORT, LONG]).states, found) < 1e-5


def test_a_run_of_the_published_length_and_skip_is_what_is_described():
    encoder = loaded(clip_skip=3, max_token_length=150, weighted_captions=True)
    assert dataclasses.asdict(encoder.model.config)["layers"] == 3
    assert (encoder.layers, encoder.tokens, encoder.weighted_captions) == (1, 150, True)
