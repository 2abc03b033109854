"""What the makers of tiny checkpoints share: random weights that keep a signal's size, CLIP text encoders, image coders.

A weight is a pure function of the seed, the part of the model that it belongs to and its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from library.files.weights_source import file_tensors
from library.randomness import torch_generator
from library.sd import clip_layout, vae_layout
from library.sd.clip_layout import ClipConfig
from library.sd.vae_layout import VaeConfig

if TYPE_CHECKING:
    from torch import Tensor

Gain = Callable[[str], float]
LOG_VARIANCE = -6.0  # of posteriors: narrow ones


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], *, part: str, seed: int, gain: Gain = lambda name: 1.0
) -> dict[str, Tensor]:
    """float32: norms near 1, biases small, matrices with 1/sqrt(inputs) times what ``gain`` says of their name."""
    return {name: _random(name, shape, part=part, seed=seed, gain=gain(name)) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], *, part: str, seed: int, gain: float) -> Tensor:
    import torch

    noise = torch.randn(shape, generator=torch_generator("tiny Stable Diffusion", seed, part, name))
    if name.endswith(".bias"):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    if "embedding.weight" in name:  # a row for each token or position
        return noise if "token" in name else 0.3 * noise
    return noise * (gain / noise[0].numel() ** 0.5)


def clip_weights(config: ClipConfig, *, part: str, seed: int) -> dict[str, Tensor]:
    """Under the names of the module."""

    def gain(name: str) -> float:
        return 0.3 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0

    return random_weights(clip_layout.expected_shapes(config), part=part, seed=seed, gain=gain)


def coder_weights(config: VaeConfig, *, scale: float, shift: float = 0.0, seed: int) -> dict[str, Tensor]:
    """An AutoencoderKL under diffusers' names, whose latents vary by about 1 around 0 once they are (z - shift) * scale."""
    channels = config.latent_channels
    tensors = random_weights(vae_layout.module_shapes(config), part="vae", seed=seed)
    out, into = ("quant_conv", "post_quant_conv") if config.quant else ("encoder.conv_out", "decoder.conv_in")
    tensors[f"{out}.weight"][:channels] /= scale
    tensors[f"{out}.weight"][channels:] *= 0.1
    tensors[f"{out}.bias"][:channels] += shift
    tensors[f"{out}.bias"][channels:] += LOG_VARIANCE
    tensors[f"{into}.weight"] *= scale
    tensors["decoder.conv_out.weight"] *= 0.5  # most colours within [-1, 1]
    return tensors


def original_coder(config: VaeConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The coder's tensors under the original names, as single files have them, attention as 1x1 convolutions."""
    pieces = vae_layout.vae_pieces(config, vae_layout.ORIGINAL)
    return file_tensors(tensors, pieces, matrices_as="convolution")
