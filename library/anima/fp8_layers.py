"""Which Linears of Anima's models may be kept in 8 bits, as regular expressions of their paths. Needs no torch.

Of the DiT the layers that hold nearly all of its weights: attention and MLP. What steers every token by few numbers (modulation,
time, patches) stays. So do the LLM adapter's blocks: a twentieth of the weights, and all that the DiT knows of a caption passes
through them.
"""

from __future__ import annotations

DENOISER_FP8_LAYERS = r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|output)_proj|mlp\.layer[12])"
