"""Small sets are read twice, and memory stays bounded."""

from __future__ import annotations

import torch

from library.dataset.caches.hot_tensors import ENTRY_BYTES, HotTensors


def test_what_fits_is_read_twice_and_the_rest_each_time():
    reads: list[str] = []
    hot = HotTensors(room_bytes=107 * ENTRY_BYTES)

    def ask(key: str, count: int) -> None:
        size = count * ENTRY_BYTES
        found = hot.find(key)
        if found is None:
            reads.append(key)
            hot.offer(key, lambda: {"a": torch.zeros(size, dtype=torch.float32)})
        else:
            assert found["a"].numel() == size

    for _ in range(3):
        ask("small", 20)
        ask("large", 20)  # 81 of 107
        ask("tiny", 5)
    assert reads == [*["small", "large", "tiny"] * 2, "large"]


def test_what_is_kept_is_copied_once():
    hot, copies = HotTensors(), []
    for _ in range(4):
        hot.offer("key", lambda: copies.append(1) or {"a": torch.ones(2)})  # type: ignore[func-returns-value]
    assert copies == [1]
