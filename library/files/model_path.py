"""Model files as the user names them: finding the file, and telling from its keys what kind of model it holds.

Needs no torch: names and shapes come from the header.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from library.errors import CheckpointError
from library.files.safetensors_file import SafetensorsHeader
from library.files.user_path import dead_link

SHARD = re.compile(r"(?P<stem>.+?)-\d{5}-of-(?P<count>\d{5})(\.\w+)?\.(?P<ending>safetensors|bin)")
ANIMA_DIT = "Anima DiT"
COSMOS_DIT = "Cosmos-Predict2 DiT without an LLM adapter"
LLM_ADAPTER = "LLM adapter of Anima"
QWEN3 = "Qwen3 text encoder"
QWEN_IMAGE_VAE = "Qwen-Image VAE"
LORA = "LoRA file"
SD1 = "Stable Diffusion 1.x checkpoint"
SD2 = "Stable Diffusion 2.x checkpoint"
SDXL = "SDXL checkpoint"
SDXL_REFINER = "SDXL refiner checkpoint"
SD_UNCLIP = "Stable Diffusion unCLIP checkpoint"
SD_VAE = "Stable Diffusion VAE"
CONTROLNET = "ControlNet"
LUMINA = "Lumina Image 2.0 checkpoint"
LUMINA_DIFFUSERS = "Lumina Image 2.0 checkpoint in diffusers' layout, which is not read"
GEMMA = "Gemma 2 text encoder"
SD3 = "SD3 or SD3.5 checkpoint"
SD3_DIFFUSERS = "SD3 or SD3.5 transformer in diffusers' layout, which is not read"
T5 = "T5 text encoder"
CLIP = "CLIP text encoder"

# Kind -> patterns that all must match some key; the first kind that fits is the answer, so what is more special comes first.
# A checkpoint of several parts (U-Net + VAE + text encoders) is named after its denoiser.
KINDS: dict[str, tuple[str, ...]] = {
    LORA: (r"(\.|^|_)lora_?(up|down|mid|A|B)(\.|$)|\.lora_linear_layer\.|\.(hada|lokr)_w\d",),
    ANIMA_DIT: (r"(^|\.)blocks\.\d+\.mlp\.layer1\.weight", r"(^|\.)llm_adapter\."),
    COSMOS_DIT: (r"(^|\.)blocks\.\d+\.mlp\.layer1\.weight",),
    LLM_ADAPTER: (r"(^|\.)llm_adapter\.|^blocks\.\d+\.cross_attn\.o_proj\.weight",),
    CONTROLNET: (r"^control_model\.|^input_hint_block\.|^controlnet_cond_embedding\.|^controlnet_down_blocks\.",),
    SDXL_REFINER: (r"^conditioner\.embedders\.0\.model\.",),
    SD_UNCLIP: (r"^cond_stage_model\.", r"label_emb\.0\.0\.weight"),
    SDXL: (r"label_emb\.0\.0\.weight|^conditioner\.embedders\.1\.|^add_embedding\.linear_1",),
    SD2: (r"^cond_stage_model\.model\.",),
    SD1: (r"^cond_stage_model\.|input_blocks\.\d+\.\d+\.transformer_blocks|^down_blocks\.\d+\.attentions\.",),
    "FLUX checkpoint": (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d+\.",),
    SD3: (r"(^|\.)joint_blocks\.\d+\.x_block\.",),
    SD3_DIFFUSERS: (r"^transformer_blocks\.0\.ff_context\.",),
    "NewBie checkpoint": (r"(^|\.)clip_text_pooled_proj\.",),
    "Z-Image checkpoint": (r"(^|\.)(x_pad_token$|cap_pad_token$|all_x_embedder\.)",),
    "OmniGen2 checkpoint": (r"(^|\.)ref_image_refiner\.",),
    LUMINA_DIFFUSERS: (r"(^|\.)(time_caption_embed\.|context_refiner\.\d+\.attn\.to_q\.)",),
    LUMINA: (r"(^|\.)(cap_embedder\.0\.weight|context_refiner\.0\.)",),
    "Qwen-Image DiT": (r"(^|\.)transformer_blocks\.\d+\.(txt_mlp|img_mlp)\.",),
    "Wan DiT": (r"(^|\.)blocks\.\d+\.(ffn\.0|cross_attn\.norm_k)\.",),
    QWEN_IMAGE_VAE: (r"^(vae\.)?(encoder|decoder)\.[\w.]*\.gamma$",),
    SD_VAE: (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(mid\.block_1|mid_block\.resnets)\.",),
    "Gemma 3 text encoder": (r"layers\.\d+\.pre_feedforward_layernorm\.", r"layers\.\d+\.self_attn\.q_norm\."),
    GEMMA: (r"layers\.\d+\.pre_feedforward_layernorm\.",),
    QWEN3: (r"(^|\.)layers\.\d+\.self_attn\.q_norm\.weight",),
    "language model of another family": (r"^(model\.)?layers\.\d+\.self_attn\.q_proj\.weight",),
    T5: (r"^(transformer\.)?(encoder\.)?block\.\d+\.layer\.0\.SelfAttention\.",),
    CLIP: (r"^(transformer\.)?(text_model\.)?(encoder\.layers\.\d+\.self_attn\.q_proj|embeddings\.position_embedding)\.",),
}

TRAINED_BY = {
    ANIMA_DIT: "anima_train_network.py",
    SD1: "train_network.py",
    SD2: "train_network.py --v2",
    SDXL: "sdxl_train_network.py",
    LUMINA: "lumina_train_network.py",
    SD3: "sd3_train_network.py",
}


def find_model_file(flag: str, value: str | Path | None, kind: str, *, allow_folder: bool = False) -> Path:
    """The file that the user gave to ``flag``, e.g. ``find_model_file("--vae", options.vae, QWEN_IMAGE_VAE)``.

    Raises CheckpointError when nothing was given, when there is no such file (naming near file names of that folder), or when
    it is a folder and ``allow_folder`` is off (naming the model files in it).
    """
    if value is None or str(value) == "":
        raise CheckpointError(f"{flag} is missing: give the path of the {kind}")
    path = Path(value)
    if path.is_file():
        _refuse_shard(flag, path, allow_folder=allow_folder)
    if path.is_file() or (allow_folder and path.is_dir()):
        return path
    if path.is_dir():
        raise CheckpointError(f"{flag} {path} is a folder: give the file of the {kind}{_files_in(path)}")
    link = dead_link(path)
    hint = f" ({link})" if link else _near_names(path)
    raise CheckpointError(f"{flag} {path} does not exist: give the path of the {kind}{hint}")


def _refuse_shard(flag: str, path: Path, *, allow_folder: bool) -> None:
    """Raises CheckpointError for one file of a model that lies in several."""
    match = SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return
    count, index = int(match["count"]), f"{match['stem']}.{match['ending']}.index.json"
    if not allow_folder:
        cure = "give the model as one file"
    elif (path.parent / index).is_file():
        cure = f"give the folder {path.parent}, or {index} in it"
    else:
        cure = f"copy or download the others and {index} beside it, and give the folder"
    raise CheckpointError(f"{flag} {path}: this is one of {count} shards of a model: {cure}")


def recognise(header: SafetensorsHeader) -> str | None:
    """What kind of model the file holds, as words for a message (``"SDXL checkpoint"``), or None."""
    return recognise_keys(header.tensors)


def recognise_keys(keys: Iterable[str]) -> str | None:
    """The same for the key names of any file; one of ``KINDS``."""
    text = "\n".join(keys)
    for kind, patterns in KINDS.items():
        if all(re.search(pattern, text, re.MULTILINE) for pattern in patterns):
            return kind
    return None


def described(kind: str) -> str:
    """For messages: ``an SDXL checkpoint (sdxl_train_network.py trains those)``"""
    return with_article(kind) + (f" ({TRAINED_BY[kind]} trains those)" if kind in TRAINED_BY else "")


def with_article(kind: str) -> str:
    return f"an {kind}" if kind.startswith(("A", "LLM", "SD")) else f"a {kind}"


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        while not folder.parent.is_dir():
            folder = folder.parent
        near = difflib.get_close_matches(folder.name, _names(folder.parent), n=1, cutoff=0.6)
        return f" (there is no folder {folder}" + (f"; did you mean {folder.parent / near[0]}?)" if near else ")")
    near = difflib.get_close_matches(path.name, _names(folder), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _files_in(folder: Path) -> str:
    found = [name for name in _names(folder) if name.endswith((".safetensors", ".pth", ".pt", ".ckpt"))]
    return f" (in it: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''})" if found else ""


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
