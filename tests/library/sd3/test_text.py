from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from library.dataset.caches.rows import MemoryEntry
from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.nn.fp8 import fp8_layers
from library.sd.clip_layout import clip_part
from library.sd3.layout import Sd3TextParts
from library.sd3.t5_layout import t5_part
from library.sd3.text import (
    FIELDS,
    T5_BATCH,
    Sd3Conditioning,
    Sd3TextEncoder,
    build_text_encoder,
    load_text_encoder,
    text_models,
)
from tests.golden.golden_files import relative_error
from tests.library.sd.clip_files import TINY_G, TINY_L, MemorySource, their_clip, tiny_part
from tests.library.sd3.t5_files import TINY_T5, their_t5, tiny_t5_part

WIDE_T5 = dataclasses.replace(TINY_T5, width=48)  # the context: CLIP's 16 + 24 channels fit in
CAPTIONS = ["a cat", " ".join(["a red cat"] * 40), "", "wow!!"]
TOKENS = 20


def text_parts(*, with_t5: bool = True, **g_changes) -> Sd3TextParts:
    t5 = tiny_t5_part(WIDE_T5) if with_t5 else None
    return Sd3TextParts(clip_l=tiny_part(TINY_L), clip_g=tiny_part(dataclasses.replace(TINY_G, **g_changes)), t5=t5)


def loaded(*, with_t5: bool = True, places: dict | None = None, **settings) -> Sd3TextEncoder:
    parts = text_parts(with_t5=with_t5)
    encoder = build_text_encoder(parts, **{"t5_tokens": TOKENS, **settings})
    load_text_encoder(encoder, parts, **(places or {}))
    return encoder


@pytest.fixture(scope="module")
def encoder() -> Sd3TextEncoder:
    return loaded()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def same(first: Sd3Conditioning, second: Sd3Conditioning) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def random_conditioning(captions: int = 4, *, t5_rows: int = 5) -> Sd3Conditioning:
    shapes = ((77, 16), (77, 24), (t5_rows, 48), (16,), (20,))
    generator = torch.Generator().manual_seed(captions)
    return Sd3Conditioning(*(torch.randn(captions, *shape, generator=generator) for shape in shapes))


# ---------------------------------------------------------------- the encoder


def test_an_encoder_as_it_is_built(encoder):
    assert text_models(encoder) == [encoder.clip_l, encoder.clip_g, encoder.t5] and not encoder.training
    assert len(list(fp8_layers(loaded(fp8=True)))) == 6 * TINY_L.layers + 6 * TINY_G.layers + 7 * WIDE_T5.layers
    assert build_text_encoder(text_parts()).tokenizers.t5.tokens == 256


