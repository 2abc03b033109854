"""Keys and shapes of a checkpoint against what a model needs, as one text. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAMED_PER_KIND = 12


def compare_keys(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing from, unexpected in, or misshapen in ``found`` (name -> shape); empty when all fits."""
    misshapen = {
        name: shape_problem(shape, expected[name])
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    }
    return key_problems(
        missing=[name for name in expected if name not in found],
        unexpected=[name for name in found if name not in expected],
        misshapen=misshapen,
    )


def key_problems(*, missing: Sequence[str], unexpected: Sequence[str], misshapen: Mapping[str, str]) -> str:
    """One text about all wrong keys, at most ``NAMED_PER_KIND`` named of each kind; empty when there are none."""
    wrong_shapes = [f"{name} ({text})" for name, text in misshapen.items()]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong_shapes))
    return "; ".join(f"{len(names):,} {kind}: {_some(names)}" for kind, names in kinds if names)


def shape_problem(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return f"{_shape(found)} instead of {_shape(expected)}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(names: Sequence[str]) -> str:
    left = len(names) - NAMED_PER_KIND
    return ", ".join(names[:NAMED_PER_KIND]) + (f" and {left:,} more" if left > 0 else "")
