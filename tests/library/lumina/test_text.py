from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.lumina.gemma import build_gemma, causal_mask
from library.lumina.gemma_layout import gemma_part
from library.lumina.system_prompt import with_system_prompt
from library.lumina.text import LuminaConditioning, LuminaTextEncoder, build_text_encoder, load_text_encoder, text_models
from library.lumina.tokenizer import find_gemma_tokenizer
from library.nn.fp8 import FP8, fp8_layers, in_dtype
from library.training.models.model_memory import arrange_text_encoders
from tests.golden.golden_files import relative_error
from tests.library.lumina.gemma_files import gemma_tensors, written
from tests.library.sd.recorder import Recorder, checkpointing_options

CAPTIONS = ["a red circle", "", "a green square and a yellow triangle; the picture shows one thing, seen from above"]
WIDTH = 32
STRONG = 40.0  # times the weights of queries: logits that the soft cap bends


def loaded(path, *, max_tokens: int = 64, system_prompt: str = "", fp8: bool = False, **settings) -> LuminaTextEncoder:
    source = path if hasattr(path, "shapes") else open_weights(path, flag="--gemma2")
    part = gemma_part(source)
    tokenizer = find_gemma_tokenizer(None, source, max_tokens=max_tokens)
    encoder = build_text_encoder(part, tokenizer, system_prompt=system_prompt, fp8=fp8)
    load_text_encoder(encoder, part, **settings)
    return encoder


@pytest.fixture(scope="module")
def encoder(tiny_lumina) -> LuminaTextEncoder:
    return loaded(tiny_lumina["gemma2"])


def conditioning(*lengths: int, dtype: torch.dtype = torch.float32) -> LuminaConditioning:
    states = torch.zeros(len(lengths), max(lengths), 6, dtype=dtype)
    for row, length in zip(states, lengths, strict=True):
        row[:length] = torch.randn(length, 6).to(dtype)
    return LuminaConditioning(states, lengths=lengths)


def assert_equal(a: LuminaConditioning, b: LuminaConditioning) -> None:
    assert a.lengths == b.lengths and a.states.dtype == b.states.dtype and torch.equal(a.states, b.states)


# ---------------------------------------------------------------- states


def test_a_batch_is_its_captions(encoder):
    batch = encoder.encode(CAPTIONS)
    assert batch.states.shape == (3, max(batch.lengths), WIDTH) and batch.lengths[1] == 1
    for row, length in zip(batch.states, batch.lengths, strict=True):
        assert not row[length:].any() and row[:length].any(dim=1).all()
    for one, caption in zip(batch.split(), CAPTIONS, strict=True):
        alone = encoder.encode([caption])
        assert one.lengths == alone.lengths and relative_error(one.states, alone.states) < 1e-5


def strong_gemma(tiny_lumina, path):
    """With queries so large that attention with and without the cap differ by far."""
    tensors = gemma_tensors(tiny_lumina["gemma2"])
    tensors = {name: t * STRONG if name.endswith("q_proj.weight") else t for name, t in tensors.items()}
    return written(path, tensors, like=tiny_lumina["gemma2"])


