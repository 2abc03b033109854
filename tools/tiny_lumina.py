"""Tiny Lumina Image 2.0 checkpoints in the layouts of the real ones: Next-DiT, Gemma 2 with its tokenizer and image coder, in
files of their own and all in one.

The tokenizer is a small SentencePiece model with the marks, byte tokens and rules of Gemma's. What shapes cannot tell stands in
the header's ``config`` entry.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.files.atomic import write_atomically, write_text_atomically
from library.files.safetensors_file import save_safetensors
from library.lumina import gemma_layout, layout
from library.lumina.gemma_layout import GemmaConfig
from library.lumina.layout import NextDitConfig
from library.sd.vae_layout import VaeConfig
from tools.tiny_weights import coder_weights, original_coder, random_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LATENT_CHANNELS, SCALE, SHIFT = 16, 0.3611, 0.1159  # of FLUX' VAE
VOCABULARY = 512  # rows of the embedding; the tokenizer has somewhat fewer pieces
DIT, GEMMA, VAE = "nextdit", "gemma2", "vae"  # parts, as a header names them
OWN_PREFIXES = {DIT: "", GEMMA: "model.", VAE: ""}
WHOLE_PREFIXES = {DIT: layout.PREFIXES[0], GEMMA: gemma_layout.BUNDLED_PREFIX, VAE: "vae."}
FILES = {"dit": (DIT,), "gemma2": (GEMMA,), "ae": (VAE,), "whole": (DIT, GEMMA, VAE)}  # file -> the parts in it
STEMS = {"dit": "lumina", "whole": "lumina_all_in_one"}
# Layers that write into the DiT's stream, and the size of what they write. It is normalised before it is added, so a small one
# changes no output, but lets the small steps of a usual LoRA learning rate move it within 200 steps.
STREAM_WRITERS = ("x_embedder.weight", "attention.out.weight", "feed_forward.w2.weight")
STREAM_SIZE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaModel:
    """The sizes of one model's parts."""

    nextdit: NextDitConfig
    gemma2: GemmaConfig
    vae: VaeConfig


def _model(
    *, width: int, heads: int, blocks: int, text: GemmaConfig, vae_widths: tuple[int, ...], norm_groups: int
) -> LuminaModel:
    head_dim = width // heads  # a multiple of 6: three equal axes of pairs
    nextdit = NextDitConfig(
        width=width,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=head_dim,
        blocks=blocks,
        mlp_hidden=4 * width,
        context_width=text.width,
        time_width=min(width, 1024),
        axes_dims=layout.published_axes(head_dim),
    )
    vae = VaeConfig(widths=vae_widths, latent_channels=LATENT_CHANNELS, norm_groups=norm_groups, quant=False)
    return LuminaModel(nextdit=nextdit, gemma2=text, vae=vae)


def _gemma(*, width: int, heads: int, head_dim: int, blocks: int) -> GemmaConfig:
    return GemmaConfig(
        width=width, heads=heads, key_heads=heads // 2, head_dim=head_dim, blocks=blocks, mlp_hidden=4 * width,
        vocabulary=VOCABULARY, query_scalar=head_dim,
    )  # fmt: skip


def sizes(size: str) -> LuminaModel:
    """tiny: for tests; bench: wide enough to time."""
    if size == "bench":
        text = _gemma(width=512, heads=8, head_dim=64, blocks=5)
        return _model(width=1152, heads=12, blocks=4, text=text, vae_widths=(32, 64, 96, 96), norm_groups=32)
    text = _gemma(width=32, heads=4, head_dim=16, blocks=3)
    return _model(width=48, heads=2, blocks=2, text=text, vae_widths=(16, 32, 48, 48), norm_groups=8)


SIZES = ("tiny", "bench")


def make_lumina(  # noqa: PLR0913  # what to write
    out_dir: Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: str = "bf16",
    files: Iterable[str] = tuple(FILES),
    gemma2_folder: bool = False,
) -> dict[str, Path]:
    """Writes ``files``, of ``FILES``, and returns their paths by these names, and ``gemma2_folder``.

    Raises OutputError when the folder cannot be written. Equal arguments give equal bytes; a part has the same weights in every
    file.
    """
    import torch

    number = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model, out_dir = sizes(size), Path(out_dir)
    spiece = trained_tokenizer()
    paths = {}
    for file in files:
        paths[file] = out_dir / f"{STEMS.get(file, file)}_{size}.safetensors"
        tensors = {name: tensor for part in FILES[file] for name, tensor in _tensors(model, part, file, seed).items()}
        tensors |= _spiece_tensor(spiece, file) if GEMMA in FILES[file] else {}
        config = {part: entry for part, entry in settings(model).items() if part in FILES[file]}
        _save(paths[file], tensors, number, {"config": json.dumps(config)})
    if gemma2_folder:
        paths["gemma2_folder"] = out_dir / f"gemma2_{size}"
        _write_folder(paths["gemma2_folder"], model.gemma2, _tensors(model, GEMMA, "gemma2", seed), number)
        write_atomically(paths["gemma2_folder"] / "tokenizer.model", lambda file: file.write(spiece))
    return paths


