"""LoRAs in other programs' layouts: what is written, what comes back, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from library.errors import CheckpointError
from library.files.safetensors_file import read_header, save_safetensors
from networks import lora_anima
from networks.anima_layouts import ANIMA_NAMES
from networks.layout_names import COMFY, DIFFUSERS, OURS, understood
from networks.lora_formats import by_our_name, convert, in_our_layout, layout_problems, save_network_as
from networks.weights_file import read_lora_file, sshs_hashes
from tests.networks.full_anima_lora import METADATA, full_lora, full_tensors, randomize

SMALL = {"blocks": 1, "adapter_blocks": 1, "layers": 1}
NAME = "lora_unet_blocks_0_self_attn_q_proj"
THEIRS = "transformer.transformer_blocks.0.attn1.to_q"


def converted(tensors, layout, *, metadata=None, **options):
    keys = understood("file", tensors, ANIMA_NAMES)
    return convert("file", by_our_name("file", tensors, keys, metadata), layout, **options)


def pair(name=NAME, *, rank=4, alpha=2.0, dtype=torch.float32, scale=1.0):
    tensors = {f"{name}.lora_down.weight": torch.randn(rank, 16), f"{name}.lora_up.weight": torch.randn(16, rank) * scale}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]) for key, tensor in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_to_comfyui_and_back_changes_no_bit(dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in full_tensors(**SMALL).items()}
    comfy = converted(tensors, COMFY)
    assert not set(comfy.tensors) & set(tensors) and len(comfy.tensors) == len(tensors)
    back = converted(comfy.tensors, OURS).tensors
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == dtype and torch.equal(
            back[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_a_pair_without_alpha_gets_its_rank():
    comfy = converted(pair(rank=3, alpha=None), COMFY).tensors
    assert not [key for key in comfy if key.endswith(".alpha")]
    assert float(converted(comfy, OURS).tensors[f"{NAME}.alpha"]) == 3.0


def test_diffusers_gets_the_strength_in_lora_b():
    tensors = pair(rank=4, alpha=3.0)
    result = converted(tensors, DIFFUSERS)
    assert list(result.tensors) == [f"{THEIRS}.lora_A.weight", f"{THEIRS}.lora_B.weight"]
    assert torch.equal(result.tensors[f"{THEIRS}.lora_A.weight"], tensors[f"{NAME}.lora_down.weight"])
    assert torch.equal(result.tensors[f"{THEIRS}.lora_B.weight"], tensors[f"{NAME}.lora_up.weight"] * 0.75)
    assert result.folded == 1 and 0.0 < result.rounding < 2**-23  # three quarters of a float32 may be no float32
    back = converted(result.tensors, OURS).tensors
    assert float(back[f"{NAME}.alpha"]) == 4.0


def test_alpha_equal_to_the_rank_leaves_lora_b_alone():
    result = converted(pair(rank=4, alpha=4.0, dtype=torch.bfloat16), DIFFUSERS)
    assert (result.folded, result.rounding) == (0, 0.0)
    assert result.tensors[f"{THEIRS}.lora_B.weight"].dtype == torch.bfloat16


def test_rounding_is_measured_and_happens_once():
    half = converted(pair(alpha=2.0, dtype=torch.bfloat16), DIFFUSERS)  # a power of two
    third = converted(pair(rank=3, alpha=1.0, dtype=torch.bfloat16), DIFFUSERS)
    assert half.rounding == 0.0 < third.rounding < 2**-8
    tensors = pair(rank=3, alpha=1.0)
    once = converted(tensors, DIFFUSERS, dtype=torch.bfloat16).tensors
    assert torch.equal(once[f"{THEIRS}.lora_B.weight"], (tensors[f"{NAME}.lora_up.weight"] / 3).bfloat16())


def test_what_becomes_too_large_is_refused():
    tensors = pair(rank=1, alpha=100.0, dtype=torch.float16, scale=5000.0)
    with pytest.raises(CheckpointError, match=f"{NAME}: alpha is 100 times the rank.*too large for torch.float16"):
        converted(tensors, DIFFUSERS)


def test_diffusers_has_no_place_for_the_text_encoder():
    tensors = full_tensors(**SMALL)
    with pytest.raises(
        CheckpointError, match=r"no place for 7 modules of the text encoder \(lora_te_layers_0_self_attn_q_proj, "
    ):
        converted(tensors, DIFFUSERS)
    result = converted(tensors, DIFFUSERS, only="denoiser")
    assert result.left_out == 7 and all("lora" in key for key in result.tensors)


def test_torn_pairs_and_doubles_are_told_together():
    tensors = {**pair(), **pair("lora_unet_blocks_1_mlp_layer1")}
    del tensors["lora_unet_blocks_1_mlp_layer1.lora_up.weight"]
    tensors["diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
    with pytest.raises(CheckpointError) as caught:
        converted(tensors, COMFY)
    twice, torn = caught.value.problems
    assert "1 parts are there twice" in twice and "q_proj.lora_A.weight" in twice
    assert torn.endswith("no fitting pair of lora_down and lora_up: lora_unet_blocks_1_mlp_layer1")


@pytest.mark.parametrize("up", [torch.zeros(8, 5), torch.zeros(8)])
def test_halves_of_different_ranks(up):
    with pytest.raises(CheckpointError, match="no fitting pair"):
        converted({**pair(), f"{NAME}.lora_up.weight": up}, OURS)


# --- strengths that PEFT keeps in the metadata


def peft(**settings):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})}


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"r": 4, "lora_alpha": 8}, 8.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"transformer_blocks.0.attn1.to_q": 2}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.1.attn1.to_q": 2, "to_q": 3}}, 3.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 16.0),
        ({"r": 4}, 4.0),
    ],
)
def test_strength_in_the_metadata(settings, alpha):
    theirs = converted(pair(rank=4, alpha=None), DIFFUSERS).tensors
    ours = converted(theirs, OURS, metadata=peft(**settings)).tensors
    assert float(ours[f"{NAME}.alpha"]) == alpha


@pytest.mark.parametrize("text", ["{", "[1]", '{"transformer.alpha_pattern": {"(": 1}}', '{"transformer.lora_alpha": "x"}'])
def test_unreadable_strength_in_the_metadata(text):
    theirs = converted(pair(alpha=None), DIFFUSERS).tensors
    with pytest.raises(CheckpointError, match="lora_adapter_metadata, which says how strong the LoRA is, cannot be read"):
        converted(theirs, OURS, metadata={"lora_adapter_metadata": text})


# --- networks


def save_in(layout, tensors, path, metadata=None):
    if layout == DIFFUSERS:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("lora_te_")}
    save_safetensors(path, converted(tensors, layout).tensors, metadata)
    return path


def strengths(network):
    """module -> alpha / rank * up @ down, which is all that a LoRA does."""
    return {lora.lora_name: lora.scale * lora.lora_up.weight @ lora.lora_down.weight for lora in network.loras}


@pytest.mark.parametrize("layout", [OURS, COMFY, DIFFUSERS])
def test_a_network_loads_every_layout(layout, tmp_path):
    network = full_lora(**SMALL, text_encoder=layout != DIFFUSERS)
    file = save_in(layout, network.state_dict(), tmp_path / "a.safetensors")
    again = full_lora(**SMALL, text_encoder=layout != DIFFUSERS)
    for lora in again.loras:
        nn.init.zeros_(lora.lora_up.weight)
    report = again.load_weights(file)
    assert (report.loaded, report.missing, report.unexpected) == (len(network.loras), (), ())
    wanted = strengths(network)
    for name, found in strengths(again).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [OURS, COMFY, DIFFUSERS])
def test_a_network_is_made_from_every_layout_and_merged(layout, tmp_path, tiny_denoiser):
    network = lora_anima.create_network(1.0, 4, 3.0, None, None, tiny_denoiser, include_patterns=".*_modulation.*")
    network.apply_to(None, tiny_denoiser, False, True)
    randomize(network)
    file = save_in(layout, network.state_dict(), tmp_path / "a.safetensors")
    before = {lora.lora_name: lora.org_module_ref[0].weight.clone() for lora in network.loras}
    made, weights = lora_anima.create_network_from_weights(0.5, file, None, None, tiny_denoiser, for_inference=True)
    made.merge_to(None, tiny_denoiser, weights)
    wanted = strengths(network)
    assert len(made.loras) == len(network.loras) == 34
    for lora in made.loras:
        change = lora.org_module_ref[0].weight - before[lora.lora_name]
        torch.testing.assert_close(change, 0.5 * wanted[lora.lora_name], rtol=1e-4, atol=1e-5)


def test_given_tensors_of_another_layout(tiny_denoiser):
    comfy = converted(pair(rank=4), COMFY).tensors
    network, weights = lora_anima.create_network_from_weights(1.0, "unread", None, None, tiny_denoiser, weights_sd=comfy)
    assert [lora.lora_name for lora in network.loras] == [NAME] and f"{NAME}.lora_up.weight" in weights


@pytest.mark.parametrize("layout", [COMFY, DIFFUSERS])
@pytest.mark.parametrize(("dtype", "ending"), [(None, "safetensors"), (torch.bfloat16, "safetensors"), (torch.float16, "pt")])
def test_a_network_is_saved_in_other_layouts(layout, dtype, ending, tmp_path):
    network = full_lora(**SMALL, text_encoder=layout != DIFFUSERS)
    assert network.layout_problems(layout) == []
    file = tmp_path / f"a.{ending}"
    network.save_weights_as(layout, file, dtype, METADATA)
    saved = read_lora_file(file)
    assert same(saved, converted(network.state_dict(), layout, dtype=dtype).tensors)
    if ending == "safetensors":
        assert read_header(file).metadata == {**METADATA, **sshs_hashes(saved, METADATA)}
    twin = tmp_path / f"b.{ending}"
    network.save_weights_as(layout, twin, dtype, METADATA)
    assert ending == "pt" or twin.read_bytes() == file.read_bytes()


def test_what_a_layout_cannot_hold_is_known_before(tmp_path):
    network = full_lora(**SMALL)
    (problem,) = network.layout_problems(DIFFUSERS)
    assert problem.startswith("that layout has no place for 7 of its modules (lora_te_layers_0_mlp_down_proj, ")
    strange = nn.ModuleDict({"lora_unet_nowhere": nn.Linear(1, 1)})
    (problem,) = layout_problems(strange, ANIMA_NAMES, COMFY)
    assert problem.startswith("2 of its tensors have names that no Anima has (lora_unet_nowhere.")
    with pytest.raises(CheckpointError, match="no place for 7 modules"):
        save_network_as(network, tmp_path / "a.safetensors", ANIMA_NAMES, DIFFUSERS, dtype=None, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_our_own_files_are_taken_as_they_are():
    tensors = {**pair(), "lora_unet_nowhere.lora_up.weight": torch.zeros(1, 1), "note": torch.zeros(1)}
    assert in_our_layout("a", tensors, ANIMA_NAMES) is tensors


def test_foreign_files_for_a_network(tmp_path, tiny_denoiser):
    network = lora_anima.create_network(1.0, 4, 1.0, None, None, tiny_denoiser)
    sdxl, lokr, unet = tmp_path / "sdxl.safetensors", tmp_path / "lokr.safetensors", tmp_path / "unet.safetensors"
    save_safetensors(sdxl, pair("lora_unet_input_blocks_4_1_proj_in"))
    save_safetensors(lokr, {"lora_unet_blocks_0_mlp_layer1.lokr_w1": torch.zeros(2, 2)})
    save_safetensors(unet, {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"sdxl.safetensors is a LoRA for SDXL, not for Anima"):
        network.load_weights(sdxl)
    with pytest.raises(CheckpointError, match=r"lokr.safetensors is no plain LoRA but a LoKr file"):
        network.load_weights(lokr)
    with pytest.raises(CheckpointError, match=r"unet.safetensors is a LoRA for Stable Diffusion 1.x or 2.x, not for Anima"):
        lora_anima.create_network_from_weights(1.0, unet, None, None, tiny_denoiser)
