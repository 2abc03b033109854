"""What block swap costs beside its copies: its own bookkeeping in a training step, with copies that copy nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from library.anima.denoiser import AnimaDenoiser
from library.anima.layout import DenoiserConfig
from library.memory.block_swap import BlockSwap, SwappingRunner
from library.memory.transfer import Copy, PlainTransfer
from tools.bench_parts.figures import Figure, Pairs, alternate, seconds, stopwatch
from tools.bench_parts.lora import lora_step, make_inputs, twins

OWN_PERCENT = 2.0  # target
DEEP = DenoiserConfig(width=1024, blocks=6, heads=8, head_dim=128, mlp_hidden=4096, adapter=None)
ROUNDS = 50


class FilledOnce(PlainTransfer):
    """Copies into each place once, so that there are usual numbers to compute with; from then on it only says so."""

    def __init__(self) -> None:
        self.filled: set[int] = set()

    def start(self, target: Tensor, source: Tensor) -> Copy:
        if target.data_ptr() in self.filled:
            return Copy(target, source)
        self.filled.add(target.data_ptr())
        return super().start(target, source)


def measure(repeats: int, *, config: DenoiserConfig = DEEP, side: int = 64, rank: int = 16) -> list[Figure]:
    """``side``: latent rows and columns; 64 are 1024 image tokens. Float32 on the CPU, one image, as many swapped as can be."""
    plain, swapped = twins(config)
    plain_blocks = [{name: tensor.clone() for name, tensor in block.state_dict().items()} for block in plain.blocks]
    use_ring(swapped, config.blocks - 2)
    for block, weights in zip(plain.blocks, plain_blocks, strict=True):  # the twins shared theirs
        block.load_state_dict(weights, assign=True)
    inputs = make_inputs(config, side)
    with_swap, without = (stopwatch(lora_step(model, inputs, rank)) for model in (swapped, plain))
    pairs = alternate(with_swap, without, repeats=repeats)
    own_s = bookkeeping_s(config.blocks)
    return [own_share(own_s, pairs), whole_step(pairs)]


def own_share(own_s: float, pairs: Pairs) -> Figure:
    step_s = median(pairs.second)
    how = f"calls and hooks of one step {seconds(own_s)}, step {seconds(step_s)}"
    return Figure(name="swap: bookkeeping in a step", value=100 * own_s / step_s, unit="%", at_most=OWN_PERCENT, how=how)


def whole_step(pairs: Pairs) -> Figure:
    """For information: what is to be seen is far below what two steps differ by on a machine that others use."""
    return Figure(name="swap: step / step without", value=pairs.ratio, unit="x", how=pairs.described("swapped", "plain"))


def use_ring(denoiser: AnimaDenoiser, blocks_to_swap: int) -> None:
    ring = BlockSwap(denoiser.blocks, blocks_to_swap, device=torch.device("cpu"), transfer=FilledOnce())
    denoiser.run_block = SwappingRunner(ring)


def bookkeeping_s(blocks: int, rounds: int = ROUNDS) -> float:
    """Seconds of one forward and backward pass through blocks that compute next to nothing, over those without swapping."""
    torch.manual_seed(0)
    tiny = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(blocks)).requires_grad_(False)
    wrapped = nn.ModuleList(nn.Sequential(block) for block in tiny)
    plain = one_pass(wrapped, lambda number, block, x: block(x))
    before = timed(plain, rounds)
    ring = BlockSwap(wrapped, blocks - 2, device=torch.device("cpu"), transfer=FilledOnce())
    return max(timed(one_pass(wrapped, SwappingRunner(ring)), rounds) - before, 0.0)


def one_pass(blocks: nn.ModuleList, run_block: Callable[..., Tensor]) -> Callable[[], None]:
    start = torch.ones(1, 1, requires_grad=True)

    def run() -> None:
        x = start
        for number, block in enumerate(blocks):
            x = run_block(number, block, x)
        x.backward()

    return run


def timed(work: Callable[[], None], rounds: int) -> float:
    """Seconds of CPU, the median."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return median(times)
