"""Prints the reference of all options of anima_train_network.py as Markdown, or puts it into docs/anima_train_network.md.

python tools/make_option_table.py            prints it
python tools/make_option_table.py --write    replaces what stands between the two markers of the page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.options.anima import AnimaTrainOptions
from library.options.config_file import ConfigFileOptions
from library.options.reference_table import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "anima_train_network.md"
START = "<!-- start of the options: made by tools/make_option_table.py -->"
END = "<!-- end of the options -->"


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """An option set of its own: the config file's flags are read before all others and belong to no script."""

    config: ConfigFileOptions = field(default_factory=ConfigFileOptions)


def option_table(option_set: type = AnimaTrainOptions) -> str:
    """A heading and a table for each group of options, the config file's first."""
    return f"{markdown(ConfigFile)}\n{markdown(option_set)}"


def with_table(page: str, table: str) -> str:
    """``page`` with ``table`` between its markers. Raises ValueError when the page has not exactly one of each."""
    before, start, rest = page.partition(START)
    old, end, after = rest.partition(END)
    if not start or not end or START in rest or END in after:
        raise ValueError(f"the page needs the lines {START} and {END}, once each and in this order")
    return f"{before}{START}\n\n{table}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the options of anima_train_network.py as Markdown tables.")
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name} instead")
    if parser.parse_args(argv).write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), option_table()), encoding="utf-8", newline="\n")
    else:
        print(option_table())


if __name__ == "__main__":
    main()
