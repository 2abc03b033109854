"""Writing files that a user could lose: a temporary name in the same folder, flushed to disk, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from library.errors import OutputError, os_error_text

TEMPORARY_MARK = ".tmp-"  # temporary names are NAME.tmp-PID-RANDOM: readers never match them, a later run may delete them
REPLACED_MARK = ".replaced"  # the old folder while a new one takes its name
RENAME_WAITS_S = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8) if os.name == "nt" else ()  # elsewhere an open file can be replaced


def temporary_name(final: Path, *, ending: str = "") -> Path:
    """One of its own for each call: two threads, or processes of equal numbers on two machines, may write one file at once."""
    mark = f"{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(2)}"
    return final.with_name(f"{final.name.removesuffix(ending)}{mark}{ending}")


@contextmanager
def file_written_atomically(final: Path, *, keep_ending: bool = False) -> Iterator[Path]:
    """Gives a temporary path in the same folder to write; on success it takes the name ``final``, on failure it is removed.

    ``keep_ending``: for writers that decide by the file's ending. Raises OutputError naming the file when the disk is full or
    the folder cannot be written.
    """
    temporary = temporary_name(final, ending=final.suffix if keep_ending else "")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        rename(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        raise OutputError(f"could not write {final}: {os_error_text(error)}") from error
    finally:
        with suppress(OSError):  # where its folder is no folder, the error above says so
            temporary.unlink(missing_ok=True)


def write_atomically(final: Path, write: Callable[[BinaryIO], object]) -> None:
    """Makes ``final`` hold what ``write`` writes, or leaves it as it was. Raises OutputError as above."""
    with file_written_atomically(final) as temporary, temporary.open("wb") as file:
        write(file)


def write_text_atomically(final: Path, text: str) -> None:
    write_atomically(final, lambda file: file.write(text.encode("utf-8")))


@contextmanager
def folder_written_atomically(final: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it takes the place of ``final``, on failure it is removed.

    A complete folder exists under ``final`` or under ``final`` + ``.replaced`` at every moment.
    """
    temporary = temporary_name(final)
    replaced = final.with_name(final.name + REPLACED_MARK)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        _take_place(temporary, final, replaced)
        sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"could not write {final}: {os_error_text(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, final: Path, replaced: Path) -> None:
    """A failure leaves what was under ``final`` there, and where nothing was, what an interrupted run left as ``replaced``."""
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        rename(final, replaced)
    try:
        rename(temporary, final)
    except OSError:
        with suppress(OSError):
            rename(replaced, final)
        raise


def rename(source: Path, final: Path) -> None:
    """Gives ``source`` the name ``final``. On Windows a virus scanner or a user interface may hold a file for a moment: waits."""
    for wait_s in RENAME_WAITS_S:
        try:
            source.replace(final)
            return
        except PermissionError:
            time.sleep(wait_s)
    source.replace(final)


def sync_tree(folder: Path) -> None:
    """Flushes every file directly inside ``folder``, and the folder, to disk."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names to disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
