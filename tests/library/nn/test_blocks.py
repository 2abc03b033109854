from __future__ import annotations

import subprocess
import sys

import pytest

from library.nn.blocks import run_plainly, swap_problem


@pytest.mark.parametrize(("swapped", "blocks"), [(None, 28), (0, 28), (0, 1), (26, 28), (1, 3)])
def test_what_fits(swapped, blocks):
    assert swap_problem(swapped, blocks) is None


@pytest.mark.parametrize(("swapped", "blocks", "limit"), [(27, 28, 26), (28, 28, 26), (2, 3, 1)])
def test_what_does_not(swapped, blocks, limit):
    assert swap_problem(swapped, blocks) == (
        f"--blocks_to_swap is {swapped}, but this model has {blocks} blocks: give at most {limit}"
    )


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_model_too_small_to_swap(blocks):
    assert swap_problem(1, blocks) == (
        f"--blocks_to_swap is 1, but this model has {blocks} blocks: these are too few to swap any; drop the flag"
    )


def test_blocks_get_their_inputs():
    assert run_plainly(3, lambda *inputs: inputs, 1, 2, 3) == (1, 2, 3)


def test_the_limit_is_known_without_torch():
    code = "import sys, library.nn.blocks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
