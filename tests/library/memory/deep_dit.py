"""A tiny DiT that is deep enough to swap blocks of, with a LoRA, and its training steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.anima.denoiser import AnimaDenoiser
from networks import lora_anima
from tests.library.anima.tiny_dit import TINY, batch, tiny_denoiser

DEEP = replace(TINY, blocks=6)


@dataclass(frozen=True)
class Model:
    """A denoiser with a LoRA that is not zero."""

    denoiser: AnimaDenoiser
    network: Any

    def forward(self) -> Tensor:
        return self.denoiser(*(tensor.to(self.device) for tensor in batch()))

    @property
    def device(self) -> torch.device:
        return self.denoiser.final_layer.linear.weight.device

    def step(self, seed: int = 0) -> list[Tensor]:
        """The loss, and the gradient of each LoRA weight."""
        torch.manual_seed(seed)
        loss = self.forward().float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.network.parameters()))]

    def evaluate(self) -> list[Tensor]:
        """A pass without gradients and without dropout."""
        self.network.eval()
        with torch.no_grad():
            found = self.forward()
        self.network.train()
        return [found]


def deep_model(
    *, dropout: float | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32, **arguments: str
) -> Model:
    denoiser = tiny_denoiser(DEEP, dtype).to(device)
    torch.manual_seed(0)
    network = lora_anima.create_network(1.0, 4, 4.0, None, None, denoiser, neuron_dropout=dropout, **arguments)
    network.apply_to(None, denoiser, False, True)
    for lora in network.unet_loras:
        torch.nn.init.normal_(lora.lora_up.weight)
    return Model(denoiser, network.to(device).train())


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
