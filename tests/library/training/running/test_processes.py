from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.training.running.processes import HostGroup

REPOSITORY = Path(__file__).parents[4]
START = """
import signal, sys, time, torch, torch.distributed as dist
from library.training.running.processes import HostGroup
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background lets its children ignore Ctrl-C
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
group = HostGroup()
"""
TALK = """
assert group.processes == 2
value = {"rank": rank, "latents": torch.full((4, rank + 2), float(rank), dtype=torch.bfloat16)}
found = group.gather(value)
assert [one["rank"] for one in found] == [0, 1]
assert [tuple(one["latents"].shape) for one in found] == [(4, 2), (4, 3)]
assert found[1]["latents"].dtype == torch.bfloat16 and bool((found[1]["latents"] == 1).all())
assert group.any(rank == 1) and group.any(rank == 0) and not group.any(False)
assert group.broadcast(("from", rank)) == ("from", 0)
start = time.monotonic()
time.sleep(0.5 * rank)
group.wait()
assert time.monotonic() - start >= 0.5
dist.destroy_process_group()
"""
LEFT_ALONE = """
from library.errors import TrainingError
if rank == 1:
    sys.exit(0)
try:
    group.gather(rank)
except TrainingError as error:
    print(error)
"""
WAIT = """
if rank == 1:
    time.sleep(60)
try:
    print("waiting", flush=True)
    group.wait()
except KeyboardInterrupt:
    print("heard", flush=True)
"""


def start(code: str, folder: Path) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", START + code]
    return [
        subprocess.Popen([*command, str(rank), str(folder / "store")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]


def test_alone_everything_is_the_identity() -> None:
    group = HostGroup()
    value = {"latents": torch.zeros(2)}
    assert group.processes == 1
    assert group.gather(value)[0] is value
    assert group.broadcast(value) is value
    assert group.any(True)
    assert not group.any(False)
    group.wait()


def test_two_processes_tell_each_other(tmp_path: Path) -> None:
    processes = start(TALK, tmp_path)
    assert [process.wait(timeout=60) for process in processes] == [0, 0]


def test_the_end_of_another_process_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    processes = start(LEFT_ALONE, tmp_path)
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 0
    assert output.startswith("another process of this run has ended")


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C reaches the test too")
def test_waiting_heeds_ctrl_c(tmp_path: Path) -> None:
    processes = start(WAIT, tmp_path)
    output = processes[0].stdout
    assert output is not None
    try:
        assert output.readline() == "waiting\n"
        time.sleep(0.2)  # until it does wait
        processes[0].send_signal(signal.SIGINT)
        assert output.readline() == "heard\n"
        assert processes[1].poll() is None
    finally:
        for process in reversed(processes):  # gloo's threads end when the other process does
            process.kill()
            process.wait()
