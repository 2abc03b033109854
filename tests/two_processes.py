"""Two real processes that train together on the CPU, without a launcher."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_two(script: Path, *arguments: object, environment: Mapping[str, str]) -> list[tuple[int, str]]:
    """Runs a Python file twice, as process 0 and 1. Returns exit status and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**environment, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=120)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()
