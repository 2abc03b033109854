"""Names, arguments and refusals of networks.lora_anima."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import DenoiserConfig
from library.anima.text import AnimaTextEncoder, build_qwen3
from library.anima.text_layout import TextEncoderConfig
from library.errors import CheckpointError, NetworkError
from library.files.safetensors_file import read_header
from networks import lora_anima
from networks.selection import ModelRules

SPECS = os.environ.get("SPECS_DIR")


def create(unet, text_encoders=None, *, dim=4, alpha=1.0, **given):
    return lora_anima.create_network(1.0, dim, alpha, None, text_encoders, unet, **given)


def names(loras):
    return {lora.lora_name for lora in loras}


def block_names(prefix: str, blocks: int, parts: dict[str, tuple[str, ...]]) -> set[str]:
    return {f"{prefix}_{n}_{part}_{layer}" for n in range(blocks) for part, layers in parts.items() for layer in layers}


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "output_proj")
DENOISER_NAMES = block_names(
    "lora_unet_blocks", 28, {"self_attn": PROJECTIONS, "cross_attn": PROJECTIONS, "mlp": ("layer1", "layer2")}
)
ADAPTER_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER_NAMES = block_names(
    "lora_unet_llm_adapter_blocks", 6, {"self_attn": ADAPTER_ATTENTION, "cross_attn": ADAPTER_ATTENTION, "mlp": ("0", "2")}
)
QWEN_NAMES = block_names("lora_te_layers", 28, {"self_attn": ADAPTER_ATTENTION, "mlp": ("gate_proj", "up_proj", "down_proj")})
READMITTED_NAMES = {
    *block_names("lora_unet_blocks", 28, {f"adaln_modulation_{part}": ("1", "2") for part in ("self_attn", "cross_attn", "mlp")}),
    *(f"lora_unet_{name}" for name in ("x_embedder_proj_1", "t_embedder_1_linear_1", "t_embedder_1_linear_2")),
    *(f"lora_unet_final_layer_{name}" for name in ("linear", "adaln_modulation_1", "adaln_modulation_2")),
}


def test_published_model_has_the_published_names(published_denoiser, published_text_encoder):
    network = create(published_denoiser, [published_text_encoder])
    assert names(network.unet_loras) == DENOISER_NAMES and len(network.unet_loras) == 280
    assert names(network.text_encoder_loras) == QWEN_NAMES and len(network.text_encoder_loras) == 196
    cross_k = next(lora for lora in network.unet_loras if lora.lora_name == "lora_unet_blocks_0_cross_attn_k_proj")
    assert cross_k.lora_down.weight.shape == (4, 1024) and cross_k.lora_up.weight.shape == (2048, 4)
    assert cross_k.lora_down.weight.device.type == "cpu"


def test_adapter_and_readmitted_names(published_denoiser):
    network = create(published_denoiser, None, dim=1, train_llm_adapter="true", include_patterns=".*")
    assert names(network.unet_loras) == DENOISER_NAMES | ADAPTER_NAMES | READMITTED_NAMES


# --- real models, without memory for their weights


@pytest.fixture(scope="module")
def real_denoiser() -> AnimaDenoiser:
    with torch.device("meta"):
        return AnimaDenoiser(DenoiserConfig())


def recorded(*parts: str) -> dict[str, tuple[list[int], list[int]]]:
    """{name: (shape of lora_down, shape of lora_up)} of the published LoRA, for rank 4."""
    with gzip.open(Path(SPECS or "") / "lora" / "anima.json.gz") as file:
        modules = json.load(file)["modules"]
    return {name: (entry["down"], entry["up"]) for part in parts for name, entry in modules[part].items()}


def shapes(loras):
    return {lora.lora_name: (list(lora.lora_down.weight.shape), list(lora.lora_up.weight.shape)) for lora in loras}


def test_names_in_the_real_denoiser(real_denoiser):
    assert names(create(real_denoiser).unet_loras) == DENOISER_NAMES
    everything = create(real_denoiser, train_llm_adapter="true", include_patterns=".*", dim=1)
    assert names(everything.unet_loras) == DENOISER_NAMES | ADAPTER_NAMES | READMITTED_NAMES
    parts = {"self_attn_lr": 1e-4, "cross_attn_lr": 1e-4, "mlp_lr": 1e-4, "mod_lr": 1e-4, "llm_adapter_lr": 1e-4}
    modulation = {name for name in READMITTED_NAMES if "_blocks_" in name}
    assert names(create(real_denoiser, dim=1, **parts).unet_loras) == DENOISER_NAMES | ADAPTER_NAMES | modulation


@pytest.mark.skipif(not SPECS, reason="SPECS_DIR names no folder of facts")
def test_shapes_in_the_real_denoiser(real_denoiser):
    assert shapes(create(real_denoiser).unet_loras) == recorded("dit")
    everything = create(real_denoiser, train_llm_adapter="true", include_patterns=".*")
    assert shapes(everything.unet_loras) == recorded(
        "dit", "dit_extra_with_train_llm_adapter", "dit_extra_when_include_patterns_match"
    )


def qwen_models():
    """The published encoder as transformers makes it, bare, in our wrapper, and with its head."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

    bare = build_qwen3(TextEncoderConfig())
    wrapped = AnimaTextEncoder(bare, tokenizers=None, width=1024)
    with torch.device("meta"):
        return {"Qwen3Model": bare, "AnimaTextEncoder": wrapped, "Qwen3ForCausalLM": Qwen3ForCausalLM(bare.config)}


