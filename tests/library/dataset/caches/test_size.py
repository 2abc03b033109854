from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from library.dataset.caches.cache_file import CacheState
from library.dataset.caches.size import MIB, free_memory_bytes, memory_bytes, memory_warning
from tests.library.dataset.caches.cache_parts import TinyTextEncoder, TinyVae, latent_cache, make_training_set, text_cache


def state(mib: int, *, in_memory: bool = True) -> CacheState:
    return CacheState(total=1, valid=0, missing=1, stale=(), bytes_needed=mib * MIB, in_memory=in_memory)


def test_free_memory_is_that_of_the_machine_or_the_container(tmp_path: Path) -> None:
    machine = free_memory_bytes(tmp_path)  # no limit is written there
    assert 0.5 * psutil.virtual_memory().available < machine <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("30000000\n")
    (tmp_path / "memory.stat").write_text("anon 20000000\ninactive_file 4000000\nactive_file 6000000\n")
    assert free_memory_bytes(tmp_path) == 24_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path) > 50_000_000


def test_the_warning_names_sizes_and_flags() -> None:
    states = [state(300), state(300), state(10_000, in_memory=False)]
    assert memory_bytes(states) == 600 * MIB
    assert memory_warning(states, free_bytes=1200 * MIB, processes_here=1) is None
    text = memory_warning(states, free_bytes=1100 * MIB, processes_here=1)
    assert text is not None
    assert "about 600 MiB and 1,100 MiB are free: --cache_latents_to_disk" in text
    assert memory_warning([state(9, in_memory=False)], free_bytes=0) is None


def test_each_process_of_the_machine_holds_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_warning([state(300)], free_bytes=1000 * MIB) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "about 600 MiB in 2 processes together" in str(memory_warning([state(300)], free_bytes=1000 * MIB))


def test_latents_in_memory_take_what_was_said(tmp_path: Path) -> None:
    cache = latent_cache(make_training_set(tmp_path, flip_aug=True), on_disk=False)
    said = memory_bytes([cache.state()])
    cache.fill(TinyVae(), batch_size=2, workers=1, progress=False)
    held = sum(tensor.untyped_storage().nbytes() for tensors in cache._memory.values() for tensor in tensors.values())
    assert said == held == 2 * 4 * 2 * (3 * 8 * 8 + 2 * 12 * 8)  # 2 x 4 channels of 2 bytes
    assert cache.state().bytes_needed == 0


def test_text_in_memory_takes_about_what_was_said(tmp_path: Path) -> None:
    cache = text_cache(make_training_set(tmp_path), on_disk=False)
    texts = cache.state().total
    said = memory_bytes([cache.state()])
    cache.fill(TinyTextEncoder(), batch_size=2, progress=False)
    tokens = sum(len(tensors["mask"]) for tensors in cache._memory.values()) / 3  # the tiny encoder takes a letter for a token
    assert tokens * 4096 <= said <= (tokens + 2 * texts) * 4096


def test_it_needs_no_torch() -> None:
    code = "import sys; from library.dataset.caches.size import free_memory_bytes; assert free_memory_bytes() > 0; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4]).returncode == 0
