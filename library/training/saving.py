"""Writing LoRA files and removing old ones."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import OutputError, os_error_text
from library.files.atomic import TEMPORARY_MARK, sync_folder

if TYPE_CHECKING:
    import torch


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """--save_precision as a dtype; None keeps the dtype of training."""
    import torch

    return {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[save_precision]


def save_network(network: Any, final: Path, *, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
    """``network.save_weights`` into a temporary file that then takes the name ``final``: complete or absent.

    The network module decides on the container by the extension, so the temporary name keeps it.
    """
    temporary = final.with_name(f"{final.stem}{TEMPORARY_MARK}{os.getpid()}{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        network.save_weights(str(temporary), dtype, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        raise OutputError(f"could not write {final}: {os_error_text(error)}") from error
    finally:
        with suppress(OSError):  # where its folder is no folder, the error above says so
            temporary.unlink(missing_ok=True)


def remove_old(*paths: Path) -> None:
    """Removes files or state folders that made way for newer ones; called only after the new ones are in place."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
