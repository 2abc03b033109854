from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from library.lumina.denoiser import NextDit
from library.lumina.layout import expected_shapes
from library.lumina.rotary import KEPT, RotaryTables
from library.lumina.sample_rows import gated, scaled
from library.nn.attention import set_attention
from library.nn.attention_kernels import AttentionKernel
from library.nn.checkpointing import run_checkpointed
from library.nn.compiling import compile_blocks
from tests.library.lumina.tiny_nextdit import TINY, batch, tiny_denoiser

UNLIKE = (7, 3, 5)
TRAINED = (
    "context_refiner.0.attention.qkv.weight",
    "noise_refiner.0.feed_forward.w2.weight",
    *(f"layers.{block}.{leaf}.weight" for block in (0, 1) for leaf in ("adaLN_modulation.1", "attention.out")),
    "final_layer.linear.weight",
)


def gradients(denoiser: NextDit, *inputs) -> list[Tensor]:
    """The velocity, and the gradients of some weights of all parts."""
    weights = [denoiser.get_parameter(name).requires_grad_() for name in TRAINED]
    velocity = denoiser(*inputs)
    generator = torch.Generator().manual_seed(3)
    loss = (velocity * torch.randn(velocity.shape, generator=generator)).sum()
    return [velocity.detach(), *torch.autograd.grad(loss, weights)]


