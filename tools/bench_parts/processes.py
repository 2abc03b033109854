"""Other processes and what they use: seconds of CPU, seconds until they say something, peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished process used. ``output``: its stdout and stderr together."""

    status: int
    cpu_s: float  # user and system
    said_s: float | None  # wall time until it printed the awaited line; None: it never did
    output: str


def script(*arguments: object) -> list[str]:
    """The command line of the training script, without a launcher."""
    return [sys.executable, str(REPOSITORY / "anima_train_network.py"), *map(str, arguments)]


def environment(threads: int = 1) -> dict[str, str]:
    """As ``accelerate launch --num_cpu_threads_per_process 1`` makes it, on the CPU, unbuffered, and without a hub."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    fixed = {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": str(threads),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }
    return {**own, **fixed}


def run_measured(command: Sequence[str], *, awaited: str | None = None, env: Mapping[str, str] | None = None) -> Usage:
    """Runs ``command`` to its end. ``awaited``: how the line begins whose time is wanted."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=env or environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    assert process.stdout is not None
    said_s, lines = None, []
    for line in process.stdout:
        if awaited is not None and said_s is None and line.startswith(awaited):
            said_s = time.perf_counter() - start
        lines.append(line)
    process.stdout.close()
    cpu_s = _cpu_of_ended(process) if hasattr(os, "wait4") else _cpu_by_polling(process)
    return Usage(process.returncode, cpu_s, said_s, "".join(lines))


def _cpu_of_ended(process: subprocess.Popen[str]) -> float:
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def _cpu_by_polling(process: subprocess.Popen[str]) -> float:
    """For Windows: the last reading before the end. Output has ended already, so little is missed."""
    import psutil

    cpu_s, watched = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            times = watched.cpu_times()
        except psutil.NoSuchProcess:
            break
        cpu_s = times.user + times.system
        time.sleep(POLL_S)
    process.wait()
    return cpu_s


def checked(usage: Usage, *, status: int = 0) -> Usage:
    """Raises RuntimeError, with the end of its output, for a process that did not end as it should."""
    if usage.status != status:
        raise RuntimeError(f"a measured process ended with status {usage.status}, not {status}:\n{usage.output[-3000:]}")
    return usage


def resident_bytes() -> int:
    """Memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most memory that this program had. Not getrusage on Linux: its number includes what the parent had before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii", errors="replace").splitlines() if "VmHWM" in line)
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
