"""Recorded modules and optimizer groups of a LoRA, and those of a network, in one form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def tree_of(shapes: Mapping[str, torch.Size]) -> nn.Module:
    """Nested modules with a Linear for each two-dimensional weight."""
    root = nn.Module()
    for key, shape in shapes.items():
        *parents, last = key.removesuffix(".weight").split(".")
        place = root
        for name in parents:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    return root


def text_encoder_tree() -> nn.Module:
    """One layer of a decoder, as the recorded scenarios have it."""
    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return tree_of({f"model.layers.0.{name}": torch.Size([32, 32]) for name in names})


def assert_as_recorded(network: nn.Module, scenario: dict) -> None:
    """The applied network has the scenario's modules, ranks, alphas and optimizer groups."""
    assert {lora.lora_name: (lora.lora_dim, float(lora.alpha)) for lora in network.loras} == {
        module["name"]: (module["dim"], module["alpha"]) for module in scenario["modules"]
    }
    rates = scenario["learning_rates"]
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(
        rates["text_encoder_lr"], rates["unet_lr"], rates["default_lr"]
    )
    keys = {id(parameter): key for key, parameter in network.named_parameters()}
    found = [
        (text, group["lr"], sorted(keys[id(p)] for p in group["params"]))
        for text, group in zip(descriptions, groups, strict=True)
    ]
    assert found == [
        (" ".join(group["description"].split()), group["lr"], sorted(group["params"])) for group in scenario["param_groups"]
    ]
