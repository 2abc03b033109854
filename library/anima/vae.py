"""The Qwen-Image autoencoder (Wan 2.1 family), run on single images: pixels <-> scaled latents.

The published model is a causal 3-D network for video. Causal means that a kernel sees the present frame with its last
temporal slice and earlier frames, here zeros, with the others. So for one frame every 3-D convolution *is* a 2-D one with
the last slice, and the temporal resampling (``time_conv``), which needs an earlier frame, never runs.

B batch · C channels · H, W pixels · h, w = H / 8, W / 8 latents · z latent channels (16)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima.conv3x3 import Conv3x3
from library.anima.vae_layout import VaeConfig, VaeLayout, layout_of_shapes
from library.errors import CheckpointError, OptionError
from library.files.safetensors_file import read_tensors
from library.nn.loading import load_into

HALO_ROWS = 2  # two 3x3 convolutions in a row, the deepest local layer, see two rows beyond their own


class QwenImageVae(nn.Module):
    """Encoder and decoder for one frame. Frozen: both directions run without gradients.

    ``chunk_size``: rows that a layer works on at a time (even; None = all). Everything but the attention in the middle is
    local, so strips with two extra rows give the same result, and no layer holds more scratch memory than a strip needs.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VaeConfig, *, chunk_size: int | None = None):
        super().__init__()
        if chunk_size is not None and (chunk_size < 2 or chunk_size % 2):
            raise OptionError(f"--vae_chunk_size is {chunk_size}: give an even number of rows, for example 64, or leave it out")
        z = config.latent_channels
        self.config = config
        self.chunk_size = chunk_size
        self.encoder = Encoder(config)
        self.quant_conv = Pointwise(2 * z, 2 * z)
        self.post_quant_conv = Pointwise(z, z)
        self.decoder = Decoder(config)
        for name, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
            # named CPU: also when the modules are built on the meta device, these are real
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, z, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> (B, z, h, w) scaled latents of the posterior's mean."""
        mean, _ = self.moments(pixels)
        return ((mean - self.latents_mean) / self.latents_std).to(mean.dtype)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the posterior's raw mean and log-variance, (B, z, h, w) each."""
        stride = self.config.stride
        if pixels.shape[-2] % stride or pixels.shape[-1] % stride:
            raise ValueError(f"the VAE needs sides that are multiples of {stride}, not {tuple(pixels.shape[-2:])}")
        x = self.encoder(self._prepared(pixels), self.chunk_size)
        mean, log_variance = self.quant_conv(x).contiguous().chunk(2, dim=1)
        return mean, log_variance

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, z, h, w) scaled latents -> (B, 3, H, W) pixels clamped to [-1, 1]."""
        z = latents * self.latents_std + self.latents_mean
        x = self.decoder(self.post_quant_conv(self._prepared(z)), self.chunk_size)
        return x.clamp_(-1, 1).contiguous()

    def _prepared(self, x: Tensor) -> Tensor:
        # channels last: the norms over channels read memory in order, and so do the convolutions
        return x.to(self.quant_conv.weight.dtype).contiguous(memory_format=torch.channels_last)


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2z, h, w)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        blocks: list[nn.Module] = []
        width = config.stem
        for level, out in enumerate(config.widths):
            for _ in range(config.blocks):
                blocks.append(ResidualBlock(width, out))
                width = out
            if level < len(config.widths) - 1:
                blocks.append(Downsample(width))
        self.conv_in = Conv3x3(3, config.stem)
        self.blocks = nn.ModuleList(blocks)
        self.middle = Middle(width)
        self.norm_out = ChannelNorm(width)
        self.conv_out = Conv3x3(width, 2 * config.latent_channels)

    def forward(self, x: Tensor, rows: int | None) -> Tensor:
        x = in_strips(self.conv_in, x, rows)
        for block in self.blocks:
            x = in_strips(block, x, rows)
        x = self.middle(x, rows)
        return in_strips(self._head, x, rows)

    def _head(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, 3, H, W), not clamped."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        blocks: list[nn.Module] = []
        width = config.widths[-1]
        for level, out in enumerate(reversed(config.widths)):
            for _ in range(config.blocks + 1):
                blocks.append(ResidualBlock(width, out))
                width = out
            if level < len(config.widths) - 1:
                blocks.append(Upsample(width))
                width //= 2
        self.conv_in = Conv3x3(config.latent_channels, config.widths[-1])
        self.middle = Middle(config.widths[-1])
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = ChannelNorm(width)
        self.conv_out = Conv3x3(width, 3)

    def forward(self, x: Tensor, rows: int | None) -> Tensor:
        x = self.middle(in_strips(self.conv_in, x, rows), rows)
        for block in self.blocks:
            x = in_strips(block, x, rows)
        return in_strips(self._head, x, rows)

    def _head(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Pointwise(nn.Conv2d):
    """1x1 convolution as a matrix product, which channels-last images already lie right for."""

    def __init__(self, width: int, out: int):
        super().__init__(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1 = ChannelNorm(width)
        self.conv1 = Conv3x3(width, out)
        self.norm2 = ChannelNorm(out)
        self.conv2 = Conv3x3(out, out)
        self.shortcut = Pointwise(width, out) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return y.add_(self.shortcut(x))


class Downsample(nn.Module):
    """Halves both sides: a 3x3 convolution of stride 2, with a row and column of zeros below and to the right."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides (each pixel becomes 2x2 equal ones) and halves the width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.ModuleList):
    """Residual block, attention over all pixels, residual block."""

    def __init__(self, width: int):
        super().__init__([ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)])

    def forward(self, x: Tensor, rows: int | None) -> Tensor:
        before, attention, after = self
        return in_strips(after, attention(in_strips(before, x, rows)), rows)


