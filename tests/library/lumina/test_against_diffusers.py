"""Our Next-DiT against diffusers' class on the same tiny weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.library.lumina.tiny_nextdit import TINY, batch, tiny_denoiser, tiny_weights

diffusers = pytest.importorskip("diffusers", minversion="0.35")

# The sizes that diffusers' class derives from the width
CONFIG = replace(TINY, mlp_hidden=4 * TINY.width, time_width=TINY.width, context_refiners=2, noise_refiners=2)
PARTS = (
    ("cap_embedder.", "time_caption_embed.caption_embedder."),
    ("t_embedder.mlp.0.", "time_caption_embed.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "time_caption_embed.timestep_embedder.linear_2."),
    ("final_layer.adaLN_modulation.1.", "norm_out.linear_1."),
    ("final_layer.linear.", "norm_out.linear_2."),
    ("attention.out.", "attn.to_out.0."),
    ("attention.q_norm.", "attn.norm_q."),
    ("attention.k_norm.", "attn.norm_k."),
    ("attention_norm2.", "norm2."),
    (".w1.", ".linear_1."),
    (".w2.", ".linear_2."),
    (".w3.", ".linear_3."),
    ("adaLN_modulation.1.", "norm1.linear."),
)


def their_name(name: str) -> str:
    for ours, theirs in PARTS:
        name = name.replace(ours, theirs)
    plain = name.startswith("context_refiner.")
    return name.replace("attention_norm1.", "norm1." if plain else "norm1.norm.")


def their_weights() -> dict[str, torch.Tensor]:
    found = {}
    keys = CONFIG.kv_heads * CONFIG.head_dim
    for name, tensor in tiny_weights(CONFIG).items():
        if name.endswith("attention.qkv.weight"):
            thirds = tensor.split((len(tensor) - 2 * keys, keys, keys))
            for letter, third in zip("qkv", thirds, strict=True):
                found[name.replace("attention.qkv", f"attn.to_{letter}")] = third
        else:
            found[their_name(name)] = tensor
    return found


def their_nextdit():
    model = diffusers.Lumina2Transformer2DModel(
        hidden_size=CONFIG.width,
        num_layers=CONFIG.blocks,
        num_refiner_layers=CONFIG.context_refiners,
        num_attention_heads=CONFIG.heads,
        num_kv_heads=CONFIG.kv_heads,
        multiple_of=CONFIG.width,
        axes_dim_rope=CONFIG.axes_dims,
        cap_feat_dim=CONFIG.context_width,
    )
    model.load_state_dict(their_weights())
    for name, module in model.named_modules():
        if name.endswith((".norm_q", ".norm_k")):
            module.eps = CONFIG.qk_norm_eps  # diffusers has 1e-5, the published model 1e-6
    return model


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("lengths", [(7, 3, 5), (4, 4), (6,)])
def test_velocity_is_theirs(lengths, packs):
    denoiser = tiny_denoiser(CONFIG)
    denoiser.packs = packs
    latents, times, states, _ = batch(lengths, height=8, width=10)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        ours = denoiser(latents, times, states, lengths)
        theirs = their_nextdit()(latents, times, states, mask, return_dict=False)[0]
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
