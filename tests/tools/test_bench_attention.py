from __future__ import annotations

from library.anima.layout import DenoiserConfig
from tools.bench import PHASES
from tools.bench_parts import attention

NARROW = DenoiserConfig(width=32, blocks=1, heads=2, head_dim=16, mlp_hidden=64, adaln_dim=8, context_dim=16, adapter=None)


def test_both_forms_are_measured_and_give_the_same_numbers():
    case = attention.Case(tokens=(9, 4), side=8)
    ratio, difference = attention.measure(1, cases=[case], config=NARROW)
    assert "attention" in PHASES
    assert ratio.name == "zero rows, 16 image tokens, captions of 9+4: with / without" and ratio.value > 0
    assert difference.verdict == "ok" and difference.value > 0  # two ways of rounding, so the rows were really left out
