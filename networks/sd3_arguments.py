"""What --network_args means to networks.lora_sd3. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from networks.arguments import NetworkArguments, argument, parse_bool
from networks.block_indices import Indices, parse_block_indices
from networks.block_weights import parse_amount, parse_rank, parse_ranks_of
from networks.layout_names import NameTable
from networks.sd3_layouts import SD3_NAMES

# regexes of what emb_dims gives ranks to, in its order, with the names that messages call them by
EMBEDDERS = {
    r"context_embedder": "context_embedder",
    r"t_embedder\..+": "t_embedder",
    r"x_embedder\..+": "x_embedder",
    r"y_embedder\..+": "y_embedder",
    r"final_layer\.adaLN_modulation\..+": "final_layer.adaLN_modulation",
    r"final_layer\.linear": "final_layer.linear",
}
HALVES = {"context": "context_block", "x": "x_block"}
LAYERS = {"attn": r"attn2?", "mlp": "mlp", "mod": "adaLN_modulation"}


@dataclass(frozen=True, kw_only=True)
class Sd3Arguments(NetworkArguments):
    PAGE: ClassVar[str] = "docs/sd3_train_network.md"
    NAMES: ClassVar[NameTable | None] = SD3_NAMES
    SELECTING: ClassVar[tuple[str, ...]] = (
        *NetworkArguments.SELECTING, *(f"{half}_{layer}_dim" for half in HALVES for layer in LAYERS), "emb_dims",
        "train_block_indices",
    )  # fmt: skip

    context_attn_dim: int | None = argument(parse_rank, "rank of attention layers in the text's half of a block, 0 = no LoRA")
    context_mlp_dim: int | None = argument(parse_rank, "rank of its MLP layers")
    context_mod_dim: int | None = argument(parse_rank, "rank of its modulation layers")
    x_attn_dim: int | None = argument(parse_rank, "rank of attention layers (attn, attn2) in the image's half, 0 = no LoRA")
    x_mlp_dim: int | None = argument(parse_rank, "rank of its MLP layers")
    x_mod_dim: int | None = argument(parse_rank, "rank of its modulation layers")
    emb_dims: tuple[int, ...] = argument(
        parse_ranks_of(tuple(EMBEDDERS.values())), "ranks of the six embedders, which otherwise have no LoRA", default=()
    )
    train_block_indices: Indices = argument(
        parse_block_indices, "which joint blocks have a LoRA: all, none, or a list such as 0-5,8", default=None
    )
    split_qkv: bool = argument(parse_bool, "a LoRA of its own for each of q, k and v", default=False)
    train_t5xxl: bool = argument(parse_bool, "also T5, where text encoders are trained", default=False)
    conv_dim: int | None = argument(parse_rank, "does nothing: the only convolution is x_embedder, which emb_dims is for")
    conv_alpha: float | None = argument(parse_amount, "does nothing, as conv_dim")

    @property
    def splits_fused(self) -> bool:
        return self.split_qkv

    @property
    def part_ranks(self) -> tuple[tuple[str, int], ...]:
        """(regex of whole paths, rank) of the denoiser's parts with ranks of their own; no path has two."""
        given = [(rf"joint_blocks\.\d+\.{block}\.{path}\..+", getattr(self, f"{half}_{layer}_dim"))
                 for half, block in HALVES.items() for layer, path in LAYERS.items()]  # fmt: skip
        embedders = zip(EMBEDDERS, self.emb_dims, strict=False)  # none without emb_dims
        return (*((pattern, rank) for pattern, rank in given if rank is not None), *embedders)

    def warnings(self) -> Iterator[str]:
        why = "the only convolution of Stable Diffusion 3 is x_embedder, whose rank is in emb_dims"
        yield from self._idle(("conv_dim", "conv_alpha"), why)
        if self.train_block_indices == frozenset() and not self.include_patterns:
            of_blocks = [f"{half}_{layer}_dim" for half in HALVES for layer in LAYERS]
            yield from self._idle(of_blocks, "train_block_indices=none leaves out all blocks")
