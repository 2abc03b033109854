from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from library.errors import NetworkError
from networks.arguments import NetworkArguments, component_rate, parse_arguments
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


def test_what_is_looked_for_most_is_named_first(model):
    with pytest.raises(NetworkError, match=r"such as body\.a, body\.b, body\.norm\.c$"):
        chosen(model, exclude_patterns="body")
    with pytest.raises(
        NetworkError, match=r"""several patterns are written as a list, "\[r'\.\*mlp\.\*', r'\.\*v_proj'\]", or with \|"""
    ):
        chosen(model, exclude_patterns=".*mlp.*,.*v_proj")


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
    assert [(t.candidate.name, t.rank, t.alpha, t.own_rate) for t in targets] == [
        ("p_body_a", 2, 5.0, None),
        ("p_body_b", 6, 6.0, ("reg_lr_0", 1e-3)),
    ]


def test_examples():
    assert examples(["a", "b"]) == "a, b"
    assert examples("abcde") == "a, b, c and 2 more"


# --- components


PARTS = ModelRules(
    prefix="p", label="unet", candidates=r"(body\..+)", excludes=(r".*norm.*",), components=(("norm", r"body\.norm\..*"), ("a", r"body\.a"))
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PartArguments(NetworkArguments):
    norm_lr: float | None = component_rate("norm")
    a_lr: float | None = component_rate("a")
    gone_lr: float | None = component_rate("gone")


def rates_of(model, **given):
    arguments = parse_arguments(PartArguments, given)
    targets = select(candidates_of([(model, PARTS)]), arguments, rank=4, alpha=1.0)
    return {target.candidate.path: target.own_rate for target in targets}


def test_a_component_trains_at_its_rate(model):
    assert rates_of(model, a_lr="1e-3") == {"body.a": ("a", 1e-3), "body.b": None}


def test_a_rate_of_zero_leaves_the_component_out(model):
    assert rates_of(model, a_lr=0) == {"body.b": None}
    assert rates_of(model, a_lr=0, include_patterns=".*") == {"body.b": None, "body.norm.c": None}


def test_a_rate_lets_in_what_is_excluded_by_default_but_not_by_the_user(model):
    assert rates_of(model, norm_lr=1e-3)["body.norm.c"] == ("norm", 1e-3)
    assert "body.norm.c" not in rates_of(model, norm_lr=0)
    with pytest.raises(NetworkError, match=r"^--norm_lr is 0.001, but other arguments leave out all of its modules"):
        rates_of(model, norm_lr=1e-3, exclude_patterns=".*norm.*")
    with pytest.raises(NetworkError, match=r"--norm_lr is 0.001, but other arguments leave out all"):
        rates_of(model, norm_lr=1e-3, network_reg_dims=".*norm.*=0")


def test_a_pattern_wins_over_the_component(model):
    assert rates_of(model, a_lr=1e-3, network_reg_lrs=".*a=1e-5")["body.a"] == ("reg_lr_0", 1e-5)
    assert rates_of(model, a_lr=0, network_reg_lrs=".*a=1e-5")["body.a"] == ("reg_lr_0", 1e-5)


def test_a_component_that_the_model_lacks(model):
    with pytest.raises(NetworkError, match=r"--gone_lr is 0.001, but the model has no such part: drop --gone_lr"):
        rates_of(model, gone_lr=1e-3)
    assert len(rates_of(model, gone_lr=0)) == 2


def test_rates_of_a_file(model):
    weights = {"p_body_a.lora_down.weight": torch.zeros(2, 3)}
    candidates = candidates_of([(model, PARTS)])
    (target,) = targets_of_file(candidates, weights, parse_arguments(PartArguments, {"a_lr": 0}))
    assert target.own_rate == ("a", 0.0)  # kept, untrained
    with pytest.raises(NetworkError) as caught:
        targets_of_file(candidates, weights, parse_arguments(PartArguments, {"norm_lr": 1, "network_reg_lrs": r"body\.b=1"}))
    assert [problem.partition(":")[0] for problem in caught.value.problems][:1] == ["--network_args"]
    assert caught.value.problems[1] == (
        "--norm_lr is 1, but the LoRA file, which decides, has none of its modules: drop --norm_lr"
    )
