"""The benchmark's phase of weights in 8 bits, on small sizes. Errors do not depend on the machine, so they are judged."""

from __future__ import annotations

from library.anima.layout import DenoiserConfig
from tools.bench_parts import fp8
from tools.bench_parts.figures import Figure

NARROW = DenoiserConfig(width=32, blocks=1, heads=2, head_dim=16, mlp_hidden=64, adaln_dim=8, context_dim=16, adapter=None)


def named(figures: list[Figure], *parts: str) -> float:
    (found,) = [figure.value for figure in figures if all(part in figure.name for part in parts)]
    return found


def test_errors_gradients_and_sizes():
    figures = fp8.measure(1, config=NARROW, side=8)
    assert not [figure.name for figure in figures if figure.verdict not in ("", "ok")]
    per_channel = [figure.value for figure in figures if "layer" in figure.name and "per channel" in figure.name]
    plain_cast = [figure.value for figure in figures if "layer" in figure.name and "plain cast" in figure.name]
    assert min(per_channel) > 0.02 and max(per_channel) < 0.03  # the same at every spread of the weights
    assert plain_cast[1] > 1.5 * per_channel[1]  # small ones lose bits
    assert 0 < named(figures, "width 32, per channel: error") < 0.1
    assert 0.5 < named(figures, "weights") < 0.6
    assert named(figures, "text encoder") > 0 and named(figures, "adapter") > 0
