from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from library.files.model_hash import new_hash, old_hash

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(256)) * 4096 + b"A" * 0x10000 + b"B" * 1000)  # 1 MiB, then the 64 KiB that the old hash sees
    return path


def test_hashes_of_a_file(file):
    assert old_hash(file) == hashlib.sha256(b"A" * 0x10000).hexdigest()[:8] == old_hash(str(file))
    assert new_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_short_file(tmp_path):
    (tmp_path / "short").write_bytes(b"x")
    assert old_hash(tmp_path / "short") == "e3b0c442"
    assert new_hash(tmp_path / "short") == hashlib.sha256(b"x").hexdigest()


def test_no_file(tmp_path):
    assert old_hash(tmp_path / "none") == new_hash(tmp_path / "none") == "NOFILE"
    assert old_hash(tmp_path) == new_hash(tmp_path) == "IsADirectory"


def test_needs_no_torch():
    code = "import sys, library.files.model_hash; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
