"""Block swap: the weights of some transformer blocks wait in host memory and are copied to the device before each use.

Frozen weights do not change, so they only ever travel one way. Of N blocks and n swapped ones the device holds N - n: N - n - 2
stay there, and the other n + 2 are streamed through two ring buffers, streamed block j always through buffer j % 2. Each weight
is a view of its buffer for ever: addresses stay as they are, and filling a buffer does not count as a change of the weights
that autograd has saved. What makes the gradients right is that the right content is back when a block's backward begins.

The rule: when a block begins, the two buffers hold, or are being given, the next two streamed blocks on the way, itself
included. It follows from nothing but the block and the way, so a run that goes another way than expected (no backward, a second
forward, an exception) costs a wait, never wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError
from library.memory.transfer import Copy, Transfer
from library.nn.blocks import PLACES_NEEDED, BlockRunner, run_plainly, swap_problem

ALIGNMENT_BYTES = 256  # of a weight in its buffer, as in the allocations of CUDA
LARGEST_PIECE_BYTES = 2**30  # of host memory that is asked for at once
RINGS = PLACES_NEEDED


class Way(Enum):
    """Through the blocks: forward with a backward to come, backward, and forward after forward."""

    THERE = "there"
    BACK = "back"
    AROUND = "around"


class SwappingRunner:
    """A ``BlockRunner`` around another one: each block's weights are there in its forward and in its backward.

    ``block`` may be compiled and ``inner`` may run it again in backward: both happen between two calls of ``ensure``.
    """

    def __init__(self, swap: BlockSwap, inner: BlockRunner = run_plainly):
        self._swap = swap
        self._inner = inner
        self._before_backward = [partial(_return_to, swap, number) for number in range(swap.blocks)]

    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        self._swap.ensure(number, Way.THERE if torch.is_grad_enabled() else Way.AROUND)
        out = self._inner(number, block, x, *inputs)
        if out.requires_grad:
            # Runs before the first backward node of this block. Autograd takes what was recorded last first, so all nodes of the
            # block after this one are done by then.
            out.register_hook(self._before_backward[number])
        return out


def _return_to(swap: BlockSwap, number: int, gradient: Tensor) -> None:
    swap.ensure(number, Way.BACK)


class BlockSwap:
    """The ring of one model. It takes the blocks' big weights over: they must be loaded, frozen, and stay as they are."""

    def __init__(self, blocks: nn.ModuleList, blocks_to_swap: int, *, device: torch.device, transfer: Transfer):
        """Moves all else of the blocks to ``device``. Peak host memory is that of the streamed weights and one gigabyte.

        Raises OptionError when fewer than two places would be left.
        """
        if problem := swap_problem(blocks_to_swap, len(blocks)):
            raise OptionError(problem)
        self.blocks = len(blocks)
        self.streamed = streamed_numbers(len(blocks), blocks_to_swap)
        self._transfer = transfer
        self._wanted = {way: wanted_blocks(self.blocks, self.streamed, way) for way in Way}
        layouts = [_Layout.of(blocks[number]) for number in self.streamed]
        _move_others(blocks, layouts, device)
        self._rings = [_Ring(_largest(layouts[first::RINGS]), device) for first in range(RINGS)]
        self._copies: list[tuple[Tensor, Tensor]] = []  # of each streamed block: target, source
        for layout, host in zip(layouts, host_pieces(len(layouts), _largest(layouts), transfer.host_memory), strict=True):
            memory = self._rings[len(self._copies) % RINGS].memory
            layout.pack(host, memory)
            self._copies.append((memory[: layout.nbytes], host[: layout.nbytes]))

    @property
    def device_bytes(self) -> int:
        """Of both ring buffers."""
        return sum(ring.memory.nbytes for ring in self._rings)

    def ensure(self, number: int, way: Way) -> None:
        """Block ``number`` is about to compute, and all that the others were asked to compute is queued."""
        for order in self._wanted[way][number]:
            ring = self._rings[order % RINGS]
            if ring.holds != order:
                ring.holds = None  # stays so if the copy cannot be started
                ring.copy = self._transfer.start(*self._copies[order])
                ring.holds = order
            if self.streamed[order] == number and ring.copy is not None:
                self._transfer.wait(ring.copy)
                ring.copy = None


