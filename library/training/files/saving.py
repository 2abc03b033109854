"""Writing LoRA files and removing old ones."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import OptionError, OutputError, os_error_text
from library.files.atomic import file_written_atomically

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """--save_precision as a dtype; None keeps the dtype of training."""
    import torch

    return {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[save_precision]


def save_network(
    network: Any, final: Path, *, dtype: torch.dtype | None, metadata: dict[str, str], layout: str | None = None
) -> None:
    """``network.save_weights`` into a temporary file that then takes the name ``final``: complete or absent.

    The network module decides on the container by the extension, so the temporary name keeps it. ``layout``: that of
    --save_format, which check_save_format() has asked about. Raises OutputError, with the name ``final``.
    """
    try:
        with file_written_atomically(final, keep_ending=True) as temporary:
            if layout is None:
                network.save_weights(str(temporary), dtype, metadata)
            else:
                network.save_weights_as(layout, str(temporary), dtype, metadata)
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise OutputError(f"could not write {final}: {reason}") from error


def _reason(error: Exception) -> str | None:
    """Why a file could not be written; None for an error of another kind."""
    if isinstance(error, OutputError) and isinstance(error.__cause__, OSError):
        return os_error_text(error.__cause__)
    text = str(error)
    if type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in text:  # of network modules that write by them
        return text.splitlines()[0]
    return None


def other_places(file: Path) -> Iterator[Path]:
    """Where else ``file`` may be written: the system's temporary folder, and the current one. Names that are free."""
    for find_folder in (tempfile.gettempdir, os.getcwd):
        with suppress(OSError):
            folder = Path(find_folder())
            if folder.resolve() != file.parent.resolve():
                yield _free_name(folder / file.name)


def _free_name(file: Path) -> Path:
    numbered = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(2))
    return next(path for path in itertools.chain([file], numbered) if not path.exists())


def check_save_format(network: Any, save_format: str | None) -> None:
    """Raises OptionError where the network, which is applied, cannot be written as --save_format asks."""
    if save_format is None:
        return
    if not hasattr(network, "save_weights_as"):
        raise OptionError(f"--save_format={save_format}: this network module writes its files in its own way; drop --save_format")
    if problems := network.layout_problems(save_format):
        raise OptionError(*(f"--save_format={save_format} cannot hold this network: {problem}" for problem in problems))
    if note := network.layout_note(save_format):
        logger.info("--save_format=%s: %s", save_format, note)


def remove_old(*paths: Path) -> None:
    """Removes files or state folders that made way for newer ones; called only after the new ones are in place.

    What cannot be removed stays, with a warning: another program may hold it open, and a run must not end on it.
    """
    for path in paths:
        try:
            _remove(path)
        except OSError as error:
            logger.warning("could not remove %s (%s): remove it by hand if it is not needed", path, error.strerror or error)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