def settings(model: LuminaModel) -> dict[str, dict[str, Any]]:
    """What shapes cannot tell, by part."""
    return {
        DIT: {"axes_dims": list(model.nextdit.axes_dims)},
        GEMMA: {"heads": model.gemma2.heads},
        VAE: {"norm_groups": model.vae.norm_groups},
    }


def _save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_safetensors(path, cast, {"format": "pt", **metadata})


def _write_folder(folder: Path, config: GemmaConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """As Hugging Face's: two shards with an index, and config.json."""
    names = sorted(tensors)
    half = len(names) // 2
    shards = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate((names[:half], names[half:]))}
    for shard, own in shards.items():
        _save(folder / shard, {name: tensors[name] for name in own}, dtype, {})
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    write_text_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_text_atomically(folder / "config.json", json.dumps(transformers_config(config), indent=2) + "\n")


def transformers_config(config: GemmaConfig) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder for these sizes."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.query_scalar,
        "vocab_size": config.vocabulary,
        "attn_logit_softcapping": config.softcap,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


# ---------------------------------------------------------------- weights


def _tensors(model: LuminaModel, part: str, file: str, seed: int) -> dict[str, Tensor]:
    """Of one part, float32, under the names of ``file``."""
    prefix = (WHOLE_PREFIXES if file == "whole" else OWN_PREFIXES)[part]
    if part == VAE:
        own = original_coder(model.vae, coder_weights(model.vae, scale=SCALE, shift=SHIFT, seed=seed))
    else:
        own = dit_weights(model.nextdit, seed=seed) if part == DIT else gemma_weights(model.gemma2, seed=seed)
    found = {prefix + name: tensor for name, tensor in own.items()}
    if part == GEMMA and file == "whole":
        import torch

        found[f"{gemma_layout.BUNDLE}logit_scale"] = torch.tensor(4.6)  # which files have, and no one needs
    return found


def dit_weights(config: NextDitConfig, *, seed: int) -> dict[str, Tensor]:
    """Modulations and the last layer, which start at zero in training, have weights as others do."""
    shapes = {**layout.expected_shapes(config), "norm_final.weight": (config.width,)}  # the last is there and not used
    return random_weights(shapes, part=DIT, seed=seed, gain=_gain)


def gemma_weights(config: GemmaConfig, *, seed: int) -> dict[str, Tensor]:
    """Norms keep their distance from 1."""
    tensors = random_weights(gemma_layout.expected_shapes(config), part=GEMMA, seed=seed)
    return {name: tensor - 1 if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}


def _gain(name: str) -> float:
    if name.endswith(STREAM_WRITERS):
        return STREAM_SIZE
    if "adaLN_modulation" in name:
        return 0.5
    return 0.7 if name == "final_layer.linear.weight" else 1.0  # errors that a LoRA can take back


# ---------------------------------------------------------------- tokenizer


def _spiece_tensor(spiece: bytes, file: str) -> dict[str, Tensor]:
    import torch

    name = f"{gemma_layout.BUNDLE if file == 'whole' else ''}{gemma_layout.SPIECE}"
    return {name: torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}


# line ends and spaces in a row are pieces of their own, as Gemma's (there up to 31)
MARKS = ("<mask>", *("\n" * n for n in (1, 2, 3)), *("\u2581" * n for n in range(2, 9)), "<start_of_turn>", "<end_of_turn>")
CORPUS = (
    "a red circle on a white table, soft light",
    "masterpiece, best quality, a girl with long hair and a blue dress, solo, looking at the viewer",
    "an image of a house by the sea at sunset, warm light, high quality, detailed background",
    "You are an assistant designed to generate high-quality images based on user prompts.",
    "a green square and a yellow triangle; the picture shows one thing, seen from above",
    "You are an assistant designed to generate anime images with the highest degree of image-text alignment.",
)


def trained_tokenizer() -> bytes:
    """A SentencePiece model that merges pairs, in Gemma's form: pad 0, end 1, start 2, unknown 3, bytes for what it does not
    know, nothing put before a text and nothing normalised."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=written, model_type="bpe", vocab_size=VOCABULARY, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=list(MARKS), byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", character_coverage=1.0,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()
