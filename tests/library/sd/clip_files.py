"""Tiny CLIP text encoders as tensors under the names that files give them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from library.files.weights_source import Part, file_tensors
from library.sd.clip import ClipTextModel
from library.sd.clip_layout import GELU, ClipConfig, Layout, clip_part, clip_pieces, expected_shapes
from library.sd.clip_tokenizer import load_bpe

TINY_L = ClipConfig(width=16, layers=3, heads=2, mlp_width=24)
TINY_G = ClipConfig(width=24, layers=4, heads=3, mlp_width=32, activation=GELU, projection=20)


@dataclass(frozen=True)
class MemorySource:
    """A WeightsSource without a file."""

    held: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path("model.safetensors")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.held.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(names)
        return ((name, tensor) for name, tensor in self.held.items() if name in wanted)


def clip_tensors(config: ClipConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the module's names, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in expected_shapes(config).items()}
    for name in tensors:
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def clip_source(config: ClipConfig, layout: Layout, *, prefix: str = "", seed: int = 0) -> MemorySource:
    """The encoder in a file's names, with the metadata that tells its heads."""
    tensors = file_tensors(clip_tensors(config, seed), clip_pieces(config, layout))
    number = 1 if "embedders.1." in prefix else 0
    entry = {"heads": config.heads, "activation": config.activation}
    metadata = {"config": json.dumps({"text": [{}] * number + [entry]})}
    return MemorySource({prefix + name: tensor for name, tensor in tensors.items()}, metadata)


def tiny_part(config: ClipConfig, layout: Layout = "hf", *, seed: int = 0) -> Part[ClipConfig]:
    return clip_part(clip_source(config, layout, seed=seed), prefix="", layout=layout, keep_layers=None)


# ---------------------------------------------------------------- transformers' own


def their_clip(model: ClipTextModel) -> nn.Module:
    """transformers' own class with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    own = model.config
    settings = CLIPTextConfig(
        vocab_size=own.vocabulary, hidden_size=own.width, intermediate_size=own.mlp_width, num_hidden_layers=own.layers,
        num_attention_heads=own.heads, hidden_act=own.activation, projection_dim=own.projection or 512,
        bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    other = (CLIPTextModel if own.projection is None else CLIPTextModelWithProjection)(settings)
    names = other.state_dict()
    state = {name if name in names else name.removeprefix("text_model."): t for name, t in model.state_dict().items()}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    if not hasattr(other, "text_model"):  # diffusers 0.42 asks for the level that transformers 5 dropped
        object.__setattr__(other, "text_model", other)
    return other.eval()


def their_tokenizer(folder, pad: str = "<|endoftext|>"):
    """transformers' tokenizer, of the same table."""
    from transformers import CLIPTokenizer

    table = json.loads(load_bpe().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(table["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in table["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return CLIPTokenizer.from_pretrained(str(folder), pad_token=pad)
