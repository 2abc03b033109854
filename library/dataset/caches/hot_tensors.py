"""What was read from cache files, kept in memory while there is room: small sets are read twice, large ones as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOM_BYTES = 512 * 2**20  # for each cache of each process
ENTRY_BYTES = 1024  # what keeping an entry takes besides its values: its key and the tensor objects

Tensors = Mapping[str, "Tensor"]


class HotTensors:
    """Tensors by key, kept from the second time on that they are asked for: what is used once takes no memory, and new memory
    for it would take longer than reading it.

    Nothing is ever dropped, and nothing is added once ``room_bytes`` are taken: an epoch shows every image once, so what was
    used last is no likelier to come next. Safe in threads.
    """

    def __init__(self, room_bytes: int = ROOM_BYTES):
        self._room_bytes = room_bytes
        self._kept: dict[Hashable, Tensors] = {}
        self._read_once: set[int] = set()  # hashes of keys; two equal ones only make the second be kept early
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Tensors | None:
        """What was kept. The tensors are shared: callers must not change them."""
        return self._kept.get(key)

    def offer(self, key: Hashable, copy: Callable[[], Tensors]) -> None:
        """Tells that ``key`` was asked for; ``copy`` makes what would be kept."""
        if self._room_bytes <= ENTRY_BYTES or key in self._kept:
            return
        if hash(key) in self._read_once:
            self._keep(key, copy())
        else:
            self._read_once.add(hash(key))

    def _keep(self, key: Hashable, tensors: Tensors) -> None:
        size = ENTRY_BYTES + sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            if size <= self._room_bytes and key not in self._kept:
                self._room_bytes -= size
                self._kept[key] = tensors
                self._read_once.discard(hash(key))
