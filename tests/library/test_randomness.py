"""Seeds are pure functions of their parts."""

from __future__ import annotations

import os

import torch

from library.randomness import derive_seed, seed_default_generators, uniform


def test_every_part_its_order_and_its_type_count():
    seeds = [derive_seed(*parts) for parts in ((1, "a"), ("a", 1), ("1", "a"), (1, "b"), (1, "a", ""), ())]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(7, "noise", 3) == derive_seed(7, "noise", 3)


def test_the_numbers_stay_what_they_are():
    assert derive_seed(1, "\u732b") == 8612128772552054283


def test_names_of_files_that_are_no_text():
    latin = os.fsdecode(b"caf\xe9.png") if os.name != "nt" else "caf\udce9.png"
    assert len({derive_seed(latin), derive_seed("caf\xe9.png"), derive_seed("\ud800"), derive_seed("caf.png")}) == 4


def test_seeding_for_a_step_draws_what_manual_seed_draws():
    torch.manual_seed(5)
    expected = torch.rand(3)
    seed_default_generators(5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_uniform_numbers_are_spread_evenly_below_one():
    numbers = [uniform("test", number) for number in range(4000)]
    assert all(0 <= number < 1 for number in numbers)
    assert all(900 < sum(low <= number < low + 0.25 for number in numbers) < 1100 for low in (0, 0.25, 0.5, 0.75))
    assert uniform("test", 3) == numbers[3]
