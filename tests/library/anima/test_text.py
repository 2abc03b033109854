from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from library.anima.text import AnimaConditioning, AnimaTextEncoder, build_text_encoder, load_text_encoder
from library.anima.text_layout import read_text_encoder_layout
from library.anima.tokenizers import TokenizerFiles
from library.errors import CheckpointError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from tests.golden.golden_files import relative_error
from tests.library.anima.tiny_dit import TINY, tiny_denoiser
from tests.library.anima.tiny_qwen import SMALL_VOCABULARY, TINY_QWEN, save_tiny_qwen

CAPTIONS = ["a cat", "", "a watercolor painting of a lighthouse at dusk, with gulls"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> AnimaTextEncoder:
    path = save_tiny_qwen(tmp_path_factory.mktemp("qwen") / "qwen3.safetensors")
    return loaded(path, TokenizerFiles())


def loaded(path, tokenizers, **settings) -> AnimaTextEncoder:
    layout = read_text_encoder_layout(path)
    encoder = build_text_encoder(layout, tokenizers)
    load_text_encoder(encoder, layout, **settings)
    return encoder


def conditioning(*sizes: tuple[int, int], width: int = 6, dtype: torch.dtype = torch.float32) -> AnimaConditioning:
    """Captions of (Qwen3 tokens, T5 tokens)."""
    embeds, ids = [torch.randn(n, width).to(dtype) for n, _ in sizes], [torch.randint(2, 99, (m,)) for _, m in sizes]
    tensors = {"prompt_embeds": pad_sequence(embeds, batch_first=True), "t5_ids": pad_sequence(ids, batch_first=True)}
    lengths = {"prompt_embeds": [n for n, _ in sizes], "t5_ids": [m for _, m in sizes]}
    return AnimaConditioning.from_cache(tensors, lengths)


def from_cache(tensors: Mapping[str, torch.Tensor]) -> AnimaConditioning:
    """One caption as it was cached."""
    lengths = {name: [len(tensor)] for name, tensor in tensors.items()}
    return AnimaConditioning.from_cache({name: tensor[None] for name, tensor in tensors.items()}, lengths)


def assert_equal(a: AnimaConditioning, b: AnimaConditioning) -> None:
    for name in ("prompt_embeds", "qwen_mask", "t5_ids", "t5_mask"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


def test_a_batch_is_its_captions(encoder):
    batch = encoder.encode(CAPTIONS)
    assert batch.prompt_embeds.shape == (3, *batch.qwen_mask.shape[1:], TINY_QWEN.width)
    assert batch.qwen_mask.sum(1).tolist() == [2, 0, 14]
    assert not batch.prompt_embeds[~batch.qwen_mask].any() and not batch.t5_ids[~batch.t5_mask].any()
    for one, caption in zip(batch.split(), CAPTIONS, strict=True):
        alone = encoder.encode([caption])
        assert torch.equal(one.t5_ids, alone.t5_ids) and torch.equal(one.qwen_mask, alone.qwen_mask)
        assert one.prompt_embeds.shape == alone.prompt_embeds.shape
        assert relative_error(one.prompt_embeds, alone.prompt_embeds) < 1e-5


def test_only_empty_captions_do_not_run_the_model(encoder):
    def fail(*_):
        raise AssertionError("the model ran")

    handle = encoder.model.register_forward_pre_hook(fail)
    try:
        batch = encoder.encode(["", ""])
    finally:
        handle.remove()
    empty = AnimaConditioning.empty(TINY_QWEN.width)
    assert_equal(batch, AnimaConditioning.stack([empty, empty]))
    assert batch.qwen_mask.shape == (2, 1) and not batch.qwen_mask.any() and batch.t5_ids.tolist() == [[1], [1]]


def test_padding_behind_a_caption_does_not_reach_it(encoder):
    ids, mask = torch.tensor([[64, 8251, 5, 7]]), torch.tensor([[1, 1, 0, 0]])
    other = torch.tensor([[64, 8251, 900, 12]])
    assert torch.equal(encoder.states(ids, mask), encoder.states(other, mask))


class Looks(TorchDispatchMode):
    """Notes what brings a number to the host, for which a host would wait if it were on a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_the_model_never_looks_at_a_number(encoder):
    with Looks() as looks:
        encoder.states(torch.tensor([[64, 8251, 5, 7], [64, 5, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert not looks.seen
    with Looks() as looks:
        bool(torch.ones(()))
    assert looks.seen


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
    assert relative_error(text.prompt_embeds.cpu(), encoder.encode(CAPTIONS).prompt_embeds) < 1e-3


def test_equals_transformers_with_an_attention_mask(encoder):
    batch = encoder.encode(CAPTIONS)
    ids = [encoder.tokenizers.ids(caption).qwen for caption in CAPTIONS]
    padded = torch.tensor([row + [151643] * (batch.qwen_mask.shape[1] - len(row)) for row in ids])
    with torch.no_grad():
        theirs = encoder.model(input_ids=padded, attention_mask=batch.qwen_mask.long(), use_cache=False).last_hidden_state
    assert relative_error(batch.prompt_embeds, theirs * batch.qwen_mask[:, :, None]) < 1e-5


def test_bfloat16_keeps_the_rotary_tables_exact(tmp_path, encoder):
    path = save_tiny_qwen(tmp_path / "qwen3.safetensors")
    half = loaded(path, encoder.tokenizers, dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    states = half.encode(CAPTIONS).prompt_embeds
    assert states.dtype == torch.bfloat16
    assert relative_error(states, encoder.encode(CAPTIONS).prompt_embeds) < 0.05


def test_frozen(encoder):
    assert not encoder.training and not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))


def test_tokenizer_of_another_model_is_refused(tmp_path, encoder):
    path = save_tiny_qwen(tmp_path / "qwen3.safetensors", SMALL_VOCABULARY)
    with pytest.raises(CheckpointError, match="151,669 tokens"):
        build_text_encoder(read_text_encoder_layout(path), encoder.tokenizers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 4), (0, 1)])
def test_a_cache_entry_comes_back_from_a_file(tmp_path, size, dtype):
    text = conditioning(size, dtype=dtype)
    tensors = text.cache_tensors()
    assert tensors["prompt_embeds"].shape == (size[0], 6) and tensors["prompt_embeds"].dtype == dtype
    assert tensors["t5_ids"].dtype == torch.int32
    save_safetensors(tmp_path / "text.safetensors", tensors)
    assert_equal(from_cache(dict(read_tensors(read_header(tmp_path / "text.safetensors")))), text)


def test_a_batch_from_the_cache_is_its_captions_stacked():
    parts = [conditioning(size) for size in ((3, 4), (0, 1), (5, 2))]
    tensors = [part.cache_tensors() for part in parts]
    columns = {name: [one[name] for one in tensors] for name in tensors[0]}
    lengths = {name: [len(row) for row in column] for name, column in columns.items()}
    padded = {name: pad_sequence(column, batch_first=True) for name, column in columns.items()}
    assert_equal(AnimaConditioning.from_cache(padded, lengths), AnimaConditioning.stack(parts))


def test_split_undoes_stack():
    parts = [conditioning(size) for size in ((3, 4), (0, 1), (5, 2))]
    batch = AnimaConditioning.stack(parts)
    assert batch.prompt_embeds.shape == (3, 5, 6) and batch.t5_ids.shape == (3, 4)
    for one, part in zip(batch.split(), parts, strict=True):
        assert_equal(one, part)
    again = AnimaConditioning.stack([AnimaConditioning.stack(parts[:2]), parts[2]])
    assert_equal(again, batch)


def test_empty_is_the_cached_empty_caption():
    empty = AnimaConditioning.empty(6, torch.bfloat16)
    assert_equal(empty, from_cache(empty.cache_tensors()))
    assert empty.cache_tensors()["prompt_embeds"].shape == (0, 6)
    assert empty.t5_ids.tolist() == [[1]] and empty.t5_mask.tolist() == [[True]] and empty.qwen_mask.tolist() == [[False]]


def test_moves():
    text = conditioning((2, 3))
    assert_equal(text.to("cpu", non_blocking=True), text)
    assert text.to("meta").prompt_embeds.is_meta and text.to("meta").t5_mask.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory():
    text = conditioning((2, 3))
    assert_equal(text.pin_memory(), text)
    assert text.pin_memory().prompt_embeds.is_pinned()


def test_a_cache_entry_is_one_caption():
    with pytest.raises(ValueError, match="one caption, not 2"):
        conditioning((1, 1), (2, 2)).cache_tensors()


def test_lengths_are_known_on_the_host_wherever_a_batch_comes_from(encoder):
    batch = encoder.encode(CAPTIONS)
    from_masks = tuple(zip(batch.qwen_mask.sum(1).tolist(), batch.t5_mask.sum(1).tolist(), strict=True))
    assert batch.lengths == from_masks and batch.lengths[1] == (0, 1)
    parts = batch.split()
    again = AnimaConditioning.stack(parts)
    cached = [part.cache_tensors() for part in parts]
    assert [part.lengths for part in parts] == [(pair,) for pair in from_masks]
    assert [from_cache(tensors).lengths for tensors in cached] == [(pair,) for pair in from_masks]
    assert again.lengths == again.to("meta").lengths == from_masks
    assert AnimaConditioning.empty(TINY_QWEN.width).lengths == ((0, 1),)
    without = AnimaConditioning(*batch._tensors)
    assert [part.lengths for part in without.split()] == [(pair,) for pair in from_masks]
    assert AnimaConditioning.stack([without, batch]).lengths is None


@pytest.mark.parametrize(
    ("sizes", "masked"),
    [
        ([(5, 4)], (False, False)),
        ([(5, 4), (5, 4)], (False, False)),
        ([(5, 4), (5, 3)], (False, True)),
        ([(3, 4), (5, 4)], (True, False)),
        ([(0, 1)], (True, False)),
        ([(0, 1), (5, 4)], (True, True)),
    ],
)
def test_masks_are_handed_on_only_where_they_mask_something(sizes, masked):
    text = conditioning(*sizes)
    embeds, qwen_mask, ids, t5_mask = text.adapter_inputs
    assert embeds is text.prompt_embeds and ids is text.t5_ids
    assert (qwen_mask is not None, t5_mask is not None) == masked
    assert all(mask is None or not mask.all() for mask in (qwen_mask, t5_mask))
    without_lengths = AnimaConditioning(*text._tensors)
    assert without_lengths.adapter_inputs == without_lengths._tensors
    assert text.used_rows == max(m for _, m in sizes)


@pytest.mark.parametrize("sizes", [[(6, 4)], [(6, 4), (6, 3)], [(0, 1)], [(0, 1), (5, 4)]])
def test_the_context_is_the_same_without_the_masks_that_mask_nothing(sizes):
    denoiser = tiny_denoiser()
    text = conditioning(*sizes, width=TINY.adapter.source_width)
    text = replace(text, t5_ids=text.t5_ids % TINY.adapter.vocabulary)
    expected = denoiser.encode_context(*text._tensors)
    torch.testing.assert_close(denoiser.encode_context(*text.adapter_inputs), expected)
    assert not expected[:, text.used_rows :].any()
