"""The image coder of Stable Diffusion, SDXL, SD3 and Lumina: pixels <-> scaled latents. The network is diffusers' AutoencoderKL.

B batch · C latent channels (4, or 16 of SD3 and Lumina) · H, W pixels · h, w = H / 8, W / 8 latents
scaled = (raw - shift) * scale, once
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.files.weights_source import Part, module_tensors
from library.nn.loading import load_into
from library.nn.transfer import sent
from library.sd.vae_layout import VaeConfig

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as published


class StableDiffusionVae(nn.Module):
    """Encoder and decoder. Frozen: both directions run without gradients."""

    def __init__(self, config: VaeConfig, *, scale: float, shift: float = 0.0):
        from diffusers import AutoencoderKL

        super().__init__()
        self.config, self.scale, self.shift = config, scale, shift
        levels = len(config.widths)
        self.model: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            use_quant_conv=config.quant,
            use_post_quant_conv=config.quant,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.encoder.conv_in.weight.dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> (B, C, h, w) scaled latents, a sample of the posterior.

        A row depends on its own pixels and seed alone, except for rounding: never on its batch, nor on when it is encoded.
        """
        moments = self.moments(pixels)
        noise = posterior_noise(seeds, moments)
        return self.scaled(posterior_sample(moments, noise)).to(moments.dtype)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """(B, 2C, h, w): the posterior's mean, then its log-variance, of raw latents."""
        moments = self.model.encoder(pixels.to(self.dtype))
        return self.model.quant_conv(moments) if self.config.quant else moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled latents -> (B, 3, H, W), about [-1, 1] and not cut to it."""
        raw = (latents.float() / self.scale + self.shift).to(self.dtype)
        return self.model.decoder(self.model.post_quant_conv(raw) if self.config.quant else raw)

    def scaled(self, raw: Tensor) -> Tensor:
        """What the denoiser works on, of raw latents (B, C, h, w)."""
        return (raw - self.shift) * self.scale


def posterior_noise(seeds: Sequence[int], moments: Tensor) -> Tensor:
    """(B, C, h, w) standard normal in fp32 on the device of ``moments`` (B, 2C, h, w); each row of its seed, drawn on the CPU."""
    _, channels, height, width = moments.shape
    shape = (channels // 2, height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return sent(noise, moments.device)


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """moments (B, 2C, h, w), noise (B, C, h, w) -> ``mean + deviation * noise`` (B, C, h, w) in fp32."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return torch.addcmul(mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)), noise)


def load_vae(
    part: Part[VaeConfig], *, device: torch.device | str, dtype: torch.dtype, scale: float, shift: float = 0.0
) -> StableDiffusionVae:
    """Builds the coder and streams its weights in, tensor by tensor, in ``dtype`` on ``device``.

    ``scale`` and ``shift`` count where the file's config says none. Raises CheckpointError where the file has changed since it
    was looked at.
    """
    config = part.config
    own_shift = shift if config.shift is None else config.shift
    with torch.device("meta"):
        vae = StableDiffusionVae(config, scale=config.scale or scale, shift=own_shift)
    load_into(vae.model, module_tensors(part.source, part.pieces), device=device, dtype=dtype)
    if torch.device(device).type == "cpu":
        return vae.eval()  # torch's CPU kernel of channels-last group norms loses digits where a mean outweighs its deviation
    return vae.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stubs lack it
