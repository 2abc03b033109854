from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.caches.share import shared
from tests.library.dataset.caches.cache_parts import make_training_set

REPOSITORY = Path(__file__).parents[4]
FILL = """
import json, sys, torch, torch.distributed as dist
from dataclasses import replace
from pathlib import Path
from library.training.running.processes import HostGroup
from tests.library.dataset.caches.cache_parts import TinyTextEncoder, TinyVae, latent_cache, make_training_set, text_cache
rank, store, folder = int(sys.argv[1]), *sys.argv[2:4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
group, calls = HostGroup(), []
whole_set = make_training_set(Path(folder), 8, flip_aug=True)
alone = latent_cache(whole_set, on_disk=False)
alone.fill(TinyVae(), batch_size=2, workers=1, progress=False)

def gather(value):
    calls.append(value)
    return group.gather(value)

for count, round_bytes, rounds in json.loads(sys.argv[4]):
    training_set = replace(whole_set, items=whole_set.items[:count])
    latents, text = latent_cache(training_set, on_disk=False), text_cache(training_set, on_disk=False)
    latents.round_bytes = text.round_bytes = round_bytes
    share = {"batch_size": 2, "rank": rank, "processes": 2, "gather": gather, "progress": False}
    calls.clear()
    latents.fill(TinyVae(), workers=1, **share)
    assert len(calls) == 1 + rounds + 1, len(calls)  # how many pieces, the pieces, the report
    assert all(len(piece) <= 1 for piece in calls[1:-1]) or round_bytes > 1
    text.fill(TinyTextEncoder(), **share)
    assert latents.state().is_complete and text.state().is_complete
    for item in training_set.items:
        for flipped in (False, True):
            assert torch.equal(latents.load(item, flipped=flipped), alone.load(item, flipped=flipped))
        assert torch.equal(text.load(item).embeds, TinyTextEncoder.one(item.caption).embeds)
    assert text.load_text("").mask.shape == (1, 0)
dist.destroy_process_group()
"""
# images, bytes of a round, rounds that the latents need
CASES = [
    (8, 1, 4),  # an entry a round
    (1, 1, 1),  # one process has nothing
    (5, 1, 4),  # 4 entries and 1
    (5, 1 << 20, 1),  # all at once
]


def entries(*sizes: int) -> dict[str, dict[str, torch.Tensor]]:
    return {f"entry {number}": {"latents": torch.full((size,), number, dtype=torch.uint8)} for number, size in enumerate(sizes)}


def recorded(others: dict[str, Any], rounds: int) -> tuple[list[Any], Callable[[Any], list[Any]]]:
    """A gather of two processes: the other one has ``rounds`` pieces, all of them in the last."""
    seen: list[Any] = []

    def gather(value: Any) -> list[Any]:
        seen.append(value)
        if len(seen) == 1:
            return [value, rounds]
        return [value, others if len(seen) == rounds + 1 else {}]

    return seen, gather


def test_pieces_stay_below_the_limit_and_rounds_are_agreed_on() -> None:
    others = {"another": {"latents": torch.ones(3)}}
    seen, gather = recorded(others, rounds=5)
    found = dict(shared(entries(40, 40, 40, 300, 10), gather, processes=2, round_bytes=200))
    assert seen[0] == 4
    assert [list(piece) for piece in seen[1:]] == [["entry 0", "entry 1"], ["entry 2"], ["entry 3"], ["entry 4"], []][
        : len(seen) - 1
    ]
    assert set(found) == {*entries(1, 1, 1, 1, 1), "another"}


def test_a_process_without_entries_takes_part_in_every_round() -> None:
    seen, gather = recorded(entries(3), rounds=2)
    assert list(dict(shared({}, gather, processes=2))) == ["entry 0"]
    assert seen == [0, {}, {}]


def test_gather_is_needed() -> None:
    with pytest.raises(ValueError, match="gather"):
        list(shared(entries(1), None, processes=2))


def test_two_processes_share_in_rounds_over_gloo(tmp_path: Path) -> None:
    make_training_set(tmp_path, 8)  # drawn once, not by both at a time
    arguments = [str(tmp_path / "store"), str(tmp_path), json.dumps(CASES)]
    processes = [subprocess.Popen([sys.executable, "-c", FILL, str(rank), *arguments], cwd=REPOSITORY) for rank in (0, 1)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
