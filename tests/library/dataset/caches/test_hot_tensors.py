"""Small sets are read twice, and memory stays bounded."""

from __future__ import annotations

import torch

from library.dataset.caches.hot_tensors import ENTRY_BYTES, HotTensors


def test_what_fits_is_read_twice_and_the_rest_each_time():
    reads: list[str] = []

    def read(key: str, count: int):
        reads.append(key)
        return {"a": torch.zeros(count * ENTRY_BYTES, dtype=torch.float32)}

    hot = HotTensors(room_bytes=107 * ENTRY_BYTES)
    for _ in range(3):
        assert hot.get("small", lambda: read("small", 20))["a"].numel() == 20 * ENTRY_BYTES
        assert hot.get("large", lambda: read("large", 20))["a"].numel() == 20 * ENTRY_BYTES  # 81 of 107
        assert hot.get("tiny", lambda: read("tiny", 5))["a"].numel() == 5 * ENTRY_BYTES
    assert reads == [*["small", "large", "tiny"] * 2, "large"]
