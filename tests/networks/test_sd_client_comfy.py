"""Every key of a LoRA for Stable Diffusion is one that ComfyUI looks for, on the weight that we trained.

ComfyUI's rules (comfy/lora.py, comfy/utils.py, comfy/weight_adapter/lora.py): for each weight of the loaded model it knows some
names of modules; the pair's product gets the weight's shape. The weights come from the published lists of checkpoints, their
names in diffusers' layout from diffusers' own converter.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from networks import lora
from tests.networks.sd_models import text_encoders_of, unet_of

SPECS = os.environ.get("SPECS_DIR")
pytestmark = pytest.mark.skipif(SPECS is None, reason="needs the published lists")
pytest.importorskip("diffusers")

CHECKPOINTS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl_base"}
PREFIX = "model.diffusion_model."
# how many layers ComfyUI's text encoders have, and the prefixes that it knows them by
TEXTS = {"sd1": {"lora_te": 12}, "sd2": {"lora_te": 24}, "sdxl": {"lora_te1": 12, "lora_te2": 32}}
TEXT_LAYERS = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")))
COUNTS = {"sd1": (72 + 192, 86), "sd2": (138 + 192, 86), "sdxl": (264 + 722, 66)}


def published_unet(kind: str) -> dict[str, tuple[int, ...]]:
    lists = Path(SPECS or "") / "checkpoints" / f"{CHECKPOINTS[kind]}.json.gz"
    tensors = json.loads(gzip.decompress(lists.read_bytes()))["tensors"]
    return {key.removeprefix(PREFIX): tuple(shape) for key, (_, shape) in tensors.items() if key.startswith(PREFIX)}


def diffusers_names(kind: str, keys: list[str]) -> dict[str, str]:
    """diffusers' name of each weight -> the original one."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from library.sd.unet import diffusers_config
    from tests.networks.sd_models import UNETS

    config = {**diffusers_config(UNETS[kind]), "class_embed_type": None}
    return convert_ldm_unet_checkpoint({PREFIX + key: key for key in keys}, config)


def accepted(kind: str) -> dict[str, tuple[int, ...] | None]:
    """Name of a module -> the shape of its weight; None for text encoders, whose lists are not in this form."""
    shapes = published_unet(kind)
    weights = [key for key in shapes if key.endswith(".weight")]
    names: dict[str, tuple[int, ...] | None] = {}
    for theirs, key in {**{key: key for key in weights}, **diffusers_names(kind, list(shapes))}.items():
        if theirs.endswith(".weight"):
            names[f"lora_unet_{theirs.removesuffix('.weight').replace('.', '_')}"] = shapes[key]
    for prefix, layers in TEXTS[kind].items():
        names |= {f"{prefix}_text_model_encoder_layers_{n}_{name}": None for n in range(layers) for name in TEXT_LAYERS}
    return names


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_key_is_taken(kind, tmp_path):
    network = lora.create_network(1.0, 1, 1.0, None, text_encoders_of(kind), unet_of(kind), conv_dim="1")
    network.apply_to(None, None)
    network.save_weights(tmp_path / "a.safetensors", torch.bfloat16, {})
    tensors = dict(read_tensors(read_header(tmp_path / "a.safetensors")))
    names = accepted(kind)
    modules = {key.partition(".")[0] for key in tensors}
    assert modules <= set(names) and len(modules) == sum(COUNTS[kind])
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for name in modules:
        down, up = tensors[f"{name}.lora_down.weight"].flatten(1), tensors[f"{name}.lora_up.weight"].flatten(1)
        shape = names[name]
        assert shape is None or (up @ down).numel() == torch.Size(shape).numel(), name
        assert shape is None or up.shape[0] == shape[0], name
    network.save_weights_as("comfy", tmp_path / "b.safetensors", torch.bfloat16, {})
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_names_are_the_published_ones(kind):
    """And so are the shapes: of SD 2 those of a run on a single file."""
    published = json.loads(gzip.decompress((Path(SPECS or "") / "lora" / f"{kind_in_lists(kind)}.json.gz").read_bytes()))
    wanted = {name: facts for part in published["modules"].values() for name, facts in part.items()}
    network = lora.create_network(1.0, 4, 1.0, None, text_encoders_of(kind), unet_of(kind), conv_dim="4")
    found = {made.lora_name: made for made in network.loras}
    assert set(found) == set(wanted) and len(found) == sum(COUNTS[kind])
    for name, facts in wanted.items():
        assert list(found[name].lora_down.weight.shape) == facts["down"], name
        assert list(found[name].lora_up.weight.shape) == facts["up"], name
        assert network._targets[name].candidate.path == facts["module"], name


def kind_in_lists(kind: str) -> str:
    return {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[kind]