def test_names_in_the_real_text_encoder():
    for kind, model in qwen_models().items():
        network = create(None, [model])
        assert names(network.text_encoder_loras) == QWEN_NAMES, kind
        if SPECS:
            assert shapes(network.text_encoder_loras) == recorded("qwen3"), kind
        patterned = create(None, [model], network_reg_dims=r"layers\.0\.mlp\..*=1, .*=0")  # paths are without the wrapper's
        assert names(patterned.text_encoder_loras) == {name for name in QWEN_NAMES if "layers_0_mlp" in name}, kind


def test_text_encoder_alone_or_in_a_list_or_none(tiny_denoiser, tiny_text_encoder):
    for given, count in ((tiny_text_encoder, 7), ([tiny_text_encoder], 7), ([], 0), (None, 0), ([None], 0)):
        assert len(create(tiny_denoiser, given).text_encoder_loras) == count
    assert len(create(None, tiny_text_encoder).unet_loras) == 0


def test_defaults_and_alpha_zero(tiny_denoiser):
    (lora, *_) = create(tiny_denoiser, dim=None, alpha=None).unet_loras
    assert (lora.lora_dim, float(lora.alpha), lora.scale) == (4, 1.0, 0.25)
    (lora, *_) = create(tiny_denoiser, dim=8, alpha=0).unet_loras
    assert (float(lora.alpha), lora.scale) == (8.0, 1.0)


def test_rank_above_the_layers_width_is_allowed(tiny_denoiser):
    assert create(tiny_denoiser, dim=64).unet_loras[0].lora_down.weight.shape == (64, 16)


def test_patterns_ranks_and_adapter(tiny_denoiser):
    network = create(tiny_denoiser, None, train_llm_adapter="True", exclude_patterns=r"[r'.*\.mlp\..*', r'.*cross_attn.*']",
                     include_patterns=r"blocks\.1\.mlp\.layer2", network_reg_dims=r".*q_proj=2, llm_adapter.*=0")  # fmt: skip
    ranks = {lora.lora_name.removeprefix("lora_unet_blocks_"): lora.lora_dim for lora in network.unet_loras}
    block = {"self_attn_q_proj": 2, "self_attn_k_proj": 4, "self_attn_v_proj": 4, "self_attn_output_proj": 4}
    expected = {f"{n}_{name}": rank for n in range(2) for name, rank in block.items()} | {"1_mlp_layer2": 4}
    adapter_q = {name: rank for name, rank in ranks.items() if "llm_adapter" in name}
    assert {name: rank for name, rank in ranks.items() if "llm_adapter" not in name} == expected
    assert adapter_q == {"lora_unet_llm_adapter_blocks_0_self_attn_q_proj": 2}  # the first match counts


