"""Which Linears of the U-Net of Stable Diffusion may be kept in 8 bits, as a regular expression of their paths. Needs no torch.

Those of the transformer blocks: 85 % of the weights of SDXL, 28 % of those of SD 1 and 2, whose convolutions hold most of the
rest. What steers every pixel by few numbers (time, sizes) stays, and so do proj_in and proj_out, through which a block's whole
result passes.
"""

from __future__ import annotations

UNET_FP8_LAYERS = r".*\.transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
