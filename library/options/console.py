"""What the console shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleOptions:
    """Console: what a run prints."""

    console_log_level: str | None = opt(None, "least severe messages that are shown (not set = INFO)", choices=LOG_LEVELS)
    console_log_file: str | None = opt(None, "write messages to this file instead of the console", path=True)
    console_log_simple: bool = opt(False, "plain message lines, without time and level")

    def problems(self) -> Iterator[str]:
        return iter(())