def test_dropouts_reach_the_modules(tiny_denoiser):
    drop = create(tiny_denoiser, neuron_dropout=0.1, rank_dropout="0.2", module_dropout="0.3", dropout=0.1).unet_loras[0].dropouts
    assert (drop.neuron, drop.rank, drop.module) == (0.1, 0.2, 0.3)
    assert create(tiny_denoiser, dropout="0.4").unet_loras[0].dropouts.neuron == 0.4
    assert not create(tiny_denoiser, dropout=None).unet_loras[0].dropouts.any


def test_verbose_shows_a_table_once_rates_are_known(published_denoiser, published_text_encoder, caplog):
    with caplog.at_level(logging.INFO):
        network = create(published_denoiser, [published_text_encoder], dim=16, alpha=8, train_llm_adapter="true", verbose="true",
                         loraplus_unet_lr_ratio=16, network_reg_lrs=r".*mlp.*=0", cross_attn_lr=2e-4)  # fmt: skip
        network.apply_to([published_text_encoder], published_denoiser)
        assert caplog.messages == ["LoRA for text encoder: 196 modules, rank 16", "LoRA for denoiser: 340 modules, rank 16"]
        network.prepare_optimizer_params([3e-5], 1e-4)
    heading, *rows = caplog.messages[2:]
    end = rows.index("")
    modules, (_, *totals) = rows[:end], rows[end + 1 :]
    assert len(modules) == 196 + 340 and re.split(" {2,}", heading)[0] == "module"
    column = heading.index("name in the file")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in modules)
    by_path = {cells[0]: cells[1:] for cells in (re.split(" {2,}", line) for line in modules[196:])}
    assert by_path["blocks.27.self_attn.q_proj"] == [
        "16",
        "8",
        "0.0001 / 0.0016",
        "65,536",
        "lora_unet_blocks_27_self_attn_q_proj",
    ]
    assert by_path["blocks.0.cross_attn.k_proj"][2:4] == ["0.0002 / 0.0032", "49,152"]
    assert by_path["blocks.0.mlp.layer1"][2] == "not trained"
    assert [tuple(re.split(" {2,}", line)[:2]) for line in totals] == [
        ("text encoder", "196"), ("denoiser self_attn", "112"), ("denoiser cross_attn", "112"), ("denoiser mlp", "56"),
        ("denoiser llm_adapter", "60"), ("all", "536"),
    ]  # fmt: skip
    assert totals[-1].endswith(f"{sum(lora.lora_down.weight.numel() + lora.lora_up.weight.numel() for lora in network.loras):,}")


def test_without_verbose_there_is_no_table(tiny_denoiser, caplog):
    with caplog.at_level(logging.INFO):
        network = create(tiny_denoiser, dim=2, alpha=0)
        network.apply_to(None, tiny_denoiser)
        network.prepare_optimizer_params(None, 1e-4)
    assert caplog.messages == ["LoRA for denoiser: 20 modules, rank 2"]


def test_two_networks_in_one_process_do_not_disturb_each_other(tiny_denoiser, tmp_path):
    first = create(tiny_denoiser, train_llm_adapter="true", include_patterns=".*")
    first.apply_to(None, tiny_denoiser)
    first.save_weights(tmp_path / "a.safetensors", None, {})
    lora_anima.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, tiny_denoiser)
    assert len(create(tiny_denoiser).unet_loras) == 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dim": 0}, r"--network_dim is 0: give a whole number from 1 on"),
        ({"dim": -4}, r"--network_dim is -4"),
        ({"alpha": -1.0}, r"--network_alpha is -1.0"),
        ({"neuron_dropout": 1.0}, r"--network_dropout is 1.0"),
        ({"conv_dim": "4"}, r"conv_dim is not an argument of this network"),
        ({"train_llm_adaptor": "true"}, r"did you mean train_llm_adapter\?"),
        ({"include_patterns": "blocks.9.*"}, r"include_patterns: 'blocks\.9\.\*' matches none of the 38 modules"),
        ({"include_patterns": "llm_adapter.*"}, r"include_patterns: 'llm_adapter\.\*' matches none"),
    ],
)
def test_refusals(tiny_denoiser, given, said):
    with pytest.raises(NetworkError, match=said):
        create(tiny_denoiser, **given)


