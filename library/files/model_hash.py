"""The two hashes by which LoRA metadata names a model file. Needs no torch.

They are those that LoRA browsers compute: the old one looks at 64 KiB only, the new one is the SHA-256 of everything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

OLD_HASH_OFFSET = 0x100000
OLD_HASH_BYTES = 0x10000
OLD_HASH_DIGITS = 8
CHUNK_BYTES = 1 << 20
MISSING = "NOFILE"
UNREADABLE = "IsADirectory"  # also stands for a file that may not be read


def old_hash(path: str | Path) -> str:
    """8 hex digits: SHA-256 of the 64 KiB at 1 MiB (of nothing, where the file ends before). Else "NOFILE" or "IsADirectory"."""
    try:
        with Path(path).open("rb") as file:
            file.seek(OLD_HASH_OFFSET)
            return hashlib.sha256(file.read(OLD_HASH_BYTES)).hexdigest()[:OLD_HASH_DIGITS]
    except OSError as error:
        return _reason(error)


def new_hash(path: str | Path) -> str:
    """64 hex digits: SHA-256 of the whole file, read piece by piece. Else "NOFILE" or "IsADirectory"."""
    try:
        with Path(path).open("rb") as file:
            return _sha256(file)
    except OSError as error:
        return _reason(error)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _reason(error: OSError) -> str:
    return MISSING if isinstance(error, FileNotFoundError) else UNREADABLE
