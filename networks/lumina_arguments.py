"""What --network_args means to networks.lora_lumina. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from library.errors import did_you_mean
from networks.arguments import NetworkArguments, argument, parse_bool
from networks.block_indices import Indices, parse_block_indices
from networks.block_weights import parse_amount, parse_rank, parse_ranks_of
from networks.layout_names import NameTable
from networks.lumina_layouts import LUMINA_NAMES

EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")  # in the order of embedder_dims
ATTENTION, FEED_FORWARD, MODULATION = r".*\.attention\..*", r".*\.feed_forward\..*", r".*\badaLN_modulation\..*"
LAYERS, NOISE_REFINER, CONTEXT_REFINER = r"layers\..*", r"noise_refiner\..*", r"context_refiner\..*"
REFINERS = r"(?:noise|context)_refiner\..*"
FINAL_LAYER = r"final_layer\..*"
TRAINED = {  # what train_blocks may be -> the modules that then have a LoRA; embedders are chosen by embedder_dims alone
    "all": (LAYERS, NOISE_REFINER, CONTEXT_REFINER, FINAL_LAYER),
    "transformer": (LAYERS,),
    "refiners": (NOISE_REFINER, CONTEXT_REFINER),
    "noise_refiner": (NOISE_REFINER,),
    "context_refiner": (CONTEXT_REFINER,),
}


def parse_train_blocks(value: Any) -> str:
    word = str(value).strip().lower()
    if word not in TRAINED:
        raise ValueError(
            f"give one of {', '.join(TRAINED)}{did_you_mean(word, TRAINED)}; train_block_indices takes numbers of layers"
        )
    return word


@dataclass(frozen=True, kw_only=True)
class LuminaArguments(NetworkArguments):
    PAGE: ClassVar[str] = "docs/lumina_train_network.md"
    NAMES: ClassVar[NameTable | None] = LUMINA_NAMES
    SELECTING: ClassVar[tuple[str, ...]] = (
        *NetworkArguments.SELECTING, "attn_dim", "mlp_dim", "mod_dim", "refiner_dim", "embedder_dims", "train_block_indices",
    )  # fmt: skip

    attn_dim: int | None = argument(parse_rank, "rank of attention layers (attention.qkv, attention.out), 0 = no LoRA")
    mlp_dim: int | None = argument(parse_rank, "rank of feed_forward layers, 0 = no LoRA")
    mod_dim: int | None = argument(parse_rank, "rank of adaLN_modulation layers, 0 = no LoRA")
    refiner_dim: int | None = argument(parse_rank, "rank of the refiners' layers that the three above leave, 0 = no LoRA")
    embedder_dims: tuple[int, ...] = argument(
        parse_ranks_of(EMBEDDERS), "ranks of x_embedder, t_embedder and cap_embedder, which otherwise have no LoRA", default=()
    )
    train_blocks: str = argument(parse_train_blocks, f"which blocks have a LoRA: {', '.join(TRAINED)}", default="all")
    train_block_indices: Indices = argument(
        parse_block_indices, "which of the main layers have a LoRA: all, none, or a list such as 0-5,8", default=None
    )
    split_qkv: bool = argument(parse_bool, "a LoRA of its own for each of q, k and v", default=False)
    conv_dim: int | None = argument(parse_rank, "does nothing: the model has no convolutions")
    conv_alpha: float | None = argument(parse_amount, "does nothing: the model has no convolutions")

    @property
    def part_ranks(self) -> tuple[tuple[str, int], ...]:
        """(regex of whole paths, rank) of the denoiser's parts with ranks of their own; the first match counts."""
        parts = {ATTENTION: self.attn_dim, FEED_FORWARD: self.mlp_dim, MODULATION: self.mod_dim, REFINERS: self.refiner_dim}
        embedders = [(rf"{name}(?:\..*)?", rank) for name, rank in zip(EMBEDDERS, self.embedder_dims, strict=False)]
        return (*((pattern, rank) for pattern, rank in parts.items() if rank is not None), *embedders)

    @property
    def splits_fused(self) -> bool:
        return self.split_qkv

    def warnings(self) -> Iterator[str]:
        yield from self._idle(("conv_dim", "conv_alpha"), "Lumina Image 2.0 has no convolutions")
        if self.include_patterns:  # which may take what is left out in again
            return
        if not {NOISE_REFINER, CONTEXT_REFINER}.intersection(TRAINED[self.train_blocks]):
            yield from self._idle(("refiner_dim",), f"train_blocks={self.train_blocks} leaves out the refiners")
        elif None not in (self.attn_dim, self.mlp_dim, self.mod_dim):
            yield from self._idle(("refiner_dim",), "attn_dim, mlp_dim and mod_dim are those of all layers of the refiners")
        if LAYERS not in TRAINED[self.train_blocks]:
            yield from self._idle(("train_block_indices",), f"train_blocks={self.train_blocks} leaves out the main layers")
