"""Swapped blocks give the same loss and the same gradients as those that stay."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.memory.activation_offload import OffloadingRunner
from library.memory.block_swap import (
    ALIGNMENT_BYTES,
    BlockSwap,
    SwappingRunner,
    Way,
    big_weights,
    host_pieces,
    streamed_numbers,
    streamed_weights,
    wanted_blocks,
)
from library.memory.transfer import PlainTransfer, transfer_for
from library.nn.blocks import run_plainly
from library.nn.checkpointing import run_checkpointed
from library.nn.fp8 import Fp8Linear, use_fp8
from tests.library.memory.deep_dit import DEEP, Model, deep_model, same
from tests.library.memory.late_transfer import CountingTransfer, LateTransfer

CPU = torch.device("cpu")
LIMIT = DEEP.blocks - 2
INNER = {
    "plain": lambda: run_plainly,
    "checkpointed": lambda: run_checkpointed,
    "offloaded": lambda: OffloadingRunner(PlainTransfer(), ahead=False),
    "offloaded ahead": lambda: OffloadingRunner(LateTransfer(), ahead=True),
}


def swapping(model: Model, blocks_to_swap: int, *, inner=run_plainly, transfer=None) -> Model:
    ring = BlockSwap(model.denoiser.blocks, blocks_to_swap, device=model.device, transfer=transfer or LateTransfer())
    model.denoiser.run_block = SwappingRunner(ring, inner)
    return model


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("blocks_to_swap", [1, 2, LIMIT])
def test_losses_and_gradients_are_those_without(blocks_to_swap, inner, dropout):
    plain = deep_model(dropout=dropout)
    swapped = swapping(deep_model(dropout=dropout), blocks_to_swap, inner=INNER[inner]())
    for seed in range(2):
        assert same(plain.step(seed), swapped.step(seed))
        assert same(plain.evaluate(), swapped.evaluate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    plain, swapped = deep_model(dtype=dtype), swapping(deep_model(dtype=dtype), LIMIT)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(plain.step(), swapped.step())


@pytest.mark.parametrize("inner", INNER)
def test_passes_in_any_order(inner):
    """Several forwards before a backward, passes without gradients in between, a graph that is run backward twice."""
    plain, swapped = deep_model(), swapping(deep_model(), LIMIT, inner=INNER[inner]())

    def mixed(model: Model) -> list[torch.Tensor]:
        weights = list(model.network.parameters())
        (base,) = model.evaluate()
        first = model.forward()
        (again,) = model.evaluate()
        second = model.forward() * 0.5
        (last,) = model.evaluate()
        loss = (first + second - base).square().mean()
        kept = torch.autograd.grad(loss, weights, retain_graph=True)
        return [base, again, last, *kept, *model.evaluate(), *torch.autograd.grad(loss, weights), *model.step()]

    assert same(mixed(plain), mixed(swapped))


def test_a_network_on_the_last_blocks_only():
    """The first blocks then have no backward pass at all."""
    patterns = {"exclude_patterns": r"['.*']", "include_patterns": r"['blocks\\.[45]\\.mlp\\..*']"}
    plain, swapped = deep_model(**patterns), swapping(deep_model(**patterns), LIMIT)
    assert len(plain.network.unet_loras) == 4
    for seed in range(2):
        assert same(plain.step(seed), swapped.step(seed))


def test_gradients_that_come_through_the_blocks_inputs():
    """As with a LoRA on the text encoder: the context asks for a gradient."""
    found = []
    for model in (deep_model(), swapping(deep_model(), LIMIT)):
        from tests.library.anima.tiny_dit import batch

        latents, sigmas, context = batch()
        context.requires_grad_()
        loss = model.denoiser(latents, sigmas, context).square().mean()
        found.append(torch.autograd.grad(loss, [context, *model.network.parameters()]))
    assert same(list(found[0]), list(found[1]))


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("number", [0, 4])
def test_after_an_exception_in_mid_step(moment, inner, number):
    plain, swapped = deep_model(), swapping(deep_model(), LIMIT, inner=INNER[inner]())
    swapped.step()
    fails = partial(_fail_in, swapped.denoiser.blocks[number], moment)
    with fails(), pytest.raises(ArithmeticError):
        swapped.step()
    assert same(plain.step(1), swapped.step(1))
    with fails(), pytest.raises(ArithmeticError):
        swapped.step()
    assert same(plain.evaluate(), swapped.evaluate())


class _fail_in:
    def __init__(self, block: nn.Module, moment: str):
        self.block, self.moment = block, moment

    def __enter__(self):
        def stop(*_):
            raise ArithmeticError

        if self.moment == "forward":
            self.hook = self.block.mlp.register_forward_pre_hook(stop)
        else:
            self.hook = self.block.mlp.register_forward_hook(lambda module, args, out: out.register_hook(stop) and None)

    def __exit__(self, *_):
        self.hook.remove()


def test_after_a_copy_that_could_not_be_started():
    class Unlucky(LateTransfer):
        fails = False

        def start(self, target, source):
            copy = super().start(target, source)  # the buffer is spoilt already
            if self.fails:
                raise ArithmeticError
            return copy

    transfer = Unlucky()
    plain, swapped = deep_model(), swapping(deep_model(), LIMIT, transfer=transfer)
    swapped.step()
    transfer.fails = True
    with pytest.raises(ArithmeticError):
        swapped.step()
    transfer.fails = False
    assert same(plain.step(1), swapped.step(1))


def test_weights_in_8_bits_with_their_scales():
    found = []
    for swapped in (False, True):
        model = deep_model()
        use_fp8(model.denoiser, r"blocks\..*\.mlp\.layer[12]")
        for layer in model.denoiser.modules():
            if isinstance(layer, Fp8Linear):
                layer.quantise()
        if swapped:
            swapping(model, LIMIT)
        found.append([*model.step(), *model.evaluate()])
    assert same(*found)
    assert model.denoiser.blocks[3].mlp.layer1.weight.dtype == torch.float8_e4m3fn


# ------------------------------------------------------------------ how much is copied, and what it takes


@pytest.mark.parametrize("blocks_to_swap", range(1, LIMIT + 1))
def test_each_pass_copies_each_streamed_block_once_and_turns_copy_nothing(blocks_to_swap):
    model, transfer = deep_model(), CountingTransfer()
    swapping(model, blocks_to_swap, transfer=transfer)
    streamed = blocks_to_swap + 2
    model.step()
    assert transfer.copies == streamed + blocks_to_swap  # the last two are there when the way back begins
    model.step()
    assert transfer.copies == streamed + 3 * blocks_to_swap  # and the first two when the next step does
    model.evaluate()
    before = transfer.copies
    model.evaluate()
    assert transfer.copies - before == (2 if streamed == 3 else streamed)  # of 3, one has a buffer of its own
    before = transfer.copies
    model.step()  # what the pass before fetched for the next one is used; where no block stays, that is one block only
    assert transfer.copies - before == 2 * blocks_to_swap + (streamed == DEEP.blocks)


def test_a_copy_is_under_way_before_its_block_begins():
    model, transfer = deep_model(), LateTransfer()
    swapping(model, LIMIT, transfer=transfer)
    model.step()
    seen = []
    for number, block in enumerate(model.denoiser.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: seen.append((number, len(transfer.waiting))))
    model.step()
    assert seen == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 0)]  # that of the next block; at the end there is none


def test_addresses_stay_and_the_device_holds_two_blocks_and_the_residents():
    model = deep_model()
    block_bytes = sum(
        -(-weight.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for _, weight in big_weights(model.denoiser.blocks[0])
    )
    ring = BlockSwap(model.denoiser.blocks, LIMIT, device=CPU, transfer=PlainTransfer())
    model.denoiser.run_block = SwappingRunner(ring)
    assert ring.device_bytes == 2 * block_bytes
    streamed = [weight for number in ring.streamed for _, weight in big_weights(model.denoiser.blocks[number])]
    addresses = [weight.data_ptr() for weight in streamed]
    assert len({weight.untyped_storage().data_ptr() for weight in streamed}) == 2
    assert all(address % 64 == 0 for address in addresses)
    versions = [weight._version for weight in streamed]
    model.step()
    assert [weight.data_ptr() for weight in streamed] == addresses
    assert [weight._version for weight in streamed] == versions


def test_what_trains_inside_a_block_stays_on_the_device():
    model = deep_model()
    trained = model.denoiser.blocks[2].mlp.layer1.weight.requires_grad_()
    before = trained.data_ptr()
    BlockSwap(model.denoiser.blocks, LIMIT, device=CPU, transfer=PlainTransfer())
    assert trained.data_ptr() == before


def test_blocks_of_different_sizes():
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 8 * width), nn.Linear(8 * width, 8)) for width in (1, 9, 2, 8, 3)
    ).requires_grad_(False)
    x, runs = torch.randn(3, 8, requires_grad=True), []
    for run_block in (run_plainly, None):
        run_block = run_block or SwappingRunner(BlockSwap(blocks, 3, device=CPU, transfer=LateTransfer()))
        out = x
        for number, block in enumerate(blocks):
            out = run_block(number, block, out)
        runs.append([out.detach(), *torch.autograd.grad(out.sum(), [x])])
    assert same(*runs)


# ------------------------------------------------------------------ which blocks


@pytest.mark.parametrize("blocks", [3, 6, 28])
def test_streamed_blocks_lie_in_equal_distances(blocks):
    for swapped in range(1, blocks - 1):
        numbers = streamed_numbers(blocks, swapped)
        assert len(set(numbers)) == swapped + 2 and 0 <= min(numbers) <= max(numbers) < blocks
        gaps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
        assert max(gaps) - min(gaps) <= 1
        assert (blocks - 1 in numbers) == (swapped == blocks - 2)


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("swapped", [1, 2, 13, 14, 26])
def test_a_block_is_wanted_when_it_begins_and_two_never_share_a_buffer(way, swapped):
    streamed = streamed_numbers(28, swapped)
    for number, orders in enumerate(wanted_blocks(28, streamed, way)):
        assert len({order % 2 for order in orders}) == len(orders) <= 2
        if number in streamed:
            assert streamed[orders[0]] == number


def test_the_limit():
    with pytest.raises(OptionError, match="--blocks_to_swap is 5, but this model has 6 blocks: give at most 4"):
        BlockSwap(deep_model().denoiser.blocks, 5, device=CPU, transfer=PlainTransfer())


def test_names_of_the_weights_that_wait():
    blocks = deep_model().denoiser.blocks
    names = set(streamed_weights(blocks, 1))
    assert {name.split(".")[0] for name in names} == {str(number) for number in streamed_numbers(6, 1)} == {"0", "2", "4"}
    assert names <= blocks.state_dict().keys() and "2.mlp.layer1.weight" in names and "2.self_attn.q_norm.weight" not in names


# ------------------------------------------------------------------ host memory


@pytest.mark.parametrize(("count", "mib"), [(28, 132), (16, 132), (3, 132), (1, 256), (5, 700), (4, 1500)])
def test_host_memory_is_asked_for_in_powers_of_two_with_little_waste(count, mib):
    asked = []

    def allocate(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    pieces = list(host_pieces(count, mib * 2**20, allocate))
    assert len(pieces) == count and all(piece.nbytes == mib * 2**20 for piece in pieces)
    assert all(nbytes & (nbytes - 1) == 0 for nbytes in asked)
    apart = count * 2 ** (mib * 2**20 - 1).bit_length()
    assert sum(asked) <= min(apart, count * mib * 2**20 * (1.3 if mib < 500 else 2))


# ------------------------------------------------------------------ the real thing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inner", ["plain", "checkpointed", "offloaded ahead"])
@pytest.mark.parametrize("blocks_to_swap", [1, LIMIT])
def test_on_the_gpu(blocks_to_swap, inner):
    device = torch.device("cuda")
    runner = OffloadingRunner(transfer_for(device), ahead=True) if inner == "offloaded ahead" else INNER[inner]()
    plain = deep_model(device="cuda", dropout=0.2)
    swapped = swapping(deep_model(device="cuda", dropout=0.2), blocks_to_swap, inner=runner, transfer=transfer_for(device))
    for seed in range(5):
        assert same(plain.step(seed), swapped.step(seed))
        assert same(plain.evaluate(), swapped.evaluate())
