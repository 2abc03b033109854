"""A Qwen-Image VAE of any width whose main path is built, not trained: latents are the colours of 8x8 pixel cells.

Channels 0-5 of every stage carry r, -r, g, -g, b, -b, and channel 6 a constant that keeps the RMS norms nearly linear;
silu(x) - silu(-x) = x lets colours through the two activations at the heads. Everything else is small random weights,
so that every tensor of the checkpoint takes part in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.randomness import torch_generator

if TYPE_CHECKING:
    from torch import Tensor

LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
STAGES = (1, 2, 4, 4)  # channels of each stage in units of the VAE's width
LATENTS = 16
COLOUR_CHANNELS = 6  # r, -r, g, -g, b, -b
CONSTANT_CHANNEL = 6
CONSTANT = 4.0
TYPICAL_NORM = (CONSTANT**2 + 6 * 0.25) ** 0.5  # of one pixel's channels, with colours of about +-0.5
COLOUR_GAIN = 2.0  # a colour deviation of 0.5 becomes a latent deviation of 1
SMALL = 0.05  # size of the random part

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def vae_tensors(width: int, *, seed: int) -> dict[str, Tensor]:
    """All tensors, float32, under the key names of the published single file. ``width`` >= 8: channels of the first stage."""
    tensors = {name: _small(name, shape, seed=seed) for name, shape in _shapes(width)}
    for name, tensor in tensors.items():
        if name.endswith("shortcut.weight"):
            _pass_channels(tensor[:, :, 0, 0, 0])
        elif ".downsamples." in name and name.endswith("resample.1.weight"):
            _average_2x2(tensor)
        elif ".upsamples." in name and name.endswith("resample.1.weight"):
            _smooth_3x3(tensor)
    _build_encoder_ends(tensors, seed=seed)
    _build_decoder_ends(tensors, width, seed=seed)
    return tensors


def _shapes(width: int) -> Shapes:
    widths = [width * factor for factor in STAGES]
    yield from _conv3d("encoder.conv1", 3, width)
    yield from _encoder_stages(widths)
    yield from _middle("encoder", widths[-1])
    yield "encoder.head.0.gamma", (widths[-1], 1, 1, 1)
    yield from _conv3d("encoder.head.2", widths[-1], 2 * LATENTS)
    yield from _conv3d("conv1", 2 * LATENTS, 2 * LATENTS, kernel=(1, 1, 1))
    yield from _conv3d("conv2", LATENTS, LATENTS, kernel=(1, 1, 1))
    yield from _conv3d("decoder.conv1", LATENTS, widths[-1])
    yield from _middle("decoder", widths[-1])
    yield from _decoder_stages(widths[::-1])
    yield "decoder.head.0.gamma", (width, 1, 1, 1)
    yield from _conv3d("decoder.head.2", width, 3)


def _encoder_stages(widths: list[int]) -> Shapes:
    index, inputs = 0, widths[0]
    for stage, outputs in enumerate(widths):
        for _ in range(2):
            yield from _residual(f"encoder.downsamples.{index}", inputs, outputs)
            index, inputs = index + 1, outputs
        if stage < 3:
            yield from _conv2d(f"encoder.downsamples.{index}.resample.1", outputs, outputs, 3)
            if stage > 0:  # the last two halve the frame rate as well
                yield from _conv3d(f"encoder.downsamples.{index}.time_conv", outputs, outputs, kernel=(3, 1, 1))
            index += 1


def _decoder_stages(widths: list[int]) -> Shapes:
    index, inputs = 0, widths[0]
    for stage, outputs in enumerate(widths):
        for _ in range(3):
            yield from _residual(f"decoder.upsamples.{index}", inputs, outputs)
            index, inputs = index + 1, outputs
        if stage < 3:
            yield from _conv2d(f"decoder.upsamples.{index}.resample.1", outputs, outputs // 2, 3)
            if stage < 2:  # the first two double the frame rate as well
                yield from _conv3d(f"decoder.upsamples.{index}.time_conv", outputs, 2 * outputs, kernel=(3, 1, 1))
            index, inputs = index + 1, outputs // 2


def _residual(prefix: str, inputs: int, outputs: int) -> Shapes:
    yield f"{prefix}.residual.0.gamma", (inputs, 1, 1, 1)
    yield from _conv3d(f"{prefix}.residual.2", inputs, outputs)
    yield f"{prefix}.residual.3.gamma", (outputs, 1, 1, 1)
    yield from _conv3d(f"{prefix}.residual.6", outputs, outputs)
    if inputs != outputs:
        yield from _conv3d(f"{prefix}.shortcut", inputs, outputs, kernel=(1, 1, 1))


def _middle(half: str, width: int) -> Shapes:
    yield from _residual(f"{half}.middle.0", width, width)
    yield f"{half}.middle.1.norm.gamma", (width, 1, 1)
    yield from _conv2d(f"{half}.middle.1.to_qkv", width, 3 * width, 1)
    yield from _conv2d(f"{half}.middle.1.proj", width, width, 1)
    yield from _residual(f"{half}.middle.2", width, width)


def _conv3d(prefix: str, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> Shapes:
    yield f"{prefix}.weight", (outputs, inputs, *kernel)
    yield f"{prefix}.bias", (outputs,)


def _conv2d(prefix: str, inputs: int, outputs: int, side: int) -> Shapes:
    yield f"{prefix}.weight", (outputs, inputs, side, side)
    yield f"{prefix}.bias", (outputs,)


def _small(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    import torch

    noise = torch.randn(shape, generator=torch_generator("tiny model", seed, name))
    if name.endswith(".gamma"):
        return 1 + SMALL * noise
    if name.endswith(".bias"):
        return 0.2 * SMALL * noise
    inputs = noise[0].numel()
    # the first convolution of a residual branch and the attention keep the size; the way back to the main path is small
    gain = 1.0 if name.endswith(("residual.2.weight", "to_qkv.weight")) else SMALL
    return noise * (gain / inputs**0.5)


def _pass_channels(matrix: Tensor) -> None:
    """Adds the identity to ``matrix`` (outputs, inputs) in place."""
    matrix.diagonal().add_(1.0)


def _average_2x2(weight: Tensor) -> None:
    for row in range(2):  # stride 2, padded at the right and bottom: taps 0 and 1 cover one 2x2 cell
        for column in range(2):
            weight[:, :, row, column].diagonal().add_(0.25)


def _smooth_3x3(weight: Tensor) -> None:
    for row, down in enumerate((0.25, 0.5, 0.25)):
        for column, across in enumerate((0.25, 0.5, 0.25)):
            weight[:, :, row, column].diagonal().add_(down * across)


def _colour_matrix(seed: int) -> Tensor:
    """(16, 3): normalised latents of a colour; every latent channel sees some colour with the same strength."""
    import torch

    matrix = torch.randn(LATENTS, 3, generator=torch_generator("tiny model", seed, "colours"))
    return COLOUR_GAIN * matrix / matrix.norm(dim=1, keepdim=True)


def _build_encoder_ends(tensors: dict[str, Tensor], *, seed: int) -> None:
    import torch

    first = tensors["encoder.conv1.weight"][:, :, 2, 1, 1]  # one frame: only the last temporal slice sees it
    for colour in range(3):
        first[2 * colour, colour] += 1.0
        first[2 * colour + 1, colour] -= 1.0
    tensors["encoder.conv1.bias"][CONSTANT_CHANNEL] += CONSTANT
    head = tensors["encoder.head.2.weight"]
    channels = head.shape[1]
    to_latent = torch.tensor(LATENTS_STD)[:, None] * _colour_matrix(seed) * (TYPICAL_NORM / channels**0.5)
    head[:LATENTS, 0:COLOUR_CHANNELS:2, 2, 1, 1] += to_latent
    head[:LATENTS, 1:COLOUR_CHANNELS:2, 2, 1, 1] -= to_latent
    tensors["encoder.head.2.bias"][:LATENTS] += torch.tensor(LATENTS_MEAN)
    tensors["encoder.head.2.bias"][LATENTS:] -= 6.0  # log-variance: a nearly certain posterior
    _pass_channels(tensors["conv1.weight"][:, :, 0, 0, 0])


def _build_decoder_ends(tensors: dict[str, Tensor], width: int, *, seed: int) -> None:
    import torch

    _pass_channels(tensors["conv2.weight"][:, :, 0, 0, 0])
    mean, deviation = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    to_colour = torch.linalg.pinv(_colour_matrix(seed)) / deviation  # (3, 16)
    first, bias = tensors["decoder.conv1.weight"][:, :, 2, 1, 1], tensors["decoder.conv1.bias"]
    for sign, start in ((1.0, 0), (-1.0, 1)):
        first[start:COLOUR_CHANNELS:2] += sign * to_colour
        bias[start:COLOUR_CHANNELS:2] -= sign * (to_colour @ mean)
    bias[CONSTANT_CHANNEL] += CONSTANT
    head = tensors["decoder.head.2.weight"][:, :, 2, 1, 1]
    for colour in range(3):
        head[colour, 2 * colour] += TYPICAL_NORM / width**0.5
        head[colour, 2 * colour + 1] -= TYPICAL_NORM / width**0.5