def their_states(folder, encoder: LuminaTextEncoder, source, **settings) -> torch.Tensor:
    """``hidden_states[-2]`` of the whole model, as transformers makes it of the folder's config, with an attention mask."""
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

    config = json.loads((folder / "config.json").read_text())
    theirs = Gemma2Model(Gemma2Config(**{**config, **settings}, attn_implementation="eager")).eval()
    tensors = dict(source.tensors(source.shapes))
    theirs.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name != "spiece_model"})
    rows = [encoder.tokenizer.ids(caption) for caption in CAPTIONS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return states * mask[:, :, None]


@pytest.mark.parametrize("is_strong", [False, True])
def test_equals_transformers_second_last_states_with_the_soft_cap(tiny_lumina, tmp_path, is_strong):
    source = (
        strong_gemma(tiny_lumina, tmp_path / "strong.safetensors") if is_strong else open_weights(tiny_lumina["gemma2"], flag="")
    )
    encoder = loaded(source)
    ours = encoder.encode(CAPTIONS).states
    folder = tiny_lumina["gemma2_folder"]
    assert relative_error(ours, their_states(folder, encoder, source)) < 1e-5
    without_cap = their_states(folder, encoder, source, attn_logit_softcapping=None)
    assert (relative_error(ours, without_cap) > 1e-2) is is_strong


def test_the_cap_bends_what_is_fed_into_attention(tiny_lumina, tmp_path):
    """Whatever attention transformers picks: the states of a model with a cap are not those of one without."""
    source = strong_gemma(tiny_lumina, tmp_path / "strong.safetensors")
    capped = loaded(source)
    part = gemma_part(source)
    object.__setattr__(part.config, "softcap", 1e6)  # as good as none
    free = build_text_encoder(part, capped.tokenizer)
    load_text_encoder(free, part)
    assert relative_error(capped.encode(CAPTIONS).states, free.encode(CAPTIONS).states) > 1e-2


def test_the_last_layer_and_the_norm_are_not_there(encoder, tiny_lumina):
    (model,) = text_models(encoder)
    assert len(model.layers) == 2 and not list(model.norm.parameters())
    assert set(model.state_dict()) == set(gemma_part(open_weights(tiny_lumina["gemma2"], flag="")).pieces)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert paths[0] == "layers.0.self_attn.q_proj" and paths[-1] == "layers.1.mlp.down_proj"


def test_long_texts_lose_their_end(tiny_lumina, encoder):
    short = loaded(tiny_lumina["gemma2"], max_tokens=5).encode(CAPTIONS)
    assert short.lengths == tuple(min(length, 5) for length in encoder.encode(CAPTIONS).lengths)
    whole = encoder.encode(CAPTIONS)
    assert relative_error(short.states[2, :5], whole.states[2, :5]) < 1e-5  # causal: what is cut had no part in it


def test_the_system_prompt_stands_before_captions_that_say_something(tiny_lumina, encoder):
    assert with_system_prompt("a cat", "Draw.") == "Draw. <Prompt Start> a cat"
    assert with_system_prompt("", "Draw.") == "" and with_system_prompt("a cat", "") == "a cat"
    prompted = loaded(tiny_lumina["gemma2"], system_prompt="Draw.")
    assert_equal(prompted.encode(["a cat", ""]), encoder.encode(["Draw. <Prompt Start> a cat", ""]))
    assert_equal(prompted.encode_prompts(["a cat", ""]), encoder.encode(["a cat", ""]))


def test_the_model_never_looks_at_a_number(encoder):
    with Recorder() as recorder, torch.no_grad():
        encoder.encode(CAPTIONS)
    assert not any("_local_scalar_dense" in name for name in recorder.names)


def test_bfloat16_keeps_the_tables_exact(tiny_lumina, encoder):
    half = loaded(tiny_lumina["gemma2"], dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    batch = half.encode(CAPTIONS)
    assert batch.states.dtype == torch.bfloat16
    assert relative_error(batch.states, encoder.encode(CAPTIONS).states) < 0.05


def test_frozen(encoder):
    assert not encoder.training and not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))


def test_every_table_is_real_in_half_precision_too(tiny_lumina):
    half = loaded(tiny_lumina["gemma2"], dtype=torch.float16)
    assert not any(tensor.is_meta for tensor in (*half.parameters(), *half.buffers()))
    assert half.encode(CAPTIONS).states.isfinite().all()


def test_the_mask_is_causal():
    mask = causal_mask(3, dtype=torch.float32, device=torch.device("cpu"))
    assert mask.shape == (1, 1, 3, 3)
    assert torch.equal(mask[0, 0] == 0, torch.ones(3, 3).tril().bool()) and mask.min() == torch.finfo(torch.float32).min


def test_a_tokenizer_of_another_model_is_refused(tiny_lumina):
    source = open_weights(tiny_lumina["gemma2"], flag="--gemma2")
    part = gemma_part(source)
    object.__setattr__(part.config, "vocabulary", 300)
    with pytest.raises(CheckpointError, match="Gemma 2 only 300"):
        build_text_encoder(part, find_gemma_tokenizer(None, source, max_tokens=9))


