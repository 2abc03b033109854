"""Sharing caches that are kept in memory between the processes of a run, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Gather = Callable[[Any], list[Any]]  # one object of each process -> all of them, in rank order
Key = TypeVar("Key", bound=Hashable)

ROUND_BYTES = 256 << 20  # of tensors that all processes together hand over at once; a round needs about three times as much


def shared(
    own: Mapping[Key, dict[str, Tensor]], gather: Gather | None, *, processes: int, round_bytes: int = ROUND_BYTES
) -> Iterator[tuple[Key, dict[str, Tensor]]]:
    """Yields the entries of every process, ``own`` ones included. All processes go through it to its end.

    Beside the entries themselves about three times ``round_bytes`` are held (or three times ``processes`` entries, if larger).
    """
    if gather is None:
        raise ValueError("a cache in memory needs gather() to be shared by several processes")
    pieces = list(_pieces(own, round_bytes // processes))
    for number in range(max(gather(len(pieces)))):  # as many rounds as the fullest process needs
        piece = pieces[number] if number < len(pieces) else ()
        for share in gather({key: own[key] for key in piece}):
            yield from share.items()


def _pieces(entries: Mapping[Key, dict[str, Tensor]], limit_bytes: int) -> Iterator[tuple[Key, ...]]:
    """The keys in order, cut so that the tensors of each piece have at most ``limit_bytes``; an entry is never cut."""
    piece: list[Key] = []
    filled = 0
    for key, tensors in entries.items():
        size = sum(tensor.nbytes for tensor in tensors.values())
        if piece and filled + size > limit_bytes:
            yield tuple(piece)
            piece, filled = [], 0
        piece.append(key)
        filled += size
    if piece:
        yield tuple(piece)