def assert_close(ours: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ours, others, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


def test_names_and_shapes_are_those_of_the_file():
    with torch.device("meta"):
        denoiser = NextDit(TINY)
    assert {name: tuple(t.shape) for name, t in denoiser.state_dict().items()} == expected_shapes(TINY)


@pytest.mark.parametrize("packs", [True, False])
def test_a_sample_sees_nothing_of_its_batch(packs):
    denoiser = tiny_denoiser()
    denoiser.packs = packs
    latents, times, states, lengths = batch(UNLIKE)
    with torch.no_grad():
        together = denoiser(latents, times, states, lengths)
        for number, length in enumerate(lengths):
            one = slice(number, number + 1)
            alone = denoiser(latents[one], times[one], states[one, :length], (length,))
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("behind", [100.0, float("nan")])
def test_rows_behind_a_caption_do_not_count(packs, behind):
    denoiser = tiny_denoiser()
    denoiser.packs = packs
    latents, times, states, lengths = batch(UNLIKE)
    dirty = states.clone()
    for rows, length in zip(dirty, lengths, strict=True):
        rows[length:] = behind
    with torch.no_grad():
        assert torch.equal(denoiser(latents, times, states, lengths), denoiser(latents, times, dirty, lengths))


def test_both_forms_have_the_same_gradients():
    inputs, packed, padded = batch(UNLIKE), tiny_denoiser(), tiny_denoiser()
    padded.packs = False
    assert_close(gradients(packed, *inputs), gradients(padded, *inputs))


@pytest.mark.parametrize("lengths", [UNLIKE, (4, 4)])
def test_checkpointing_and_splitting_change_nothing(lengths):
    plain, saving = tiny_denoiser(), tiny_denoiser()
    for part in saving.modules():
        if hasattr(part, "run_block"):
            part.run_block = run_checkpointed
    set_attention(saving, AttentionKernel(split=True))
    assert_close(gradients(saving, *batch(lengths)), gradients(plain, *batch(lengths)))


def test_an_empty_caption_is_no_caption():
    latents, times, states, lengths = batch((0, 4))
    with torch.no_grad():
        both = tiny_denoiser()(latents, times, states, lengths)
        alone = tiny_denoiser()(latents[:1], times[:1], states[:1], (0,))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


def test_latents_keep_their_dtype_and_weights_theirs():
    denoiser = tiny_denoiser(dtype=torch.bfloat16)
    latents, times, states, lengths = batch(UNLIKE)
    with torch.no_grad():
        velocity = denoiser(latents, times, states, lengths)
        exact = tiny_denoiser()(latents, times, states, lengths)
    assert velocity.dtype == torch.float32 and denoiser.dtype == torch.bfloat16
    assert (velocity - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
def test_autocast_computes_in_bf16_from_end_to_end(packs, weights):
    denoiser = tiny_denoiser(dtype=weights)
    denoiser.packs = packs
    seen: set[torch.dtype] = set()
    for block in denoiser.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(denoiser, *batch(UNLIKE))
    exact = gradients(tiny_denoiser(), *batch(UNLIKE))
    assert seen == {torch.bfloat16}
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


def test_sizes_and_captions_may_change_between_calls():
    denoiser, fresh = tiny_denoiser(), tiny_denoiser()
    for lengths, sides in (((3, 5), (8, 6)), ((5, 3), (6, 8)), ((4, 4), (8, 6)), ((301,), (4, 4)), ((3, 5), (8, 6))):
        inputs = batch(lengths, *sides)
        with torch.no_grad():
            assert torch.equal(denoiser(*inputs), copy.deepcopy(fresh)(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("packs", [True, False])
def test_a_step_on_a_gpu_waits_for_nothing_and_gives_the_same(packs):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    denoiser = tiny_denoiser().cuda()
    denoiser.packs = packs
    inputs = {lengths: batch(lengths) for lengths in ((4, 6), UNLIKE)}
    sent = {lengths: (*(t.cuda() for t in tensors), lengths) for lengths, (*tensors, _) in inputs.items()}
    gradients(denoiser, *sent[4, 6])  # makes the tables of positions
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        velocity = denoiser(*sent[UNLIKE])
        velocity.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        torch.testing.assert_close(velocity.detach().cpu(), tiny_denoiser()(*inputs[UNLIKE]), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- compiled blocks


class Counting:
    """A backend that runs what it gets as it is."""

    graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


def test_compiled_blocks_are_few_graphs_and_equal_numbers():
    torch._dynamo.reset()
    denoiser, plain, counting = tiny_denoiser(), tiny_denoiser(), Counting()
    denoiser.packs = False
    compile_blocks(denoiser, counting, fullgraph=True)
    for lengths, sides in (((3, 5), (8, 6)), ((40, 7), (8, 6)), ((2, 33), (6, 10)), ((70, 9, 8), (4, 8))):
        assert_close(gradients(denoiser, *batch(lengths, *sides)), gradients(plain, *batch(lengths, *sides)))
    assert counting.graphs == 1
    for length in (3, 9, 40):
        assert_close(gradients(denoiser, *batch((length,))), gradients(plain, *batch((length,))))
    assert counting.graphs == 2  # a batch of one has its own
    torch._dynamo.reset()


# ---------------------------------------------------------------- rotary positions, rows of samples


def test_tables_are_made_once_and_the_oldest_is_dropped():
    tables, cpu = RotaryTables(TINY), torch.device("cpu")
    first = tables.of(3, (4, 2), cpu)
    assert first.shape == (3 + 8, TINY.head_dim)
    assert tables.of(3, (4, 2), cpu) is first
    for length in range(4, 4 + KEPT):
        tables.of(length, (4, 2), cpu)
    again = tables.of(3, (4, 2), cpu)
    assert again is not first and torch.equal(again, first)


def test_positions_are_caption_row_and_column():
    table = RotaryTables(TINY).of(3, (2, 2), torch.device("cpu")).view(7, 3, 2, 2)  # token, axis, pair, (cos, sin)
    positions = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [3, 0, 1], [3, 1, 0], [3, 1, 1]])
    angles = positions[:, :, None].double() * 10000.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(table, torch.stack((angles.cos(), angles.sin()), dim=-1).float())


def test_factors_of_samples_behind_each_other():
    spans = (2, 4, 1)
    x, branch = (torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factors = torch.randn(3, 1, 3, dtype=torch.float64, requires_grad=True)
    rows = factors.repeat_interleave(torch.tensor(spans), dim=0).view(1, 7, 3)
    torch.testing.assert_close(scaled(x, factors, spans), x * rows)
    torch.testing.assert_close(gated(x, factors, branch, spans), x + rows * branch)
    assert torch.autograd.gradcheck(lambda x, f: scaled(x, f, spans), (x, factors))
    assert torch.autograd.gradcheck(lambda x, f, b: gated(x, f, b, spans), (x, factors, branch))
