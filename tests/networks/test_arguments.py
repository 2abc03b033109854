from __future__ import annotations

import pytest

from library.errors import NetworkError
from networks.anima_arguments import COMPONENT_RATES, AnimaArguments
from networks.arguments import NetworkArguments, parse_arguments


def parsed(**given):
    return parse_arguments(NetworkArguments, given)


def texts(patterns):
    return [pattern.pattern for pattern in patterns]


def test_nothing_given():
    arguments = parsed(dropout=None)
    assert arguments == NetworkArguments()
    assert arguments.exclude_patterns == () and arguments.rank_dropout is None and not arguments.verbose


@pytest.mark.parametrize("text", ["true", "True", "1", "yes"])
def test_true_words(text):
    assert parsed(verbose=text).verbose is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no"])
def test_false_words(text):
    assert parsed(verbose=text).verbose is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r".*mlp.*", [r".*mlp.*"]),
        (r"[abc].*", [r"[abc].*"]),
        (r"[r'.*\.mlp\..*']", [r".*\.mlp\..*"]),
        (r"['.*a{1,2}', \"b=c\"]".replace(r"\"", '"'), [".*a{1,2}", "b=c"]),
        ("'.*mlp.*'", [".*mlp.*"]),
        (["x", "y"], ["x", "y"]),
    ],
)
def test_pattern_lists(text, expected):
    assert texts(parsed(exclude_patterns=text).exclude_patterns) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r".*self_attn.*=8, .*mlp\.layer1=2", [(r".*self_attn.*", 8), (r".*mlp\.layer1", 2)]),
        (r'"blocks\.\d{1,2}\..*"=8,x=0', [(r"blocks\.\d{1,2}\..*", 8), ("x", 0)]),
        (r"r'a=b,c'=4", ["a=b,c", 4]),
        (r"a=b=4,", [("a=b", 4)]),
    ],
)
def test_rank_tables(text, expected):
    table = [(pattern.pattern, rank) for pattern, rank in parsed(network_reg_dims=text).network_reg_dims]
    assert table == ([tuple(expected)] if isinstance(expected[0], str) else expected)


def test_learning_rate_table():
    ((pattern, rate),) = parsed(network_reg_lrs=".*cross_attn.*=5e-5").network_reg_lrs
    assert pattern.fullmatch("blocks.0.cross_attn.q_proj") and rate == 5e-5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank_dropuot": "0.1"}, r"rank_dropuot is not an argument.*did you mean rank_dropout\?"),
        ({"rank_dropout": "lots"}, r"rank_dropout=lots cannot be used: give a number"),
        ({"module_dropout": "1.0"}, r"module_dropout=1.0.*up to, but not including, 1"),
        ({"loraplus_lr_ratio": "0"}, r"loraplus_lr_ratio=0.*above 0"),
        ({"verbose": "maybe"}, r"verbose=maybe.*true or false"),
        ({"exclude_patterns": "*mlp"}, r"exclude_patterns=\*mlp.*'\*mlp' is not valid: nothing to repeat"),
        ({"exclude_patterns": "[1, 2]"}, r"exclude_patterns=\[1, 2\].*list such as"),
        ({"network_reg_dims": "a{1,2}=8"}, r"'a\{1' is not a pair.*in quotes"),
        ({"network_reg_dims": ".*=many"}, r"'many' after '\.\*' is not a rank"),
        ({"network_reg_dims": ".*=-1"}, r"'-1' after '\.\*' is not a rank"),
        ({"network_reg_lrs": ".*=nan"}, r"'nan' after '\.\*' is not a learning rate"),
        ({"network_reg_lrs": "'.*=1"}, r"cannot read it from"),
    ],
)
def test_what_cannot_be_read(given, said):
    with pytest.raises(NetworkError, match=said):
        parse_arguments(NetworkArguments, given)


def test_all_problems_come_together():
    with pytest.raises(NetworkError) as caught:
        parsed(rank_dropout="x", nonsense="1", verbose="maybe")
    assert len(caught.value.problems) == 3


def test_rates_of_components_are_flags():
    arguments = parse_arguments(AnimaArguments, {"self_attn_lr": 1e-3, "mlp_lr": 0.0, "mod_lr": None})
    assert arguments.component_rates == {"self_attn": 1e-3, "mlp": 0.0}
    assert COMPONENT_RATES == ("self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr", "llm_adapter_lr")
    with pytest.raises(NetworkError, match=r"^--mlp_lr=-1 cannot be used: give a learning rate"):
        parse_arguments(AnimaArguments, {"mlp_lr": -1})
    with pytest.raises(NetworkError) as caught:
        parse_arguments(AnimaArguments, {"nonsense": 1})
    assert "verbose" in str(caught.value) and "mlp_lr" not in str(caught.value)
