"""The dataset layer: a big set's start, reading caches, decoding images."""

from __future__ import annotations

from tools.bench_parts import big_set, decode, reading
from tools.bench_parts.figures import Figure


def measure(repeats: int) -> list[Figure]:
    return [*big_set.measure(repeats), *reading.measure(repeats), *decode.measure(repeats)]
