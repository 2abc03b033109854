"""Which Linears of a language model in the shape of Llama's (Qwen3, Gemma 2) may be kept in 8 bits. Needs no torch."""

from __future__ import annotations

DECODER_FP8_LAYERS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"  # a regular expression; not the embedding
