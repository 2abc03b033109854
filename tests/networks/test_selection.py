from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import NetworkError
from networks.arguments import NetworkArguments, parse_arguments
from networks.selection import ModelRules, candidates_of, examples, select, targets_of_file

RULES = ModelRules(prefix="p", label="unet", candidates=r"(body\..+)", excludes=(r".*norm.*",))


def chosen(model, rules=RULES, **given):
    arguments = parse_arguments(NetworkArguments, given)
    targets = select(candidates_of([(model, rules)]), arguments, rank=4, alpha=1.0)
    return {target.candidate.path: target.rank for target in targets}


@pytest.fixture
def model(make_tree):
    model = make_tree({"body.a": (3, 3), "body.b": (3, 3), "body.norm.c": (3, 3), "head": (3, 3)})
    model.body.add_module("conv", nn.Conv2d(3, 3, 1))
    model.body.add_module("act", nn.SiLU())
    return model


def test_defaults(model):
    assert chosen(model) == {"body.a": 4, "body.b": 4}


def test_kinds(model):
    rules = ModelRules(prefix="p", label="unet", candidates=r"(body\..+)", kinds=(nn.Conv2d,))
    assert chosen(model, rules) == {"body.conv": 4}


def test_include_readmits_what_is_excluded_and_does_not_restrict(model):
    assert chosen(model, include_patterns=r"body\.norm\.c") == {"body.a": 4, "body.b": 4, "body.norm.c": 4}
    assert chosen(model, exclude_patterns=".*", include_patterns=r"body\.b") == {"body.b": 4}


def test_patterns_match_whole_paths(model):
    with pytest.raises(NetworkError, match=r"exclude_patterns: 'body' matches none of the 3 modules.*such as body\.a, body\.b"):
        chosen(model, exclude_patterns="body")


def test_first_rank_pattern_counts_and_zero_leaves_out(model):
    assert chosen(model, network_reg_dims=r"body\.a=0, .*=2") == {"body.b": 2}


@pytest.mark.parametrize("name", ["exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs"])
def test_a_pattern_that_matches_nothing(model, name):
    value = "head" if name.endswith("patterns") else "head=1"
    with pytest.raises(NetworkError, match=f"{name}: 'head' matches none"):
        chosen(model, **{name: value})


def test_rank_pattern_for_an_excluded_module_matches_nothing(model):
    with pytest.raises(NetworkError, match="network_reg_dims"):
        chosen(model, network_reg_dims=r"body\.norm\.c=2")


def test_nothing_left(model):
    with pytest.raises(NetworkError, match="no module is left to train.*every one of the 3"):
        chosen(model, exclude_patterns=".*")


def test_names_do_not_depend_on_compilation(model):
    compiled = nn.Module()
    compiled.add_module("_orig_mod", model)
    assert [candidate.name for candidate in candidates_of([(compiled, RULES)])] == ["p_body_a", "p_body_b", "p_body_norm_c"]


def test_targets_of_a_file(model):
    weights = {"p_body_a.lora_down.weight": torch.zeros(2, 3), "p_body_a.alpha": torch.tensor(5.0), "p_body_b.lora_down.weight": torch.zeros(6, 3)}  # fmt: skip
    arguments = parse_arguments(NetworkArguments, {"network_reg_lrs": r".*\.b=1e-3"})
    targets = targets_of_file(candidates_of([(model, RULES)]), weights, arguments)
    assert [(t.candidate.name, t.rank, t.alpha, t.reg_lr) for t in targets] == [
        ("p_body_a", 2, 5.0, None),
        ("p_body_b", 6, 6.0, (0, 1e-3)),
    ]


def test_examples():
    assert examples(["a", "b"]) == "a, b"
    assert examples("abcde") == "a, b, c and 2 more"
