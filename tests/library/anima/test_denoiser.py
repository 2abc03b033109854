from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from library.anima.denoiser import ROPE_TABLES_KEPT, grid_angles
from library.anima.layout import DenoiserConfig
from library.nn.checkpointing import run_checkpointed
from networks import lora_anima
from tests.library.anima.tiny_dit import TINY, batch, tiny_denoiser


def captions(lengths=((9, 7), (4, 3))):
    """prompt_embeds, qwen_mask, t5_ids, t5_mask for (Qwen3 tokens, T5 tokens) of each caption, padded to the longest."""
    generator = torch.Generator().manual_seed(2)
    states, tokens = max(s for s, _ in lengths), max(t for _, t in lengths)
    qwen_mask = torch.tensor([[i < s for i in range(states)] for s, _ in lengths]).long()
    t5_mask = torch.tensor([[i < t for i in range(tokens)] for _, t in lengths]).long()
    embeds = torch.randn(len(lengths), states, TINY.adapter.source_width, generator=generator)
    ids = torch.randint(2, 64, (len(lengths), tokens), generator=generator)
    return embeds * qwen_mask.unsqueeze(-1), qwen_mask, ids * t5_mask, t5_mask


def test_context_is_padded_to_512_rows_of_zeros():
    context = tiny_denoiser().encode_context(*captions())
    assert context.shape == (2, 512, TINY.context_dim)
    assert context[0, :7].abs().min() > 0 and context[1, :3].abs().min() > 0
    assert not context[0, 7:].any() and not context[1, 3:].any()


def test_padding_of_the_captions_changes_nothing():
    denoiser = tiny_denoiser()
    embeds, qwen_mask, ids, t5_mask = captions()
    padded = [torch.nn.functional.pad(t, (0, 5)) for t in (qwen_mask, ids, t5_mask)]
    longer = denoiser.encode_context(torch.nn.functional.pad(embeds, (0, 0, 0, 5)), padded[0], padded[1], padded[2])
    torch.testing.assert_close(longer, denoiser.encode_context(embeds, qwen_mask, ids, t5_mask))


def test_full_masks_are_no_masks():
    denoiser = tiny_denoiser()
    embeds, qwen_mask, ids, t5_mask = captions(((6, 5), (6, 5)))
    torch.testing.assert_close(
        denoiser.encode_context(embeds, None, ids, None), denoiser.encode_context(embeds, qwen_mask, ids, t5_mask)
    )


def test_empty_caption_is_finite_and_the_same_alone_or_in_a_batch():
    denoiser = tiny_denoiser()
    together = denoiser.encode_context(*captions(((6, 4), (0, 1))))
    alone = denoiser.encode_context(torch.zeros(1, 0, 28), torch.zeros(1, 0), torch.ones(1, 1).long() * 7, torch.ones(1, 1))
    assert torch.isfinite(together).all() and torch.isfinite(alone).all()
    embeds, qwen_mask, ids, t5_mask = captions(((6, 4), (0, 1)))
    ids[1, 0] = 7
    torch.testing.assert_close(denoiser.encode_context(embeds, qwen_mask, ids, t5_mask)[1:], alone)


def test_too_many_tokens_are_refused():
    with pytest.raises(AssertionError, match="7 T5 tokens do not fit 6"):
        tiny_denoiser().encode_context(*captions(), rows=6)


