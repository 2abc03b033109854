"""Lumina Image 2.0's LoRA against recorded numbers: which modules and optimizer groups arguments give.

The layer's numbers are tested with those of the other models, in test_golden_lora.py.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from golden_files import load_golden_json
from networks import lora_lumina
from networks.network import LoRANetwork
from tests.golden.lora_groups import assert_as_recorded, text_encoder_tree, tree_of
from tests.networks.lumina_models import denoiser_linears

SCENARIOS = ("default", "type_dims_loraplus", "embedders_transformer_only", "refiners_only", "with_text_encoder")
GROUPS = "lumina/lora_param_groups.json"


@pytest.mark.parametrize("name", SCENARIOS)
def test_modules_and_optimizer_groups(name):
    scenario = with_mlp_dim(next(entry for entry in load_golden_json(GROUPS)["scenarios"] if entry["name"] == name))
    assert_as_recorded(network_of(scenario), scenario)


def test_every_recorded_scenario_is_tested():
    assert sorted(entry["name"] for entry in load_golden_json(GROUPS)["scenarios"]) == sorted(SCENARIOS)


def with_mlp_dim(scenario: dict) -> dict:
    """In the recorded network mlp_dim does nothing: it looked for a name that no module has. Here it is the rank of feed_forward,
    of the refiners' too, which refiner_dim then no longer decides."""
    if "mlp_dim" not in scenario["network_args"]:
        return scenario
    changed = deepcopy(scenario)
    rank, alpha = int(scenario["network_args"]["mlp_dim"]), float(scenario["network_alpha"])
    own = [f"lora_unet_{path.replace('.', '_')}" for path in linears() if ".feed_forward." in path]
    rest = [module for module in scenario["modules"] if module["name"] not in own]
    changed["modules"] = [*rest, *({"name": name, "dim": rank, "alpha": alpha} for name in own)]
    for group, half in zip(changed["param_groups"], ("lora_down", "lora_up"), strict=True):
        group["params"] = sorted({*group["params"], *(f"{name}.{half}.weight" for name in own)})
    return changed


def linears() -> dict:
    """The Linears of the recorded model, in its order."""
    sizes = load_golden_json(GROUPS)["config"]
    head = sizes["dim"] // sizes["n_heads"]
    shapes = denoiser_linears(width=sizes["dim"], kv_width=head * sizes["n_kv_heads"], hidden=sizes["ffn_hidden"],
                              time_width=sizes["adaln_in_dim"], layers=sizes["n_layers"])  # fmt: skip
    return {path: torch.Size(shape) for path, shape in shapes.items()}


def network_of(scenario: dict) -> LoRANetwork:
    denoiser, encoder = tree_of(linears()), text_encoder_tree()
    network = lora_lumina.create_network(
        1.0, scenario["network_dim"], scenario["network_alpha"], None, [encoder], denoiser, neuron_dropout=None, **scenario["network_args"]
    )  # fmt: skip
    network.apply_to([encoder], denoiser, scenario["train_text_encoder"], True)
    return network
