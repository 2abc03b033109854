from __future__ import annotations

from dataclasses import replace

from tests.library.lumina.tiny_nextdit import TINY
from tools.bench import PHASES
from tools.bench_parts.lumina_padding import CASES, Case, measure


def test_a_batch_is_compared_with_its_samples_in_both_forms():
    figures = measure(1, cases=[Case(lengths=(3, 9), side=8)], config=replace(TINY, blocks=1))
    assert [figure.name for figure in figures] == [
        "Lumina, 16 image tokens, captions of 3+9, in a row",
        "Lumina, 16 image tokens, captions of 3+9, padded",
    ]
    assert all(figure.value > 0 for figure in figures) and figures[0].at_most == 1.1
    assert "lumina_padding" in PHASES and all(len(set(case.lengths)) > 1 for case in CASES)
