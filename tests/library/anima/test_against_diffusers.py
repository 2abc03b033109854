"""Our DiT and adapter against diffusers' classes on the same tiny weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from library.anima.layout import DenoiserConfig
from tests.library.anima.tiny_dit import TINY, batch, tiny_denoiser, tiny_weights

diffusers = pytest.importorskip("diffusers", minversion="0.42")

PARTS = {  # ours -> theirs; the first that matches a name's start is used, then again inside the block
    "blocks.": "transformer_blocks.",
    "x_embedder.proj.1.": "patch_embed.proj.",
    "t_embedder.1.": "time_embed.t_embedder.",
    "t_embedding_norm.": "time_embed.norm.",
    "final_layer.linear.": "proj_out.",
    "final_layer.adaln_modulation.1.": "norm_out.linear_1.",
    "final_layer.adaln_modulation.2.": "norm_out.linear_2.",
}
BLOCK_PARTS = {
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    "q_proj.": "to_q.",
    "k_proj.": "to_k.",
    "v_proj.": "to_v.",
    "output_proj.": "to_out.0.",
    "q_norm.": "norm_q.",
    "k_norm.": "norm_k.",
    "mlp.layer1.": "ff.net.0.proj.",
    "mlp.layer2.": "ff.net.2.",
    "adaln_modulation_self_attn.": "norm1.linear_",
    "adaln_modulation_cross_attn.": "norm2.linear_",
    "adaln_modulation_mlp.": "norm3.linear_",
}


def their_name(name: str) -> str:
    ours = next(part for part in PARTS if name.startswith(part))
    renamed = PARTS[ours] + name.removeprefix(ours)
    if ours == "blocks.":
        for part, theirs in sorted(BLOCK_PARTS.items(), key=lambda item: -len(item[0])):
            renamed = renamed.replace("." + part, "." + theirs)
    return renamed


def their_dit(config: DenoiserConfig):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=17,  # the mask comes as a channel of the input: resizing it there needs torchvision
        out_channels=16,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.blocks,
        mlp_ratio=config.mlp_hidden / (config.heads * config.head_dim),
        text_embed_dim=config.context_dim,
        adaln_lora_dim=config.adaln_dim,
        max_size=(128, 512, 512),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6  # as in the original; diffusers has 1e-5
    return model


def test_denoiser():
    config = replace(TINY, width=48, adapter=None)  # diffusers' width is heads * head width
    denoiser, theirs = tiny_denoiser(config), their_dit(config)
    theirs.load_state_dict({their_name(name): tensor for name, tensor in tiny_weights(config).items()}, strict=True)

    latents, sigmas, context = batch(height=10, width=6)
    latents.requires_grad_()
    mask = torch.zeros(2, 1, 10, 6)
    mask[:, :, 6:] = 1
    ours = denoiser(latents, sigmas, context, mask)
    expected = theirs(torch.cat((latents, mask), dim=1).unsqueeze(2), sigmas, context).sample.squeeze(2)
    assert (ours - expected).abs().max() / expected.abs().max() < 3e-5
    gradients = [torch.autograd.grad(out.square().mean(), latents)[0] for out in (ours, expected)]
    assert (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max() < 3e-4


def their_adapter(config: DenoiserConfig):
    adapter = config.adapter
    return diffusers.AnimaTextConditioner(
        source_dim=adapter.source_width,
        target_dim=config.context_dim,
        model_dim=adapter.width,
        num_layers=adapter.blocks,
        num_attention_heads=adapter.heads,
        mlp_ratio=adapter.mlp_hidden / adapter.width,
        target_vocab_size=adapter.vocabulary,
        min_sequence_length=512,
    )


def test_adapter():
    adapter, theirs = TINY.adapter, their_adapter(TINY)
    denoiser = tiny_denoiser()
    theirs.load_state_dict(denoiser.llm_adapter.state_dict(), strict=True)
    states, ids = torch.randn(2, 9, adapter.source_width), torch.randint(0, adapter.vocabulary, (2, 7))
    qwen_mask, t5_mask = torch.ones(2, 9), torch.ones(2, 7)
    qwen_mask[1, 4:], t5_mask[1, 3:] = 0, 0
    ours = denoiser.encode_context(states, qwen_mask, ids, t5_mask)
    expected = theirs(states, ids, t5_mask, qwen_mask)
    assert ours.shape == expected.shape == (2, 512, TINY.context_dim)
    assert (ours - expected).abs().max() / expected.abs().max() < 3e-5
    assert torch.equal(F.pad(ours[:, :7], (0, 0, 0, 505)), ours)