def test_a_pattern_that_fits_nothing_is_told_usual_paths(tiny_denoiser, tiny_text_encoder):
    with pytest.raises(NetworkError, match=r"such as blocks\.0\.self_attn\.q_proj, "):
        lora_anima.create_network(1.0, 2, 1.0, None, [tiny_text_encoder], tiny_denoiser, exclude_patterns="mlp")


def test_refusals_come_together(tiny_denoiser):
    with pytest.raises(NetworkError) as caught:
        create(tiny_denoiser, dim=0, alpha=-1, exclude_patterns="nothing", network_reg_lrs="nowhere=1")
    assert len(caught.value.problems) == 4


# --- learning rates of the denoiser's parts


def groups(network, unet=None, *, unet_lr=1e-4):
    network.apply_to(None, unet)
    found, named = network.prepare_optimizer_params_with_multiple_te_lrs(None, unet_lr, 1.0)
    return {name: (group["lr"], len(group["params"]) // 2) for name, group in zip(named, found, strict=True)}


def test_parts_have_groups_of_their_own(tiny_denoiser):
    network = create(tiny_denoiser, self_attn_lr=2e-4, cross_attn_lr=3e-4, mlp_lr=4e-4)
    assert groups(network, tiny_denoiser) == {
        "unet self_attn": (2e-4, 8), "unet cross_attn": (3e-4, 8), "unet mlp": (4e-4, 4)
    }  # fmt: skip


def test_a_rate_of_zero_makes_a_smaller_file(tiny_denoiser, tmp_path):
    network = create(tiny_denoiser, self_attn_lr=0, mlp_lr=0.0)
    assert groups(network, tiny_denoiser) == {"unet": (1e-4, 8)}
    network.save_weights(tmp_path / "a.safetensors", None, {})
    saved = read_header(tmp_path / "a.safetensors").tensors
    assert len(saved) == 3 * 8 and all("cross_attn" in key for key in saved)


def test_mod_lr_lets_in_the_modulation_of_the_blocks_alone(published_denoiser):
    network = create(published_denoiser, None, dim=1, mod_lr=1e-5)
    added = names(network.unet_loras) - DENOISER_NAMES
    assert added == {name for name in READMITTED_NAMES if name.startswith("lora_unet_blocks_")} and len(added) == 168
    assert groups(network, published_denoiser) == {"unet": (1e-4, 280), "unet mod": (1e-5, 168)}
    for kept_out in ({"mod_lr": 0}, {"mod_lr": None}):
        assert names(create(published_denoiser, None, dim=1, **kept_out).unet_loras) == DENOISER_NAMES


def test_exclude_patterns_win_over_mod_lr(tiny_denoiser):
    network = create(tiny_denoiser, mod_lr=1e-5, exclude_patterns=r".*modulation_mlp.*")
    assert groups(network, tiny_denoiser)["unet mod"] == (1e-5, 8)


def test_llm_adapter_lr_trains_the_adapter(tiny_denoiser):
    assert groups(create(tiny_denoiser, llm_adapter_lr=1e-5), tiny_denoiser) == {
        "unet": (1e-4, 20),
        "unet llm_adapter": (1e-5, 10),
    }


def test_the_adapters_attention_is_no_part_of_the_blocks(tiny_denoiser):
    network = create(tiny_denoiser, train_llm_adapter="true", self_attn_lr=0, mlp_lr=0, cross_attn_lr=0)
    assert groups(network, tiny_denoiser) == {"unet": (1e-4, 10)}
    left_out = create(tiny_denoiser, train_llm_adapter="true", llm_adapter_lr=0)
    assert groups(left_out, tiny_denoiser) == {"unet": (1e-4, 20)}


def test_patterns_win_over_parts_and_lora_plus_multiplies(tiny_denoiser):
    network = create(tiny_denoiser, self_attn_lr=2e-4, network_reg_lrs=r"blocks\.0\.self_attn\..*=5e-4", loraplus_lr_ratio=4)
    assert groups(network, tiny_denoiser) == {
        "unet reg_lr_0": (5e-4, 2), "unet reg_lr_0 plus": (20e-4, 2), "unet self_attn": (2e-4, 2), "unet self_attn plus": (8e-4, 2),
        "unet": (1e-4, 6), "unet plus": (4e-4, 6),
    }  # fmt: skip


def test_parts_do_not_touch_the_text_encoder(tiny_denoiser, tiny_text_encoder):
    network = create(tiny_denoiser, tiny_text_encoder, self_attn_lr=0, mlp_lr=1e-3)
    assert len(network.text_encoder_loras) == 7
    assert list(groups(network, tiny_denoiser)) == ["textencoder 1", "unet mlp", "unet"]


def test_a_rate_for_an_adapter_that_the_model_lacks(tiny_denoiser):
    del tiny_denoiser.llm_adapter
    with pytest.raises(NetworkError, match=r"^--llm_adapter_lr is 0.0001, but the model has no such part: drop --llm_adapter_lr"):
        create(tiny_denoiser, llm_adapter_lr=1e-4)


def test_rates_with_dim_from_weights(saved, tiny_denoiser):
    file, ranks = saved
    network, _ = lora_anima.create_network_from_weights(1.0, file, None, None, tiny_denoiser, mlp_lr=0, self_attn_lr=1e-3)
    assert names(network.unet_loras) == set(ranks)
    assert groups(network, tiny_denoiser) == {"unet self_attn": (1e-3, 8), "unet": (1e-4, 18)}
    assert not network.lora_unet_blocks_0_mlp_layer1.lora_up.weight.requires_grad
    with pytest.raises(NetworkError, match=r"--mod_lr is 0.001, but the LoRA file, which decides, has none"):
        lora_anima.create_network_from_weights(1.0, file, None, None, tiny_denoiser, mod_lr=1e-3)


# --- networks from files


@pytest.fixture
def saved(tiny_denoiser, tmp_path):
    """A LoRA file with several ranks and an adapter module."""
    network = create(tiny_denoiser, dim=4, alpha=3.0, train_llm_adapter="true", network_reg_dims=r".*mlp.*=2")
    network.apply_to(None, tiny_denoiser)
    for lora in network.unet_loras:
        nn.init.normal_(lora.lora_up.weight)
    network.save_weights(tmp_path / "saved.safetensors", None, {})
    return tmp_path / "saved.safetensors", {lora.lora_name: lora.lora_dim for lora in network.unet_loras}


def test_the_file_decides_modules_ranks_and_alphas(saved, tiny_denoiser, caplog):
    file, ranks = saved
    network, weights = lora_anima.create_network_from_weights(
        0.5, file, None, None, tiny_denoiser, rank_dropout="0.1", dropout="0.2", exclude_patterns=".*mlp.*", network_reg_lrs=".*mlp.*=1e-3"
    )  # fmt: skip
    assert {lora.lora_name: lora.lora_dim for lora in network.unet_loras} == ranks
    assert {float(lora.alpha) for lora in network.unet_loras} == {3.0}
    assert network.unet_loras[0].dropouts.rank == 0.1 and network.unet_loras[0].dropouts.neuron == 0.2
    assert network.unet_loras[0].multiplier == 0.5 and len(weights) == 3 * len(ranks)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{file}: it decides the modules and ranks, so exclude_patterns does nothing"
    ]
    network.apply_to(None, tiny_denoiser)
    assert str(network.load_weights(file)).startswith(f"{len(ranks)} LoRA modules loaded")
    _, descriptions = network.prepare_optimizer_params(None, None, 1e-4)
    assert descriptions == ["unet reg_lr_0", "unet"]


def test_given_weights_are_used_instead_of_the_file(saved, tiny_denoiser):
    file, ranks = saved
    _, weights = lora_anima.create_network_from_weights(1.0, file, None, None, tiny_denoiser)
    one = {key: value for key, value in weights.items() if key.startswith("lora_unet_blocks_0_mlp_layer1.")}
    network, again = lora_anima.create_network_from_weights(1.0, "unread", None, None, tiny_denoiser, weights_sd=one)
    assert names(network.unet_loras) == {"lora_unet_blocks_0_mlp_layer1"} and again is one


def test_base_weights_merge_equals_the_lora(saved, tiny_denoiser):
    file, _ = saved
    layer = tiny_denoiser.get_submodule("blocks.0.cross_attn.k_proj")
    before = layer.weight.clone()
    network, weights = lora_anima.create_network_from_weights(0.5, file, None, None, tiny_denoiser, for_inference=True)
    network.merge_to(None, tiny_denoiser, weights, torch.bfloat16, "cpu")
    name = "lora_unet_blocks_0_cross_attn_k_proj"
    delta = weights[f"{name}.lora_up.weight"] @ weights[f"{name}.lora_down.weight"] * 0.5 * 3.0 / 4
    torch.testing.assert_close(layer.weight, before + delta)
    assert layer.weight.dtype == torch.float32
    untouched = tiny_denoiser.get_submodule("x_embedder.proj.1")
    assert "forward" not in vars(untouched)


def test_modules_without_a_place_are_named(saved, tiny_denoiser, caplog):
    file, ranks = saved
    del tiny_denoiser.llm_adapter
    network, _ = lora_anima.create_network_from_weights(1.0, file, None, None, tiny_denoiser)
    assert len(network.unet_loras) == 20
    assert re.search(r"10 modules have no place in this network and what .* \(lora_unet_llm_adapter_blocks_0", caplog.text)


def test_parts_of_models_that_are_not_given_are_no_news(tiny_denoiser, tiny_text_encoder, tmp_path, caplog):
    """Base weights are merged model by model: what the other one got is not left out."""
    both = create(tiny_denoiser, [tiny_text_encoder])
    both.apply_to([tiny_text_encoder], tiny_denoiser)
    file = tmp_path / "both.safetensors"
    both.save_weights(file, None, {})
    for encoders, denoiser in (([], tiny_denoiser), ([tiny_text_encoder], None)):
        lora_anima.create_network_from_weights(1.0, file, None, encoders, denoiser)
    assert "left out" not in caplog.text


def test_a_file_of_another_architecture(tiny_denoiser, tmp_path):
    torch.save({"lora_unet_down_blocks_0_x.lora_down.weight": torch.zeros(2, 3), "lora_unet_down_blocks_0_x.lora_up.weight": torch.zeros(3, 2)},
               tmp_path / "sd.pt")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"sd\.pt is a LoRA for Stable Diffusion 1\.x or 2\.x, not for Anima"):
        lora_anima.create_network_from_weights(1.0, tmp_path / "sd.pt", None, None, tiny_denoiser)