class Attention(nn.Module):
    """Self-attention with one head as wide as the layer; every pixel attends to every other."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.to_qkv = Pointwise(width, 3 * width)
        self.proj = Pointwise(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, 1, h * w, 3 * C)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # (B, 1, hw, C)
        return self.proj(y.view(B, h, w, C).permute(0, 3, 1, 2)).add_(x)


class ChannelNorm(nn.Module):
    """Each pixel's channels scaled to a root mean square of 1, then by ``gamma``. Returns a tensor the caller may overwrite."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = x.shape[1] ** 0.5 / length.clamp_min_(1e-12)  # 1e-12 as in torch's normalize, which the published model uses
        return (x * scale.to(x.dtype)).mul_(self.gamma.view(-1, 1, 1))


ROW_SCALE: dict[type, float] = {Downsample: 0.5, Upsample: 2.0}  # rows out per row in; 1 for every other layer


def in_strips(layer: Callable[[Tensor], Tensor], x: Tensor, rows: int | None) -> Tensor:
    """``layer(x)`` for x (B, C, H, W), computed on strips of ``rows`` rows, each with its neighbours' rows around it.

    The zeros that a convolution puts beyond a strip's edge reach only the halo, which is cut off; at the image's own edge
    there is no halo and the zeros are the layer's own.
    """
    height = x.shape[2]
    if rows is None or height <= rows:
        return layer(x)
    scale = ROW_SCALE.get(type(layer), 1)
    strips = ((top, min(top + rows, height)) for top in range(0, height, rows))
    out: Tensor | None = None
    for top, bottom in strips:
        first = max(top - HALO_ROWS, 0)
        strip = layer(x[:, :, first : bottom + HALO_ROWS].contiguous(memory_format=torch.channels_last))
        if out is None:
            shape = (strip.shape[0], strip.shape[1], int(height * scale), strip.shape[3])
            out = torch.empty(shape, dtype=strip.dtype, device=strip.device, memory_format=torch.channels_last)
        skip, start, end = int((top - first) * scale), int(top * scale), int(bottom * scale)
        out[:, :, start:end] = strip[:, :, skip : skip + end - start]
    assert out is not None
    return out


def load_vae(
    layout: VaeLayout,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    disable_cache: bool = False,
) -> QwenImageVae:
    """Builds the VAE and streams its weights in, tensor by tensor, in ``dtype`` on ``device``.

    ``disable_cache`` asks the published video model not to keep a frame cache (features of earlier frames, handed from frame to
    frame). An image has no earlier frame and this module never keeps such a cache: both values give the same result with the
    same memory, so the flag is honoured by construction.
    Raises CheckpointError when a pickle file holds another model or more than tensors.
    """
    del disable_cache
    tensors: Iterable[tuple[str, Tensor]]
    if layout.header is None:
        tensors_by_name = read_pickled_tensors(layout.path)
        layout = layout_of_shapes(layout.path, {name: tuple(tensor.shape) for name, tensor in tensors_by_name.items()})
        # cloned one by one: the file may be mapped, and a model must not hang on a file that can be replaced
        tensors = ((name, tensor.clone()) for name, tensor in tensors_by_name.items())
    else:
        tensors = read_tensors(layout.header, layout.names)
    with torch.device("meta"):
        vae = QwenImageVae(layout.known_config, chunk_size=chunk_size)
    load_into(vae, single_frame_weights(tensors, layout.names), device=device, dtype=dtype)
    return vae.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stubs lack it


def single_frame_weights(tensors: Iterable[tuple[str, Tensor]], names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """File tensors -> this module's: renamed, 3-D kernels cut to their last temporal slice, norm weights flattened."""
    for name, tensor in tensors:
        if name not in names:
            continue
        if tensor.ndim == 5:
            tensor = tensor[:, :, -1].contiguous()  # a copy: a view would keep all slices in memory
        yield names[name], tensor.flatten() if name.endswith(".gamma") else tensor


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``/``.pt`` file, memory-mapped where its format allows. Never runs code from the file."""
    import pickle
    import zipfile

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = "it holds more than tensors, or is damaged"
        raise CheckpointError(f"cannot load {path}: {reason}; use the .safetensors file of this VAE") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