def test_samples_do_not_see_each_other():
    denoiser = tiny_denoiser()
    latents, sigmas, context = batch()
    together = denoiser(latents, sigmas, context)
    alone = torch.cat([denoiser(latents[i : i + 1], sigmas[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_zero_rows_of_the_context_take_part():
    denoiser = tiny_denoiser()
    latents, sigmas, context = batch()
    padded = torch.nn.functional.pad(context, (0, 0, 0, 20))
    assert (denoiser(latents, sigmas, context) - denoiser(latents, sigmas, padded)).abs().max() > 1e-3


def velocity_and_gradients(denoiser, used_rows, lengths=((9, 70), (4, 3))):
    weights = [p for name, p in denoiser.named_parameters() if "_proj" in name or "_norm.weight" in name]
    latents, sigmas, _ = batch()
    velocity = denoiser(latents, sigmas, denoiser.encode_context(*captions(lengths)), used_rows=used_rows)
    return velocity.detach(), *torch.autograd.grad(velocity.square().mean(), weights)


def test_zero_rows_that_are_left_out_change_nothing():
    denoiser = tiny_denoiser().requires_grad_()
    context = denoiser.encode_context(*captions(((9, 70), (4, 3))))
    kept, log_zeros = denoiser.cut_context(context, 70)
    assert kept.shape[1] == 128 and log_zeros.exp().item() == pytest.approx(512 - 128)
    for cut, plain in zip(velocity_and_gradients(denoiser, 70), velocity_and_gradients(denoiser, None), strict=True):
        assert (cut - plain).abs().max() < 3e-5 * plain.abs().max() and plain.any()


def test_layers_that_make_something_of_zeros_get_every_row():
    denoiser = tiny_denoiser().requires_grad_()
    for block in denoiser.blocks:
        block.cross_attn.v_proj.forward = lambda x, frozen=block.cross_attn.v_proj.forward: frozen(x) + 1
    plain = velocity_and_gradients(denoiser, None)[0]
    assert (velocity_and_gradients(denoiser, 70)[0] - plain).abs().max() > 1e-3 * plain.abs().max()
    denoiser.cuts_zero_rows = False
    assert torch.equal(velocity_and_gradients(denoiser, 70)[0], plain)


def test_zero_rows_that_are_left_out_change_nothing_under_a_lora():
    results = []
    for used_rows in (None, 70):
        denoiser = tiny_denoiser()
        torch.manual_seed(0)
        network = lora_anima.create_network(1.0, 4, 4.0, None, None, denoiser, train_llm_adapter="true")
        network.apply_to(None, denoiser, False, True)
        for lora in network.unet_loras:
            torch.nn.init.normal_(lora.lora_up.weight)
        latents, sigmas, _ = batch()
        context = denoiser.encode_context(*captions(((9, 70), (4, 3))))
        velocity = denoiser(latents, sigmas, context, used_rows=used_rows)
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        results.append((velocity.detach(), *torch.autograd.grad(velocity.square().mean(), trained)))
    for plain, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_long_captions_are_computed_whole():
    denoiser = tiny_denoiser()
    context = torch.randn(1, 512, TINY.context_dim)
    assert denoiser.cut_context(context, 257) == (context, None)
    assert denoiser.cut_context(context, None) == (context, None)


def test_autocast_decides_whether_rows_can_be_left_out(monkeypatch):
    asked = []
    monkeypatch.setattr("library.anima.denoiser.can_cut", lambda device, dtype, head_dim: asked.append((dtype, head_dim)))
    denoiser, context = tiny_denoiser(), torch.zeros(1, 512, TINY.context_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser.cut_context(context, 5) == (context, None)
    denoiser.cut_context(context, 5)
    assert asked == [(torch.bfloat16, TINY.head_dim), (torch.float32, TINY.head_dim)]


def test_no_attention_is_given_a_mask_where_there_is_none(monkeypatch):
    masks = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **how):
        masks.append(attn_mask is not None)
        return plain(*args, attn_mask=attn_mask, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    denoiser = tiny_denoiser()
    embeds, qwen_mask, ids, t5_mask = captions(((6, 5), (6, 5)))
    latents, sigmas, _ = batch()
    denoiser(latents, sigmas, denoiser.encode_context(embeds, None, ids, None))
    assert masks == [False] * 8
    masks.clear()
    denoiser.encode_context(embeds, qwen_mask, ids, None)
    assert masks == [False, True] * 2  # self-attention, cross-attention


def test_padding_mask_is_seen_at_any_size():
    denoiser = tiny_denoiser()
    inputs = batch()
    mask = torch.zeros(2, 1, 8, 6)
    mask[:, :, 4:] = 1
    large = mask.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    masked = denoiser(*inputs, mask)
    assert torch.equal(masked, denoiser(*inputs, large))
    assert not torch.allclose(masked, denoiser(*inputs))


@pytest.mark.parametrize(("training", "used"), [(True, None), (False, None), (True, 7)])
def test_checkpointing_gives_equal_gradients(training, used):
    gradients = []
    for checkpointing in (False, True):
        denoiser = tiny_denoiser().train(training)
        # dropout as a LoRA has it: inside the block, so the recomputation must draw the same mask
        denoiser.blocks[0].mlp.layer1.register_forward_hook(lambda _m, _i, out: torch.nn.functional.dropout(out, 0.3))
        names = ["blocks.0.self_attn.q_proj.weight", "blocks.1.mlp.layer2.weight", "llm_adapter.blocks.0.mlp.0.weight"]
        weights = [denoiser.get_parameter(name).requires_grad_() for name in names]
        if checkpointing:
            denoiser.run_block = denoiser.llm_adapter.run_block = run_checkpointed
        torch.manual_seed(0)
        latents, sigmas, _ = batch()
        context = denoiser.encode_context(*captions(), rows=128)
        gradients.append(torch.autograd.grad(denoiser(latents, sigmas, context, used_rows=used).square().mean(), weights))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_compile_without_breaks():
    def run():
        context = denoiser.encode_context(*captions(), rows=9)
        velocity = denoiser(latents, sigmas, context)
        return velocity, *torch.autograd.grad(velocity.square().mean(), weights)

    denoiser = tiny_denoiser()
    latents, sigmas, _ = batch()
    names = ["blocks.0.self_attn.q_proj.weight", "llm_adapter.blocks.0.cross_attn.k_proj.weight"]
    weights = [denoiser.get_parameter(name).requires_grad_() for name in names]
    expected = run()
    for block in [*denoiser.blocks, *denoiser.llm_adapter.blocks]:
        block.compile(fullgraph=True, backend="eager")
    for ours, plain in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_captions_of_many_lengths_compile_three_times():
    """Once for the first length, once for any other, and once for those that are not cut."""
    torch.compiler.reset()  # what other tests compiled counts too
    compiled = []
    denoiser = tiny_denoiser(replace(TINY, blocks=1, adapter=None))
    denoiser.blocks[0].compile(fullgraph=True, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    latents, sigmas, _ = batch()
    for used, number in ((3, 1), (64, 1), (70, 2), (190, 2), (256, 2), (257, 3), (10, 3), (512, 3)):
        with torch.no_grad():
            context = torch.nn.functional.pad(torch.randn(2, used, TINY.context_dim), (0, 0, 0, 512 - used))
            denoiser(latents, sigmas, context, used_rows=used)
        assert len(compiled) == number, used


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_residual_stream_in_bf16(weights):
    denoiser = tiny_denoiser(dtype=weights)
    seen = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    latents, sigmas, context = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = denoiser(latents, sigmas, context)
    assert set(seen) == {torch.bfloat16}
    assert velocity.dtype == torch.float32  # that of the latents
    exact = tiny_denoiser()(latents, sigmas, context)
    assert (velocity - exact).norm() / exact.norm() < 0.05


def test_bf16_weights_run_without_autocast():
    denoiser = tiny_denoiser(dtype=torch.bfloat16)
    latents, sigmas, context = batch()
    velocity = denoiser(latents.bfloat16(), sigmas, context)
    assert velocity.dtype == torch.bfloat16
    exact = tiny_denoiser()(latents, sigmas, context)
    assert (velocity - exact).norm() / exact.norm() < 0.05


def test_rope_tables_are_made_once_per_grid_and_bounded():
    denoiser = tiny_denoiser()
    cpu = torch.device("cpu")
    assert denoiser.rope(4, 3, cpu) is denoiser.rope(4, 3, cpu)
    for rows in range(1, ROPE_TABLES_KEPT + 5):
        denoiser.rope(rows, 2, cpu)
    assert len(denoiser._rope_tables) == ROPE_TABLES_KEPT
    assert not any("rope" in name for name in denoiser.state_dict())


def test_tables_made_in_inference_mode_serve_training():
    denoiser = tiny_denoiser()
    latents, sigmas, context = batch()
    with torch.inference_mode():
        denoiser(latents, sigmas, context)
    denoiser.blocks[0].self_attn.q_proj.weight.requires_grad_()
    denoiser(latents, sigmas, context).sum().backward()
    assert torch.isfinite(denoiser.blocks[0].self_attn.q_proj.weight.grad).all()


def test_positions_of_the_published_sizes():
    config = DenoiserConfig()
    angles = grid_angles(config, 3, 5, torch.device("cpu"))
    assert angles.shape == (15, 64)
    assert not angles[:, :22].any()  # 44 channels of time, an image is frame 0
    theta = 10000 * 4 ** (42 / 40)
    row, column = 2, 3
    token = angles[row * 5 + column]
    torch.testing.assert_close(token[22:43], torch.tensor([row * theta ** (-2 * i / 42) for i in range(21)]))
    torch.testing.assert_close(token[43:], torch.tensor([column * theta ** (-2 * i / 42) for i in range(21)]))


def test_a_copy_has_its_own_tables():
    denoiser = tiny_denoiser()
    denoiser.rope(2, 2, torch.device("cpu"))
    other = copy.deepcopy(denoiser)
    other.rope(3, 2, torch.device("cpu"))
    assert len(denoiser._rope_tables) == 1


def test_without_adapter_a_context_can_be_given():
    latents, sigmas, context = batch()
    velocity = tiny_denoiser(replace(TINY, adapter=None))(latents, sigmas, context)
    assert velocity.shape == latents.shape and math.isfinite(velocity.sum().item())


def test_third_party_networks_find_the_blocks_by_their_class_names():
    names = {type(module).__name__ for module in tiny_denoiser().modules()}
    assert {"Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer", "LLMAdapterTransformerBlock"} <= names
