from __future__ import annotations

import pytest
import torch

from library.anima.layout import DenoiserConfig
from tools.bench import PHASES
from tools.bench_parts import compile as phase

NARROW = DenoiserConfig(width=32, blocks=2, heads=2, head_dim=16, mlp_hidden=64, adaln_dim=8, context_dim=16, adapter=None)


@pytest.mark.slow  # generates and builds C++
def test_one_graph_is_compiled_and_its_step_measured():
    torch._dynamo.reset()
    ratio, graphs, first = phase.measure(1, config=NARROW, side=16, rank=2)
    torch._dynamo.reset()
    assert "compile" in PHASES
    assert ratio.value > 0 and first.value > 0
    assert graphs.value == 1 and graphs.verdict == "ok"
