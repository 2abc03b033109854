"""Every key of a LoRA for Stable Diffusion 3 is one that ComfyUI looks for, and changes the weight that we trained as much.

The weights are those of the published lists; the text encoders' names are by ComfyUI's rules (comfy/lora.py), T5's where all three
are loaded.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from library.files.safetensors_file import read_header, read_tensors
from networks import lora_sd3
from tests.networks.comfy_rules import applied, denoiser_names
from tests.networks.sd3_models import KINDS, denoiser_of, text_encoders, tiny_denoiser, tiny_text_encoders
from tests.networks.sd_models import randomize

SPECS = os.environ.get("SPECS_DIR")
needs_lists = pytest.mark.skipif(SPECS is None, reason="needs the published lists")
pytest.importorskip("transformers")

PREFIX = "model.diffusion_model."
CLIP_LAYERS = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{name}_proj" for name in "qkv"), "self_attn_out_proj")
CLIPS = {"lora_te1": 12, "lora_te2": 32}  # layers of CLIP-L and CLIP-G
EVERYTHING = {"emb_dims": "[1,1,1,1,1,1]", "train_t5xxl": "true"}
MODULES = {"sd3_medium": 237, "sd35_medium": 263, "sd35_large": 377}


def keys_of(name: str) -> list[str]:
    return list(json.loads(gzip.decompress((Path(SPECS or "") / "checkpoints" / f"{name}.json.gz").read_bytes()))["tensors"])


def accepted_names(kind: str) -> dict[str, str]:
    """Name of a module -> the weight that it changes."""
    weights = [key.removeprefix(PREFIX) for key in keys_of(kind) if key.startswith(PREFIX) and key.endswith(".weight")]
    t5 = [key for key in keys_of("t5xxl") if key.endswith(".weight")]
    names = denoiser_names(weights) | {f"lora_te3_{key.removesuffix('.weight').replace('.', '_')}": f"t5.{key}" for key in t5}
    for prefix, layers in CLIPS.items():
        clip = [f"{prefix}_text_model_encoder_layers_{n}_{name}" for n in range(layers) for name in CLIP_LAYERS]
        names |= {name: name for name in clip}
    return names


@needs_lists
@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_taken(kind, tmp_path):
    network = lora_sd3.create_network(1.0, 1, 1.0, None, text_encoders(), denoiser_of(kind), **EVERYTHING)
    names, modules = accepted_names(kind), {made.lora_name for made in network.loras}
    assert modules <= set(names) and len(modules) == MODULES[kind] + 8 + 264 + 168
    weights = {names[name] for name in modules}
    assert len(weights) == len(modules)  # no two change the same


@pytest.mark.parametrize("split", ["true", "false"])
def test_what_is_taken_changes_as_much(split, tmp_path):
    """Both of the file under our names and of the one that is asked for ComfyUI, which is the same."""
    unet, encoders = tiny_denoiser(), tiny_text_encoders()
    network = lora_sd3.create_network(1.0, 3, 2.0, None, encoders, unet, split_qkv=split, **EVERYTHING)
    network.apply_to(encoders, unet)
    randomize(network)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.save_weights_as("comfy", tmp_path / "b.safetensors", None, {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    tensors = dict(read_tensors(read_header(tmp_path / "a.safetensors")))
    linears = {made.lora_name: made for made in network.loras if isinstance(made.org_module_ref[0], torch.nn.Linear)}
    changes, left = applied(tensors, {name: name for name in linears})
    assert {key.partition(".")[0] for key in left} == {made.lora_name for made in network.loras} - set(linears)
    assert left and all(key.startswith("lora_unet_x_embedder_proj.") for key in left)  # the convolution
    for name, made in linears.items():
        layer = made.org_module_ref[0]
        with torch.no_grad():
            identity = torch.eye(layer.in_features)
            trained = made(identity) - linear(identity, layer.weight, layer.bias)
        torch.testing.assert_close(changes[name].T, trained, rtol=1e-4, atol=1e-5)
