"""The network that is trained: a LoRA, or what another module makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least, needs, quoted_together


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """Network: the LoRA that is trained."""

    network_module: str | None = opt(
        None, "Python module that makes the network, such as networks.lora, networks.lora_anima or lycoris.kohya"
    )
    network_dim: int | None = opt(
        None, "rank of the LoRA; more can learn more and makes a larger file (not set = the module's default)"
    )
    network_alpha: float = opt(1, "the LoRA's strength is alpha / rank (0 = the rank, which is strength 1)")
    network_dropout: float | None = opt(
        None, "share of rank activations left out in training, 0 to below 1 (not set or 0 = none)"
    )
    network_args: list[str] | None = opt(None, "more arguments for the network: key=value, such as rank_dropout=0.1")
    network_weights: str | None = opt(
        None, "LoRA file to start from (not set = a new LoRA, which changes nothing yet)", path=True
    )
    dim_from_weights: bool = opt(False, "take ranks and alphas from the file of --network_weights")
    base_weights: list[str] | None = opt(None, "LoRA files to merge into the frozen model before training", path=True)
    base_weights_multiplier: list[float] | None = opt(None, "strength of each file of --base_weights (not set = 1)")
    scale_weight_norms: float | None = opt(
        None, "after each step cut the change that a module makes to this norm (not set or 0 = never)"
    )
    network_train_unet_only: bool = opt(False, "train the denoiser's part of the network only, not the text encoders'")
    network_train_text_encoder_only: bool = opt(False, "train the text encoders' part of the network only, not the denoiser's")

    @property
    def weights_to_merge(self) -> list[tuple[str, float]]:
        """(file, strength) of each of --base_weights, in order."""
        files = self.base_weights or []
        return list(zip(files, [*(self.base_weights_multiplier or []), *[1.0] * len(files)], strict=False))

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoders' part of the network, if there is one, is trained."""
        return not self.network_train_unet_only

    @property
    def trains_denoiser(self) -> bool:
        return not self.network_train_text_encoder_only

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "network_dim")
        yield from at_least(self, 0, "network_alpha")
        yield from at_least(self, 0, "scale_weight_norms")
        together = (quoted_together(argument, flag="--network_args") for argument in self.network_args or ())
        yield from (problem for problem in together if problem)
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            yield f"--network_dropout is {self.network_dropout}: give a number from 0 to below 1"
        yield from needs(self, "dim_from_weights", "network_weights")
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train: drop one of them"
        files, multipliers = len(self.base_weights or ()), len(self.base_weights_multiplier or ())
        if multipliers > files:
            yield f"--base_weights_multiplier has {multipliers} numbers, but --base_weights has {files}: give at most one each"

    def warnings(self) -> Iterator[str]:
        if self.dim_from_weights and self.network_dim is not None:
            yield f"--network_dim={self.network_dim} does nothing with --dim_from_weights: the file decides ranks and alphas"
