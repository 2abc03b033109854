from __future__ import annotations

import copy

import pytest
import torch

from library.errors import TrainingError
from library.nn.attention import set_attention
from library.nn.attention_kernels import AttentionKernel
from library.nn.checkpointing import run_checkpointed
from library.sd3.positions import ScaledPositions, scaled_table
from tests.library.sd3.tiny_mmdit import KINDS, TINY, batch, tiny_denoiser


def test_samples_do_not_see_each_other():
    denoiser, inputs = tiny_denoiser(), batch()
    alone = torch.cat([denoiser(*(tensor[i : i + 1] for tensor in inputs)) for i in range(2)])
    torch.testing.assert_close(denoiser(*inputs), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_the_batch_for_attention_changes_nothing(kind):
    denoiser, inputs = tiny_denoiser(KINDS[kind]), batch()
    expected = denoiser(*inputs)
    set_attention(denoiser, AttentionKernel(split=True))
    torch.testing.assert_close(denoiser(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_every_attention_takes_the_kernel_that_is_set():
    class Counting(AttentionKernel):
        def __call__(self, q, k, v, key_mask=None, *, log_zeros=None):
            calls.append((q.shape[1], k.shape[1], key_mask))
            return super().__call__(q, k, v)

    calls: list = []
    denoiser, inputs = tiny_denoiser(), batch()
    set_attention(denoiser, Counting())
    denoiser(*inputs)
    # of each block the image's own attention, where there is one, and the joint one; the last block has no queries of the context
    assert calls == [(12, 12, None), (21, 21, None)] * 2 + [(12, 21, None)]


def test_what_is_not_needed_of_the_last_block_is_not_computed():
    denoiser = tiny_denoiser()
    seen = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    denoiser(*batch())
    assert seen == [21, 21, 12]
    last = denoiser.blocks[-1].context_block
    assert last.mlp is None and not hasattr(last.attn, "proj")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_gives_equal_gradients(kind, training):
    gradients = []
    for checkpointing in (False, True):
        denoiser = tiny_denoiser(KINDS[kind]).train(training)
        # dropout as a LoRA has it: inside the block, so the recomputation must draw the same mask
        denoiser.blocks[0].x_block.mlp.fc1.register_forward_hook(lambda _m, _i, out: torch.nn.functional.dropout(out, 0.3))
        names = ["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.2.context_block.attn.qkv.weight"]
        weights = [denoiser.get_parameter(name).requires_grad_() for name in names]
        if checkpointing:
            denoiser.run_block = run_checkpointed
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(denoiser(*batch()).square().mean(), weights))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compile_without_breaks(kind):
    def run():
        velocity = denoiser(*batch())
        return velocity, *torch.autograd.grad(velocity.square().mean(), weights)

    denoiser = tiny_denoiser(KINDS[kind])
    names = ["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.1.context_block.mlp.fc1.weight"]
    weights = [denoiser.get_parameter(name).requires_grad_() for name in names]
    expected = run()
    for block in denoiser.blocks:
        block.compile(fullgraph=True, backend="eager")
    for ours, plain in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_residual_stream_in_bf16(weights):
    denoiser = tiny_denoiser(dtype=weights)
    seen = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    inputs = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = denoiser(*inputs)
    assert set(seen) == {torch.bfloat16}
    assert velocity.dtype == torch.float32  # that of the latents
    exact = tiny_denoiser()(*inputs)
    assert (velocity - exact).norm() / exact.norm() < 0.05


def test_bf16_weights_run_without_autocast():
    latents, *others = batch()
    velocity = tiny_denoiser(dtype=torch.bfloat16)(latents.bfloat16(), *others)
    assert velocity.dtype == torch.bfloat16
    exact = tiny_denoiser()(latents, *others)
    assert (velocity - exact).norm() / exact.norm() < 0.05


# ---------------------------------------------------------------- positions


def test_windows_of_each_sample():
    denoiser, inputs = tiny_denoiser(), batch()
    corners = torch.tensor([[0, 9], [5, 2]])
    together = denoiser(*inputs, corners=corners)
    for i in range(2):
        alone = denoiser(*(tensor[i : i + 1] for tensor in inputs), corners=corners[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together - denoiser(*inputs)).abs().max() > 1e-3
    centre = torch.tensor([[4, 4], [4, 4]])  # of 12 rows less 4, of 12 columns less 3
    assert torch.equal(denoiser(*inputs, corners=centre), denoiser(*inputs))


def test_sizes_that_have_no_positions():
    latents, *others = batch(height=26)
    with pytest.raises(TrainingError, match="48x208 pixels are more than 192 on a side, for which the model has positions"):
        tiny_denoiser()(latents, *others)


def test_scaled_positions_take_any_size():
    denoiser = tiny_denoiser()
    assert denoiser.position_side(8, 6) == 12
    denoiser.use_scaled_positions([8, 16, 8])
    assert [denoiser.position_side(*size) for size in ((8, 8), (16, 16), (26, 6))] == [6, 12, 19]
    latents, *others = batch(height=26)
    velocity = denoiser(latents, *others)
    assert velocity.shape == latents.shape and torch.isfinite(velocity).all()
    corners = torch.tensor([[0, 0], [19 - 13, 19 - 3]])  # the last ones that fit
    assert torch.isfinite(denoiser(latents, *others, corners=corners)).all()


def test_scaled_tables_are_made_once():
    positions, cpu = ScaledPositions([4, 8], 64), torch.device("cpu")
    assert positions.table(4, cpu) is positions.table(4, cpu)
    assert positions.table(4, cpu).dtype == torch.float32
    denoiser = tiny_denoiser()
    denoiser.use_scaled_positions([8])
    assert not any("position" in name for name in denoiser.state_dict())
    other = copy.deepcopy(denoiser)
    other.positions(2, 2, None)
    assert not denoiser.scaled_positions._tables


def test_the_middle_of_a_scaled_table_runs_over_the_whole_range():
    table = scaled_table(4, 8, torch.device("cpu")).view(6, 6, 8)
    places = torch.tensor([0.0, 4.0, 8.0, 12.0])
    torch.testing.assert_close(table[1, 1:5, 0], places.sin())  # of the columns
    torch.testing.assert_close(table[1:5, 1, 6], places.cos())  # of the rows


def test_tables_made_in_inference_mode_serve_training():
    denoiser, inputs = tiny_denoiser(), batch()
    denoiser.use_scaled_positions([8])
    with torch.inference_mode():
        denoiser(*inputs)
    weight = denoiser.blocks[0].x_block.attn.qkv.weight.requires_grad_()
    denoiser(*inputs).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_third_party_networks_find_the_blocks_by_their_class_names():
    names = {type(module).__name__ for module in tiny_denoiser(TINY).modules()}
    assert {"MMDiTBlock", "SingleDiTBlock"} <= names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_gpu_nothing_waits(kind):
    """The same numbers as on the CPU, also with windows that were drawn, and no copy that the host waits for."""
    inputs, corners = batch(KINDS[kind]), torch.tensor([[0, 9], [5, 2]])
    expected = tiny_denoiser(KINDS[kind])(*inputs, corners=corners)
    denoiser = tiny_denoiser(KINDS[kind]).to("cuda")
    there = [tensor.to("cuda") for tensor in (*inputs, corners)]
    denoiser(*there[:4], corners=there[4])  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        velocity = denoiser(*there[:4], corners=there[4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(velocity.cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_scaled_table_is_made_without_a_wait():
    expected = scaled_table(16, 64, torch.device("cpu"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = scaled_table(16, 64, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(table.cpu(), expected)