class _Ring:
    """A buffer on the device, the streamed block whose weights are in it, and their copy as long as it is not waited for."""

    def __init__(self, nbytes: int, device: torch.device):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.copy: Copy | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each big weight of a block lies in a buffer, in bytes from its beginning."""

    weights: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, block: nn.Module) -> _Layout:
        weights = tuple(weight for _, weight in big_weights(block))
        offsets, end = [], 0
        for weight in weights:
            offsets.append(end)
            end += -(-weight.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(weights, tuple(offsets), end)

    def pack(self, host: Tensor, device: Tensor) -> None:
        """Copies the weights into ``host`` and makes them views of ``device``, one by one; both (bytes,)."""
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            here = slice(offset, offset + weight.nbytes)
            host[here].copy_(weight.detach().contiguous().view(-1).view(torch.uint8))
            # Not a new Parameter: one made from a view would count every filling of the buffer as its own change.
            weight.data = device[here].view(weight.dtype).view(weight.shape)


def big_weights(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen matrices of the Linear layers, with their names in ``block.state_dict()``; norms and biases are small."""
    for name, module in block.named_modules():  # each module once
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            yield f"{name}.weight", module.weight


def streamed_weights(blocks: nn.ModuleList, blocks_to_swap: int) -> Iterator[str]:
    """Names in ``blocks.state_dict()`` of the weights that a ``BlockSwap`` keeps on the host; they may be on the meta device.

    Whatever is a Linear counts, trained or not: before loading, nothing is frozen yet.
    """
    for number in streamed_numbers(len(blocks), blocks_to_swap):
        for name, module in blocks[number].named_modules():
            if isinstance(module, nn.Linear):
                yield f"{number}.{name}.weight"


def streamed_numbers(blocks: int, blocks_to_swap: int) -> tuple[int, ...]:
    """Which blocks are streamed, in equal distances: while one is copied, the blocks between them compute.

    The last block stays, if any does: it computes while the first ones are fetched for the next pass.
    """
    count = blocks_to_swap + RINGS
    return tuple(order * blocks // count for order in range(count))


def wanted_blocks(blocks: int, streamed: Sequence[int], way: Way) -> tuple[tuple[int, ...], ...]:
    """For each block: the streamed blocks (as places in ``streamed``) that the ring shall hold when it begins, the next first.

    Where a way ends, only what is left of it: the buffers then keep what they hold, which is what the way back begins with.
    """
    count = len(streamed)
    following: Callable[[int], Sequence[int]] = {
        Way.THERE: lambda number: [order for order in range(count) if streamed[order] >= number],
        Way.BACK: lambda number: [order for order in reversed(range(count)) if streamed[order] <= number],
        Way.AROUND: lambda number: sorted(range(count), key=lambda order: (streamed[order] < number, order)),
    }[way]
    return tuple(_next_of_each_ring(following(number)) for number in range(blocks))


def _next_of_each_ring(orders: Sequence[int]) -> tuple[int, ...]:
    """The first, and the first after it that goes through the other buffer."""
    others = [order for order in orders if order % RINGS != orders[0] % RINGS]
    return (*orders[:1], *others[:1])


def host_pieces(count: int, nbytes: int, allocate: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """``count`` pieces (nbytes,) of host memory, allocated when they are asked for.

    Pinned memory is given out in powers of two, so several pieces are cut from one allocation, in whichever size wastes least.
    """
    smallest = 1 << (nbytes - 1).bit_length()
    sizes = [smallest]
    while sizes[-1] * 2 <= LARGEST_PIECE_BYTES:
        sizes.append(sizes[-1] * 2)
    while count:
        size = max(sizes, key=lambda size: min(size // nbytes, count) / size)
        fitting = min(size // nbytes, count)
        yield from allocate(size)[: fitting * nbytes].split(nbytes)
        count -= fitting


def _largest(layouts: Sequence[_Layout]) -> int:
    return max(layout.nbytes for layout in layouts)


def _move_others(blocks: nn.ModuleList, layouts: Sequence[_Layout], device: torch.device) -> None:
    """All that is not streamed to the device; the blocks' modules stay the ones they are."""
    streamed = {id(weight) for layout in layouts for weight in layout.weights}
    for block in blocks:
        for parameter in block.parameters():
            if id(parameter) not in streamed:
                parameter.data = parameter.data.to(device)
        for owner in block.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = buffer.to(device)
