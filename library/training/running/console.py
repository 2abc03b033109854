"""Messages of a run: one handler for the project's loggers, above the progress bar, on the main process only."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import OptionError, os_error_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from library.options.console import ConsoleOptions

LOGGERS = ("library", "networks", "train_network")  # parents of every logger that the project uses
# what diffusers imports, whether it is used or not, and what tells of packages that nothing here needs
SILENCED = ("bitsandbytes.backends.cpu.ops",)
PAGED_ON_CPU = "Paged optimizers are not supported on CPU"  # bitsandbytes: plain ones then, which use as much memory
SHOWN_FROM = 64  # what a progress bar must have to count; less is done before a bar could be seen


class BarFriendlyHandler(logging.Handler):
    """Writes to stdout without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            from tqdm import tqdm

            tqdm.write(self.format(record))
        except Exception:  # as every handler: a line that cannot be shown must not end a run
            self.handleError(record)


def set_up_console(options: ConsoleOptions) -> None:
    """Called by a script's start, once. Processes other than the main one only show errors."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF data; the scan has told what matters
    warnings.filterwarnings("ignore", message=PAGED_ON_CPU)
    for name in SILENCED:
        logging.getLogger(name).setLevel(logging.ERROR)
    show_every_text()
    is_main = os.environ.get("RANK", "0") == "0"
    level = logging.getLevelName(options.console_log_level or "INFO") if is_main else logging.ERROR
    handler: logging.Handler = BarFriendlyHandler()
    if options.console_log_file and is_main:
        try:
            handler = logging.FileHandler(Path(options.console_log_file), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise OptionError(f"--console_log_file {options.console_log_file}: {os_error_text(error)}") from error
    simple = options.console_log_simple
    handler.setFormatter(logging.Formatter("%(message)s" if simple else "%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def show_every_text() -> None:
    """File names can hold what the console's encoding does not have: it shows \\u732b there, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent where the console is no text stream of Python's, as in some notebooks
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar as a callback (done, in all), on the main process only; it appears where there is enough to do, and goes away."""
    is_main = os.environ.get("RANK", "0") == "0"
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and is_main and total >= SHOWN_FROM:
            from tqdm import tqdm

            bar = tqdm(desc=what, unit=unit, total=total, leave=False)
        if bar is not None:
            bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
