"""Our MMDiT against that of diffusers, on the same tiny weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.sd3.layout import CONTEXT, IMAGE, MmditConfig, expected_shapes
from tests.library.sd3.tiny_mmdit import KINDS, batch, tiny_denoiser, tiny_weights

diffusers = pytest.importorskip("diffusers")

MODULES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# inside of a block, of the image's and of the context's half; q, k and v lie in one tensor in ours
IN_BLOCK = {
    IMAGE: {
        "attn.qkv": "attn.to_{}", "attn.proj": "attn.to_out.0", "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
        "attn2.qkv": "attn2.to_{}", "attn2.proj": "attn2.to_out.0", "attn2.ln_q": "attn2.norm_q", "attn2.ln_k": "attn2.norm_k",
        "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear",
    },
    CONTEXT: {
        "attn.qkv": "attn.add_{}_proj", "attn.proj": "attn.to_add_out", "attn.ln_q": "attn.norm_added_q",
        "attn.ln_k": "attn.norm_added_k", "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2",
        "adaLN_modulation.1": "norm1_context.linear",
    },
}  # fmt: skip


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """diffusers' last modulations are scale, then shift."""
    return torch.cat(tensor.chunk(2)[::-1])


def their_weights(config: MmditConfig) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tiny_weights(config).items():
        module, _, leaf = name.rpartition(".")
        if name == "pos_embed":
            found["pos_embed.pos_embed"] = tensor
        elif module == "final_layer.adaLN_modulation.1":
            found[f"norm_out.linear.{leaf}"] = swapped(tensor)
        elif not name.startswith("joint_blocks."):
            found[f"{MODULES.get(module, module)}.{leaf}"] = tensor
        else:
            found |= block_weights(config, name, tensor)
    return found


def block_weights(config: MmditConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    _, number, stream, rest = name.split(".", 3)
    module, _, leaf = rest.rpartition(".")
    theirs = f"transformer_blocks.{number}.{IN_BLOCK[stream][module]}.{leaf}"
    if module.endswith("qkv"):
        return {theirs.format(letter): third for letter, third in zip("qkv", tensor.chunk(3), strict=True)}
    is_last_context = stream == CONTEXT and int(number) == config.blocks - 1
    return {theirs: swapped(tensor) if module.startswith("adaLN") and is_last_context else tensor}


def their_mmdit(config: MmditConfig):
    return diffusers.SD3Transformer2DModel(
        sample_size=2 * config.position_side,
        patch_size=config.patch,
        in_channels=config.in_channels,
        num_layers=config.blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        out_channels=config.in_channels,
        pos_embed_max_size=config.position_side,
        dual_attention_layers=config.dual_blocks,
        qk_norm="rms_norm" if config.qk_norm else None,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser(kind):
    config = replace(KINDS[kind], mlp_hidden=4 * KINDS[kind].width)  # as diffusers always has it
    theirs, ours = their_mmdit(config), tiny_denoiser(config)
    theirs.load_state_dict(their_weights(config), strict=True)
    assert len(expected_shapes(config)) == len(ours.state_dict())

    latents, timesteps, context, pooled = (t.requires_grad_() for t in batch(config, height=10, width=6))
    velocity = ours(latents, timesteps, context, pooled)
    expected = theirs(latents, context, pooled, timesteps).sample
    assert (velocity - expected).abs().max() / expected.abs().max() < 3e-5
    gradients = [torch.autograd.grad(out.square().mean(), (latents, context, pooled)) for out in (velocity, expected)]
    for own, other in zip(*gradients, strict=True):
        assert (own - other).abs().max() / other.abs().max() < 3e-4