def test_autocast_is_for_what_is_trained():
    """A frozen encoder gives what it gives by itself, whatever is trained beside it."""
    encoder = loaded()
    alone = encoder.encode(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(encoder.encode(CAPTIONS), alone)
        encoder.clip_g.takes_autocast = True  # as where a network is trained on it
        mixed = encoder.encode(CAPTIONS)
    assert [name for name in FIELDS if not torch.equal(getattr(mixed, name), getattr(alone, name))] == ["g_states", "g_pooled"]


def test_files_of_either_kind(tiny_sd3):
    """Bundled encoders and separate files, among them one with another prefix, are the same models."""
    whole, separate = open_weights(tiny_sd3["sd3_whole"], flag="--x"), []
    for name in ("clip_l", "clip_g", "t5xxl"):
        source = open_weights(tiny_sd3[name], flag="--x")
        held = {f"transformer.{key}": tensor for key, tensor in source.tensors(source.shapes)}
        separate.append(MemorySource(held, source.metadata))
    found = []
    for sources, prefixes in (([whole] * 3, "text_encoders.{}.transformer."), (separate, "transformer.")):
        l, g, t5 = (prefixes.format(name) for name in ("clip_l", "clip_g", "t5xxl"))  # noqa: E741
        parts = Sd3TextParts(
            clip_l=clip_part(sources[0], prefix=l, layout="hf"),
            clip_g=clip_part(sources[1], prefix=g, layout="hf"),
            t5=t5_part(sources[2], prefix=t5),
        )
        assert (parts.clip_l.config.heads, parts.clip_g.config.heads, parts.t5.config.heads) == (2, 3, 3)
        assert (parts.clip_l.config.activation, parts.clip_g.config.activation) == ("quick_gelu", "gelu")
        encoder = build_text_encoder(parts)
        load_text_encoder(encoder, parts)
        found.append(encoder.encode(CAPTIONS))
    assert same(*found) and found[0].context(48).isfinite().all()
    assert all(0.3 < float(getattr(found[0], name).std()) < 3 for name in FIELDS)


@pytest.mark.parametrize("masked", [False, True])
def test_what_transformers_makes_of_the_same_ids(masked):
    encoder = loaded(mask_clip=masked, mask_t5=masked)
    found, tokenizers = encoder.encode(CAPTIONS), encoder.tokenizers
    for model, tokenizer, states in (
        (encoder.clip_l, tokenizers.clip_l, found.l_states),
        (encoder.clip_g, tokenizers.clip_g, found.g_states),
    ):
        ids = torch.tensor([tokenizer.rows(caption).ids[0] for caption in CAPTIONS])
        used = ids.eq(49407).int().argmax(dim=1) + 1
        mask = (torch.arange(77) < used[:, None]).long() if masked else None
        expected = their_clip(model)(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        assert relative_error(states, expected.hidden_states[-2]) < 1e-5
    assert relative_error(found.g_pooled, expected.text_embeds) < 1e-5
    rows = [tokenizers.t5.row(caption) for caption in CAPTIONS]
    mask = (torch.arange(TOKENS) < torch.tensor([row.used for row in rows])[:, None]).long() if masked else None
    expected = their_t5(encoder.t5)(input_ids=torch.tensor([row.ids for row in rows]), attention_mask=mask)
    assert relative_error(found.t5_states, expected.last_hidden_state) < 1e-5


def test_each_mask_acts_on_its_encoders_alone(encoder):
    plain, clip, t5 = (e.encode(["a cat"]) for e in (encoder, loaded(mask_clip=True), loaded(mask_t5=True)))
    assert torch.equal(clip.t5_states, plain.t5_states) and not torch.equal(clip.l_states, plain.l_states)
    assert not torch.equal(t5.t5_states, plain.t5_states) and torch.equal(t5.g_states, plain.g_states)
    assert torch.equal(clip.l_states[:, :4], plain.l_states[:, :4])  # padding comes behind what sees only backwards
    assert t5.t5_states[:, -1].abs().max() > 0  # and it is not zeroed


def test_a_caption_does_not_depend_on_its_batch(encoder):
    for caption, found in zip(CAPTIONS, encoder.encode(CAPTIONS).split(), strict=True):
        alone = encoder.encode([caption])
        assert all(relative_error(getattr(found, name), getattr(alone, name)) < 1e-5 for name in FIELDS)


def test_captions_that_are_alike_are_encoded_once_and_many_in_parts(encoder):
    sizes: list[int] = []
    hook = encoder.t5.register_forward_pre_hook(lambda _m, inputs: sizes.append(len(inputs[0])))
    found = encoder.encode(["a cat", "", "a cat", "a cat"])
    assert sizes == [2] and same(found.split()[0], found.split()[3]) and not same(found.split()[0], found.split()[1])
    encoder.encode([str(number) for number in range(T5_BATCH + 3)])
    assert sizes == [2, T5_BATCH, 3]
    with torch.enable_grad():  # each caption has dropout of its own
        encoder.encode(["a cat"] * (T5_BATCH + 1))
    hook.remove()
    assert sizes == [2, T5_BATCH, 3, T5_BATCH + 1]


def test_each_encoder_has_its_dtype():
    encoder = loaded(places={"dtype": torch.float32, "t5_dtype": torch.bfloat16, "t5_device": "cpu"})
    found = encoder.encode(["a cat"], "cpu")
    assert (found.l_states.dtype, found.g_pooled.dtype, found.t5_states.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert found.context(48).dtype == torch.float32
    assert loaded(places={"dtype": torch.bfloat16}).encode(["a cat"]).context(48).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_t5_on_the_cpu_and_the_others_on_a_gpu(encoder):
    places = {"device": "cuda", "t5_device": "cpu"}
    found = loaded(places=places, mask_clip=True, mask_t5=True).encode(CAPTIONS, "cuda")
    expected = loaded(mask_clip=True, mask_t5=True).encode(CAPTIONS)
    assert all(getattr(found, name).device.type == "cuda" for name in FIELDS)
    assert all(relative_error(getattr(found, name).cpu(), getattr(expected, name)) < 1e-3 for name in FIELDS)


def test_without_t5_and_with_its_states_from_elsewhere(encoder):
    clips, whole = loaded(with_t5=False).encode(CAPTIONS), encoder.encode(CAPTIONS)
    assert clips.t5_states.shape[:2] == (4, 0) and len(text_models(loaded(with_t5=False))) == 2
    context = clips.context(48)
    assert context.shape == (4, 77 + 77, 48) and not context[:, 77:].any()
    assert same(clips.with_t5(whole), whole)


def test_gradients_reach_every_encoder(encoder):
    with torch.enable_grad():
        weights = [encoder.clip_l.text_model, encoder.clip_g.text_model, encoder.t5.encoder]
        parameters = [next(p for name, p in model.named_parameters() if "layer_norm" in name) for model in weights]
        for parameter in parameters:
            parameter.requires_grad_(True)
        found = encoder.encode(CAPTIONS[:2])
        (found.context(48).square().mean() + found.pooled.square().mean()).backward()
        for parameter in parameters:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            parameter.requires_grad_(False)
            parameter.grad = None


def test_a_clip_g_without_a_projection_is_refused():
    with pytest.raises(CheckpointError, match="this CLIP-G has no text_projection.weight"):
        build_text_encoder(text_parts(projection=None))


# ---------------------------------------------------------------- the conditioning


def test_the_context_and_the_pooled_vector():
    own = random_conditioning()
    context = own.context(48)
    assert context.shape == (4, 82, 48) and own.pooled.shape == (4, 36)
    assert torch.equal(context[:, :77, :16], own.l_states) and torch.equal(context[:, :77, 16:40], own.g_states)
    assert not context[:, :77, 40:].any() and torch.equal(context[:, 77:], own.t5_states)
    assert torch.equal(own.pooled, torch.cat([own.l_pooled, own.g_pooled], dim=1))


def test_dropping_is_by_encoder_and_caption():
    own = random_conditioning(2)
    no, first, second, both = (torch.tensor(drop) for drop in ([False, False], [True, False], [False, True], [True, True]))
    assert same(own.dropped(no, no, no), own)
    found = own.dropped(first, second, both)
    assert not found.l_states[0].any() and not found.l_pooled[0].any() and torch.equal(found.l_states[1], own.l_states[1])
    assert not found.g_states[1].any() and not found.g_pooled[1].any() and torch.equal(found.g_pooled[0], own.g_pooled[0])
    assert not found.t5_states.any() and found.context(48).shape == own.context(48).shape
    broken = dataclasses.replace(own, t5_states=own.t5_states / 0)
    assert broken.dropped(no, no, both).t5_states.isfinite().all()  # zeros, not products with zero


def test_split_and_stack_are_inverse():
    own = random_conditioning()
    assert same(Sd3Conditioning.stack(own.split()), own) and len(own.split()) == 4
    assert same(own.rows(torch.tensor([1, 1])).split()[1], own.split()[1])


@pytest.mark.parametrize("t5_rows", [5, 0])
def test_through_a_cache_and_back(t5_rows):
    """As entries of a cache come: zeros in place of what is not there."""
    own = random_conditioning(t5_rows=t5_rows)
    entries = [MemoryEntry("entry", part.cache_tensors()) for part in own.split()]
    tensors: dict[str, Tensor] = {}
    for name in FIELDS:
        assert len({entry.layout[name] for entry in entries}) == 1
        tensors[name] = torch.stack([part.cache_tensors()[name] for part in own.split()])
    lengths = {name: [tensor.shape[1]] * 4 for name, tensor in tensors.items()}
    assert same(Sd3Conditioning.from_cache(tensors, lengths), own)
    with pytest.raises(ValueError, match="one caption, not 4"):
        own.cache_tensors()


def test_to_a_device_dtypes_stay():
    own = dataclasses.replace(random_conditioning(), t5_states=torch.zeros(4, 5, 48, dtype=torch.bfloat16))
    moved = own.to("meta", non_blocking=True)
    assert {getattr(moved, name).device.type for name in FIELDS} == {"meta"} and moved.t5_states.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory():
    pinned = random_conditioning().pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in FIELDS)
