"""Which Linears of the MMDiT may be kept in 8 bits, as a regular expression of their paths. Needs no torch.

All matrices of the blocks. Those that modulate hold a third of the weights, so they are among them; a value of theirs steers a
channel of every token, but with a scale for each output row they lose no more by the rounding than the others. Patches, noise
level, text and the last layer stay.
"""

from __future__ import annotations

DENOISER_FP8_LAYERS = r"joint_blocks\.\d+\.(context|x)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)"
