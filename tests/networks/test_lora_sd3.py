"""LoRA for Stable Diffusion 3 and 3.5: which modules, names, ranks and learning rates arguments give."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import NetworkError
from networks import lora, lora_sd3
from networks.arguments import parse_arguments
from networks.layer import LoRAModule, SplitLoRAModule
from networks.sd3_arguments import Sd3Arguments
from tests.networks.sd3_models import KINDS, denoiser_of, text_encoders, tiny_denoiser, tiny_text_encoders
from tests.networks.sd_models import randomize

pytest.importorskip("transformers")

SPECS = os.environ.get("SPECS_DIR")
EMBEDDERS = "[4,4,4,4,4,4]"
needs_lists = pytest.mark.skipif(SPECS is None, reason="needs the published lists")


def created(unet=None, encoders=None, *, dim=4, alpha=1.0, module=lora_sd3, **given):
    torch.manual_seed(1)
    return module.create_network(1.0, dim, alpha, None, encoders, tiny_denoiser() if unet is None else unet, **given)


def paths(network) -> list[str]:
    return [target.candidate.path for target in network._targets.values()]


def ranks(network) -> dict[str, int]:
    return {target.candidate.path: target.rank for target in network._targets.values()}


def published(kind: str) -> dict[str, dict]:
    return json.loads(gzip.decompress((Path(SPECS or "") / "lora" / f"{kind}.json.gz").read_bytes()))["modules"]


@needs_lists
@pytest.mark.parametrize("module", [lora, lora_sd3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_names_and_shapes_are_the_published_ones(kind, module):
    parts, texts = published(kind), published("sd3_medium")
    wanted = {**parts["mmdit"], **parts["mmdit_extra_with_emb_dims"], **texts["clip_l_and_g"], **texts["t5xxl_with_train_t5xxl"]}
    network = created(denoiser_of(kind), text_encoders(), module=module, emb_dims=EMBEDDERS, train_t5xxl="True")
    found = {made.lora_name: made for made in network.loras}
    assert set(found) == set(wanted)
    for name, facts in wanted.items():
        assert list(found[name].lora_down.weight.shape) == facts["down"], name
        assert list(found[name].lora_up.weight.shape) == facts["up"], name
        assert network._targets[name].candidate.path == facts["module"], name


@needs_lists
def test_by_default_embedders_and_t5_have_none():
    network = created(denoiser_of("sd35_medium"), text_encoders())
    assert {made.lora_name for made in network.unet_loras} == set(published("sd35_medium")["mmdit"])
    assert {made.lora_name for made in network.text_encoder_loras} == set(published("sd3_medium")["clip_l_and_g"])
    assert not network.train_t5xxl


def test_both_modules_write_the_same_bytes(tmp_path):
    given = {"split_qkv": "true", "train_t5xxl": "true", "emb_dims": EMBEDDERS, "train_block_indices": "0,2"}
    for number, module in enumerate((lora, lora_sd3)):
        unet, encoders = tiny_denoiser(), tiny_text_encoders()
        network = created(unet, encoders, module=module, **given)
        network.apply_to(encoders, unet)
        torch.manual_seed(5)
        randomize(network)
        network.save_weights(tmp_path / f"{number}.safetensors", torch.float16, {"ss_network_module": "x"})
        again, _ = module.create_network_from_weights(
            1.0, tmp_path / f"{number}.safetensors", None, tiny_text_encoders(), tiny_denoiser()
        )
        assert [made.lora_name for made in again.loras] == [made.lora_name for made in network.loras]
        assert again.train_t5xxl
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


# --- ranks and blocks


@pytest.mark.parametrize(
    ("argument", "inside"),
    [
        ("context_attn_dim", ["context_block.attn.qkv", "context_block.attn.proj"]),
        ("context_mlp_dim", ["context_block.mlp.fc1", "context_block.mlp.fc2"]),
        ("context_mod_dim", ["context_block.adaLN_modulation.1"]),
        ("x_attn_dim", ["x_block.attn.qkv", "x_block.attn.proj", "x_block.attn2.qkv", "x_block.attn2.proj"]),
        ("x_mlp_dim", ["x_block.mlp.fc1", "x_block.mlp.fc2"]),
        ("x_mod_dim", ["x_block.adaLN_modulation.1"]),
    ],
)
def test_a_rank_for_each_part(argument, inside):
    found = ranks(created(**{argument: "7"}))
    assert {path.split(".", 2)[2] for path, rank in found.items() if rank == 7} == set(inside)
    assert set(found.values()) == {4, 7}
    without = ranks(created(**{argument: "0"}))
    assert without == {path: rank for path, rank in found.items() if rank == 4}


def test_ranks_of_embedders():
    found = ranks(created(emb_dims="1, 2,0,3,5,6"))
    assert {path: rank for path, rank in found.items() if not path.startswith("joint_blocks")} == {
        "context_embedder": 1,
        "t_embedder.mlp.0": 2,
        "t_embedder.mlp.2": 2,
        "y_embedder.mlp.0": 3,
        "y_embedder.mlp.2": 3,
        "final_layer.adaLN_modulation.1": 5,
        "final_layer.linear": 6,
    }


@pytest.mark.parametrize(("given", "blocks"), [("all", {0, 1, 2}), ("0,2", {0, 2}), ("1-2", {1, 2}), ("1", {1})])
def test_blocks(given, blocks):
    assert {int(path.split(".")[1]) for path in paths(created(train_block_indices=given))} == blocks


def test_no_block_leaves_the_embedders():
    assert len(paths(created(train_block_indices="none", emb_dims=EMBEDDERS))) == 8


def test_patterns_bend_the_choice():
    network = created(
        train_block_indices="1",
        include_patterns=r"['x_embedder.proj', 'joint_blocks.0.x_block.mlp.fc1']",
        exclude_patterns=".*adaLN.*",
        network_reg_dims=r".*attn\.qkv=2",
        x_attn_dim="3",
    )
    found = ranks(network)
    assert found["x_embedder.proj"] == found["joint_blocks.0.x_block.mlp.fc1"] == 4
    assert found["joint_blocks.1.x_block.attn.qkv"] == 2 and found["joint_blocks.1.x_block.attn.proj"] == 3
    assert not any("adaLN" in path for path in found)


def test_pairs_of_q_k_and_v():
    network = created(split_qkv="True", x_attn_dim="2", network_reg_dims=".*proj=1")
    split = {made.lora_name for made in network.loras if isinstance(made, SplitLoRAModule)}
    assert split == {made.lora_name for made in network.loras if made.lora_name.endswith("_qkv")}
    made = next(made for made in network.loras if made.lora_name == "lora_unet_joint_blocks_0_x_block_attn2_qkv")
    assert isinstance(made, SplitLoRAModule) and made.parts == (16, 16, 16) and made.part_rank == 2
    plain = next(made for made in network.loras if made.lora_name.endswith("proj"))
    assert type(plain) is LoRAModule


# --- text encoders


def test_a_learning_rate_for_each_encoder():
    unet, encoders = tiny_denoiser(), tiny_text_encoders()
    network = created(unet, encoders, train_t5xxl="true")
    network.apply_to(encoders, unet)
    assert network.train_t5xxl
    for given, wanted in [([1e-3], [1e-3] * 3), ([1e-3, 2e-3], [1e-3, 2e-3, 2e-3]), ([1e-3, 2e-3, 3e-3], [1e-3, 2e-3, 3e-3])]:
        groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(given, 1e-4, 1e-4)
        assert names == ["textencoder 1", "textencoder 2", "textencoder 3", "unet"]
        assert [group["lr"] for group in groups] == [*wanted, 1e-4]


def test_places_may_be_empty():
    clip_l, clip_g, t5 = tiny_text_encoders()
    for given, prefixes in [([clip_l, clip_g], {1, 2}), ([None, clip_g], {2}), ([clip_l, None, t5], {1, 3}), ([None] * 3, set())]:
        network = created(None, given, **({"train_t5xxl": "true"} if 3 in prefixes else {}))
        assert {int(made.lora_name[len("lora_te")]) for made in network.text_encoder_loras} == prefixes


def test_t5_that_is_not_there():
    encoders = tiny_text_encoders()[:2]
    with pytest.raises(NetworkError, match="train_t5xxl is to train T5, and there is none: give it with --t5xxl"):
        created(None, encoders, train_t5xxl="true")
    for left_out in (None, [*encoders, None]):  # no encoder is trained, or the T5 has the rate 0: nothing to tell
        assert created(None, left_out, train_t5xxl="true").unet_loras


def test_text_encoders_alone():
    encoders = tiny_text_encoders()
    network = lora.create_network(1.0, 4, 1.0, None, encoders, None, train_t5xxl="true")
    assert {made.lora_name.split("_")[1] for made in network.loras} == {"te1", "te2", "te3"}


# --- arguments that are wrong


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"emb_dims": "[4,4,4]"},
            r"emb_dims=\[4,4,4\] cannot be used: it has 3 values: give 6 ranks, for context_embedder, t_e.*",
        ),
        ({"emb_dims": "4,4,4,4,4,-1"}, r"give whole numbers from 0 on, such as \[4,4,4,4,4,4\]"),
        ({"emb_dims": ""}, "it has 0 values"),
        ({"x_atn_dim": "4"}, r"x_atn_dim is not an argument of this network \(did you mean x_attn_dim\?\)"),
        ({"x_attn_dim": "four"}, "x_attn_dim=four cannot be used: give a whole number"),
        (
            {"train_block_indices": "0-9"},
            "train_block_indices: 0-9 goes past the last block, 2: give numbers from 0",
        ),
        ({"train_block_indices": "a"}, "'a' is no block"),
        ({"train_block_indices": "none"}, "no module is left to train: train_block_indices, exclude_patterns, ranks of 0"),
        ({"split_qkv": "maybe"}, "give true or false"),
        ({"network_reg_dims": "joint_blocks.9.*=4"}, "network_reg_dims: 'joint_blocks.9.*' matches none"),
    ],
)
@pytest.mark.parametrize("module", [lora, lora_sd3])
def test_arguments_that_cannot_be_used(given, said, module):
    with pytest.raises(NetworkError, match=said):
        created(module=module, **given)


def test_arguments_of_convolutions_do_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        network = created(conv_dim="8", conv_alpha="2")
    (line,) = [message for message in caplog.messages if "conv" in message]
    assert line.startswith(
        "warning: --network_args: conv_dim and conv_alpha do nothing: the only convolution of Stable Diffusion 3"
    )
    assert paths(network) == paths(created())


def test_ranks_of_blocks_that_have_no_lora_are_told():
    given = {"train_block_indices": "none", "x_attn_dim": 4, "context_mod_dim": 2, "emb_dims": "[1,1,1,1,1,1]"}
    assert list(parse_arguments(Sd3Arguments, given).warnings()) == [
        "context_mod_dim and x_attn_dim do nothing: train_block_indices=none leaves out all blocks; drop them"
    ]


def test_another_model_is_refused():
    with pytest.raises(NetworkError, match="networks.lora_sd3 is for the MMDiT of Stable Diffusion 3, and Linear is none"):
        created(nn.Linear(2, 2))


# --- files


def test_dim_from_weights_says_what_it_does_not_take(tmp_path, caplog):
    unet = tiny_denoiser()
    network = created(unet, x_attn_dim="2", train_block_indices="1")
    network.apply_to(None, unet)
    randomize(network)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    with caplog.at_level(logging.WARNING):
        again, _ = lora_sd3.create_network_from_weights(
            1.0, tmp_path / "a.safetensors", None, None, tiny_denoiser(), x_attn_dim="9", train_block_indices="0"
        )
    assert ranks(again) == ranks(network)
    assert "it decides the modules and ranks, so x_attn_dim, train_block_indices does nothing" in caplog.text


@pytest.mark.parametrize("from_weights", [True, False])
def test_parts_of_encoders_that_have_no_lora_here(tmp_path, caplog, from_weights):
    """--dim_from_weights does not help; and what the file decided is told once."""
    file, unet, encoders = tmp_path / "a.safetensors", tiny_denoiser(), tiny_text_encoders()
    network = created(unet, encoders, train_t5xxl="true", emb_dims=EMBEDDERS)
    network.apply_to(encoders, unet)
    randomize(network)
    network.save_weights(file, None, {})
    unet, clips = tiny_denoiser(), [*tiny_text_encoders()[:2], None]
    make = lora_sd3.create_network_from_weights
    network = make(1.0, file, None, clips, unet)[0] if from_weights else created(unet, clips)
    network.apply_to(clips[:2], unet)
    with caplog.at_level(logging.WARNING):
        network.load_weights(file)
    t5, *others = caplog.messages
    assert "(lora_te3_" in t5 and "this text encoder is not trained" in t5 and t5.endswith("merge it with --base_weights")
    assert [line.endswith("--dim_from_weights takes its modules") for line in others] == ([] if from_weights else [True])


def test_a_file_of_sdxl_is_refused(tmp_path):
    from library.files.safetensors_file import save_safetensors

    name = "lora_unet_input_blocks_4_1_proj_in"
    save_safetensors(
        tmp_path / "a.safetensors", {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    )
    with pytest.raises(Exception, match="is a LoRA for SDXL"):
        lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, tiny_denoiser())


@pytest.mark.parametrize("split", ["true", "false"])
def test_merging_gives_what_the_lora_gives(split):
    unet, encoders = tiny_denoiser(), tiny_text_encoders()
    network = created(unet, encoders, split_qkv=split, emb_dims=EMBEDDERS, train_t5xxl="true")
    network.apply_to(encoders, unet)
    randomize(network)
    generator = torch.Generator().manual_seed(3)
    given = (torch.randn(2, 16, 6, 8, generator=generator), torch.tensor([3.0, 700.0]),
             torch.randn(2, 5, 32, generator=generator), torch.randn(2, 40, generator=generator))  # fmt: skip
    with torch.no_grad():
        before, with_lora = tiny_denoiser()(*given), unet(*given)
        network.pre_calculation()
        merged = unet(*given)
    assert (with_lora - before).abs().max() > 0.1 * before.abs().max()
    torch.testing.assert_close(merged, with_lora, rtol=1e-3, atol=1e-4)
