"""Which Linears of Lumina Image 2.0's denoiser may be kept in 8 bits, as a regular expression of their paths. Needs no torch.

The layers that hold nearly all of its weights: attention and MLP of the blocks. What steers every token by few numbers
(modulation, time, patches) stays; so do the refiners, a tenth of the weights, through which all passes that the blocks know of a
caption.
"""

from __future__ import annotations

DENOISER_FP8_LAYERS = r"layers\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123])"