def test_a_file_of_a_model_of_other_sizes(saved, make_tree):
    file, _ = saved
    wider = make_tree({"blocks.0.self_attn.q_proj": (32, 32)})
    with pytest.raises(
        NetworkError, match=r"model of other sizes: lora_unet_blocks_0_self_attn_q_proj \(\(16, 4\) x \(4, 16\) in the"
    ):
        lora_anima.create_network_from_weights(1.0, file, None, None, wider)


def test_a_missing_file(tiny_denoiser, tmp_path):
    for name in ("no.safetensors", "no.pt"):
        with pytest.raises(CheckpointError, match=f"cannot read .*{name}"):
            lora_anima.create_network_from_weights(1.0, tmp_path / name, None, None, tiny_denoiser)


def test_only_what_is_trained_is_told(tiny_denoiser, caplog):
    rules = [ModelRules(prefix=prefix, label=label, candidates="") for prefix, label in (
        ("lora_te", "textencoder 1"), ("lora_te", "textencoder"), ("lora_te2", "textencoder 2"), ("lora_unet", "unet"))]  # fmt: skip
    assert [each.title for each in rules] == ["text encoder", "text encoder", "text encoder 2", "denoiser"]
    with caplog.at_level(logging.INFO):
        network = create(tiny_denoiser, dim=2)
        assert caplog.messages == []
        with pytest.raises(NetworkError, match="no LoRA is left to train"):
            network.apply_to(None, tiny_denoiser, apply_unet=False)
    assert caplog.messages == []
