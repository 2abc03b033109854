"""Text files as users save them: UTF-8, with or without a byte-order mark."""

from __future__ import annotations

from pathlib import Path

from library.errors import UserError

LONGEST_QUOTE = 120  # characters
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_utf8(path: Path, *, error: type[UserError], flag: str = "") -> str:
    """All of the file's text; line ends stay as they are.

    Raises ``error`` where the file cannot be read or is not UTF-8. ``flag``: what named the file, to begin the message with.
    """
    name = f"{flag} {path}" if flag else str(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        guess = " (it looks like UTF-16)" if wrong.object.startswith(UTF16_MARKS) else ""
        raise error(f"{name}: byte {wrong.start} is not UTF-8{guess}: save the file as UTF-8") from wrong
    except OSError as wrong:
        raise error(f"{name} cannot be read: {wrong.strerror}") from wrong


def line_of(text: str, number: int) -> str:
    """The line of that number, from 1, without blanks around it; empty where there is none."""
    lines = text.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def quoted_line(line: str) -> str:
    """What ends a message about a line: the line itself, cut to what one reads at a glance."""
    cut = line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}..."
    return f"; the line is: {cut}" if cut else ""