# ---------------------------------------------------------------- memory


def test_weights_in_8_bits(tiny_lumina, encoder):
    small = loaded(tiny_lumina["gemma2"], fp8=True, dtype=torch.bfloat16)
    layers = list(fp8_layers(small.model))
    assert len(layers) == 2 * 7 and all(layer.weight.dtype == FP8 for layer in layers)
    assert small.model.embed_tokens.weight.dtype == torch.bfloat16
    rounded = copy.deepcopy(encoder)
    for layer in layers:
        own = rounded.model.get_submodule(layer.path)
        own.weight = nn.Parameter(in_dtype(layer.weight, layer.weight_scale, torch.float32), requires_grad=False)
    assert relative_error(small.encode(CAPTIONS).states, rounded.encode(CAPTIONS).states) < 0.05


def test_gradients_flow_through_frozen_layers_and_checkpointing_changes_nothing(encoder):
    """A stand-in of a LoRA: something trained is added behind a projection of the first layer."""
    results, saved = [], []
    for checkpointing in (None, "plain"):
        own = copy.deepcopy(encoder)
        trained = nn.Parameter(torch.zeros(32))
        own.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _m, _i, out, trained=trained: out + trained)
        arrange_text_encoders(checkpointing_options(checkpointing), text_models(own))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = own.encode(CAPTIONS).states.square().mean()
        loss.backward()
        results.append((loss.detach(), trained.grad))
        saved.append(sum(sizes))
        assert all(parameter.grad is None for parameter in own.model.parameters())
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0 and saved[1] < saved[0] / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_the_gpu(encoder):
    there = copy.deepcopy(encoder).to("cuda")
    there.encode(CAPTIONS)  # what is done once, such as choosing kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        text = there.encode(CAPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(text.states.cpu(), encoder.encode(CAPTIONS).states) < 1e-3


# ---------------------------------------------------------------- conditioning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 5])
def test_a_cache_entry_comes_back_from_a_file(tmp_path, length, dtype):
    text = conditioning(length, dtype=dtype)
    tensors = text.cache_tensors()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {"states": ((length, 6), dtype)}
    save_safetensors(tmp_path / "text.safetensors", tensors)
    back = dict(read_tensors(read_header(tmp_path / "text.safetensors")))
    assert_equal(LuminaConditioning.from_cache({"states": back["states"][None]}, {"states": [length]}), text)


def test_only_valid_rows_are_cached(encoder):
    batch = encoder.encode(CAPTIONS)
    assert [len(one.cache_tensors()["states"]) for one in batch.split()] == list(batch.lengths)
    with pytest.raises(ValueError):
        batch.cache_tensors()


def test_split_undoes_stack():
    parts = [conditioning(length) for length in (3, 1, 5)]
    batch = LuminaConditioning.stack(parts)
    assert batch.states.shape == (3, 5, 6) and batch.lengths == (3, 1, 5)
    for one, part in zip(batch.split(), parts, strict=True):
        assert_equal(one, part)
    again = LuminaConditioning.stack([LuminaConditioning.stack(parts[:2]), parts[2]])
    assert_equal(again, batch)
    padded = {"states": torch.nn.utils.rnn.pad_sequence([p.cache_tensors()["states"] for p in parts], batch_first=True)}
    assert_equal(LuminaConditioning.from_cache(padded, {"states": [3, 1, 5]}), batch)


def test_moves():
    text = conditioning(2, 3)
    assert_equal(text.to("cpu", non_blocking=True), text)
    assert text.to("meta").states.is_meta and text.to("meta").lengths == (2, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory():
    text = conditioning(2, 3)
    assert_equal(text.pin_memory(), text)
    assert text.pin_memory().states.is_pinned()


def test_the_published_sizes_are_built():
    from library.lumina.gemma_layout import GemmaConfig, expected_shapes

    model = build_gemma(GemmaConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = {name for name in expected_shapes(GemmaConfig()) if name.startswith("layers.25.")} | {"norm.weight"}
    assert shapes == {name: shape for name, shape in expected_shapes(GemmaConfig()).items() if name not in unused}
