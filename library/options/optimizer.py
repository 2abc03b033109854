"""The optimizer and its learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """Optimizer: how gradients change the weights."""

    optimizer_type: str = opt("", "name of the optimizer, or module.Class (empty = AdamW)")
    use_8bit_adam: bool = opt(False, "the older way to write --optimizer_type=AdamW8bit")
    use_lion_optimizer: bool = opt(False, "the older way to write --optimizer_type=Lion")
    learning_rate: float = opt(2e-06, "learning rate; a LoRA often takes 1e-4")
    unet_lr: float | None = opt(None, "learning rate of the denoiser's LoRA (not set = --learning_rate)")
    text_encoder_lr: list[float] | None = opt(
        None, "learning rate of the text encoders' LoRA, one for each (not set = --learning_rate)"
    )
    max_grad_norm: float = opt(1.0, "longer gradients are cut to this norm (0 = never)")
    optimizer_args: list[str] | None = opt(
        None, "more arguments for the optimizer: key=value, such as weight_decay=0.01 betas=0.9,0.99"
    )

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "learning_rate", "unet_lr", "max_grad_norm")
        if any(rate < 0 for rate in self.text_encoder_lr or ()):
            rates = " ".join(str(rate) for rate in self.text_encoder_lr or ())
            yield f"--text_encoder_lr is {rates}: give 0 or more for each"
        named = {
            "optimizer_type": self.optimizer_type,
            "use_8bit_adam": self.use_8bit_adam,
            "use_lion_optimizer": self.use_lion_optimizer,
        }
        given = [f"--{name}" for name, value in named.items() if value]
        if len(given) > 1:
            yield f"{' and '.join(given)} each name an optimizer: keep one of them"
