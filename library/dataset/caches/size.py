"""Whether caches that are kept in memory fit there. Torch-free: asked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from library.dataset.caches.cache_file import CacheState

MIB = 1 << 20
CONTAINER_MEMORY = Path("/sys/fs/cgroup")
WARN_ABOVE = 0.5  # of the free memory: models pass through it too


def free_memory_bytes(container: Path = CONTAINER_MEMORY) -> int:
    """Host memory that this process can still take, in bytes: what the machine has free, or what is left of the limit of the
    container (cgroup v2, read in the folder ``container``), whichever is less."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int((container / "memory.max").read_text("ascii"))  # "max" where there is none
        used = int((container / "memory.current").read_text("ascii"))
        lines = (container / "memory.stat").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return free
    reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))  # cached file pages
    return min(free, max(limit - used + reclaimable, 0))


def memory_bytes(states: Iterable[CacheState]) -> int:
    """What the caches in memory among ``states`` will take in one process."""
    return sum(state.bytes_needed for state in states if state.in_memory)


def memory_warning(
    states: Iterable[CacheState], *, processes_here: int | None = None, free_bytes: int | None = None
) -> str | None:
    """A sentence when the caches in memory among ``states`` want more than half of the free memory, else None.

    Every process holds a whole cache. ``processes_here``: of this run on this machine (from the launcher when not given);
    ``free_bytes``: measured when not given.
    """
    processes = processes_here or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = memory_bytes(states) * processes
    if not needed:
        return None
    free = free_memory_bytes() if free_bytes is None else free_bytes
    if needed <= WARN_ABOVE * free:
        return None
    holders = f" in {processes} processes together" if processes > 1 else ""
    return (
        f"the caches in memory will take about {needed / MIB:,.0f} MiB{holders} and {free / MIB:,.0f} MiB are free: "
        "--cache_latents_to_disk and --cache_text_encoder_outputs_to_disk keep them on disk instead"
    )
