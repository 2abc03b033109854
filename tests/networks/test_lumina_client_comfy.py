"""Every key of a LoRA for Lumina Image 2.0 is one that ComfyUI looks for, and changes the weight that we trained as much.

The weights are those of the published lists. Of ComfyUI's further names for this class of models, transformer.layers.N.attention
.to_q and the like, which take q, k and v to be equally wide, none may be written: they address other rows.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from networks import lora_lumina
from tests.networks.comfy_rules import applied, denoiser_names, encoder_names
from tests.networks.conftest import tree_of
from tests.networks.lumina_models import TINY, denoiser_linears, gemma, randomize

SPECS = os.environ.get("SPECS_DIR")
pytestmark = pytest.mark.skipif(not SPECS, reason="needs the published lists")

GEMMA = "gemma2_2b.transformer.model."
MODULES = 184 + 182


def keys_of(name: str) -> list[str]:
    return list(json.loads(gzip.decompress((Path(SPECS or "") / "checkpoints" / f"{name}.json.gz").read_bytes()))["tensors"])


def accepted_names(*, newer: bool) -> dict[str, str]:
    encoder = [f"{GEMMA}{key.partition('model.')[2]}" for key in keys_of("gemma2_2b") if key.startswith("model.")]
    assert len(encoder) == 26 * 11 + 2
    return denoiser_names(keys_of("lumina2")) | encoder_names(encoder, inside=GEMMA, newer=newer)


@pytest.fixture(scope="module", params=[{}, {"split_qkv": "true"}], ids=["fused", "split_qkv"])
def network(request):
    """On everything, at tiny sizes, but with the published numbers of blocks."""
    torch.manual_seed(0)
    unet, encoder = tree_of(denoiser_linears(**{**TINY, "layers": 26})), gemma(layers=26)
    made = lora_lumina.create_network(1.0, 4, 2.0, None, encoder, unet, embedder_dims="4,2,3", mlp_dim="3", **request.param)
    made.apply_to(encoder, unet)
    randomize(made)
    assert len(made.loras) == MODULES
    return made


def saved(network, path: Path, layout: str | None) -> dict[str, torch.Tensor]:
    if layout is None:
        network.save_weights(path, None, {})
    else:
        network.save_weights_as(layout, path, None, {})
    return dict(read_tensors(read_header(path)))


def changes_of(network) -> dict[str, torch.Tensor]:
    """What the network adds to each weight, by the weight's path with underscores."""
    changes = {}
    for made in network.loras:
        layer = made.org_module_ref[0]
        with torch.no_grad():
            identity = torch.eye(layer.in_features)
            changes[made.lora_name] = (layer(identity) - torch.nn.functional.linear(identity, layer.weight)).T
    return changes


@pytest.mark.parametrize("newer", [True, False])
def test_all_of_a_comfy_file_is_taken(network, newer, tmp_path):
    changes, left = applied(saved(network, tmp_path / "a.safetensors", "comfy"), accepted_names(newer=newer))
    assert left == set() and len(changes) == MODULES
    wanted = changes_of(network)
    for weight, change in changes.items():
        is_encoder = weight.startswith(GEMMA)
        path = weight.removeprefix(GEMMA).removesuffix(".weight").replace(".", "_")
        torch.testing.assert_close(change, wanted[f"{'lora_te' if is_encoder else 'lora_unet'}_{path}"], rtol=1e-4, atol=1e-5)


def test_all_of_our_own_file_is_taken_by_newer_versions(network, tmp_path):
    tensors = saved(network, tmp_path / "a.safetensors", None)
    changes, left = applied(tensors, accepted_names(newer=True))
    assert left == set() and len(changes) == MODULES
    changes, left = applied(tensors, accepted_names(newer=False))
    assert len(changes) == 184 and {key.partition("_layers")[0] for key in left} == {"lora_te"}
