"""Makes the tables in docs/ that must not drift from the code: all options of the scripts, and all keys of a dataset file.

python tools/make_reference_tables.py            prints them
python tools/make_reference_tables.py --write    replaces what stands between the two markers of each page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.dataset import schema
from library.options.anima import AnimaTrainOptions
from library.options.anima_inference import AnimaInferenceOptions
from library.options.config_file import ConfigFileOptions
from library.options.lumina import LuminaTrainOptions
from library.options.lumina_inference import LuminaInferenceOptions
from library.options.reference_table import markdown
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.options.sd3_inference import Sd3InferenceOptions
from library.options.sd_inference import SdxlInferenceOptions

DOCS = Path(__file__).resolve().parents[1] / "docs"
START = "<!-- start of the tables: made by tools/make_reference_tables.py -->"
END = "<!-- end of the tables -->"
LEVEL_LETTERS = {schema.GENERAL: "G", schema.DATASETS: "D", schema.SUBSETS: "S"}
HEADER = ("| Key | Type | Default | Where | Flag | Meaning |", "|---|---|---|---|---|---|")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """An option set of its own: the config file's flags are read before all others and belong to no script."""

    config: ConfigFileOptions = field(default_factory=ConfigFileOptions)


def option_tables(option_set: type) -> str:
    """A heading and a table for each group of options, the config file's first."""
    return f"{markdown(ConfigFile)}\n{markdown(option_set)}"


def script_tables(scripts: Mapping[str, type]) -> str:
    """``option_tables`` of several scripts on one page."""
    return "\n".join(f"## All options of {name}\n\n{option_tables(options)}" for name, options in scripts.items())


def key_tables() -> str:
    """A section for each kind of table in a dataset file. A key is described at the innermost level that it belongs to."""
    lines = [
        f"### Keys of `{schema.GENERAL}`", "",
        f"Every key that a `{schema.DATASETS}` table may hold, except `is_validation`: each is for all datasets of the file.", "",
        *_name_table(schema.GENERAL),
        "", f"### Keys of `{schema.DATASETS}`", "",
        "What the subsets of a dataset share, and what they all have unless they say otherwise themselves.", "",
        *_name_table(schema.DATASETS),
        *(line for topic in schema.DATASET_TOPICS for line in _topic_table(topic)),
        "", f"### Keys of `{schema.SUBSETS}`",
        *(line for topic in schema.SUBSET_TOPICS for line in _topic_table(topic)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


FLOW_SCRIPTS = {"sd3_minimal_inference.py": Sd3InferenceOptions, "lumina_minimal_inference.py": LuminaInferenceOptions}
TABLES: Mapping[str, Callable[[], str]] = {
    "train_network.md": partial(option_tables, StableDiffusionTrainOptions),
    "sdxl_train_network.md": partial(option_tables, SdxlTrainOptions),
    "sd3_train_network.md": partial(option_tables, Sd3TrainOptions),
    "lumina_train_network.md": partial(option_tables, LuminaTrainOptions),
    "anima_train_network.md": partial(option_tables, AnimaTrainOptions),
    "making_pictures.md": partial(option_tables, AnimaInferenceOptions),
    "making_pictures_sd.md": partial(option_tables, SdxlInferenceOptions),
    "making_pictures_flow.md": partial(script_tables, FLOW_SCRIPTS),
    "dataset_config.md": key_tables,
}


def with_tables(page: str, tables: str) -> str:
    """``page`` with ``tables`` between its markers. Raises ValueError when the page has not exactly one of each."""
    before, start, rest = page.partition(START)
    old, end, after = rest.partition(END)
    if not start or not end or START in rest or END in after:
        raise ValueError(f"the page needs the lines {START} and {END}, once each and in this order")
    return f"{before}{START}\n\n{tables}\n{END}{after}"


def key_row(key: schema.Key) -> list[str]:
    """The cells of one key, as HEADER names them."""
    where = " ".join(LEVEL_LETTERS[level] for level in key.levels)
    flag = f"`--{key.flag}`" if key.flag else "none"
    return [f"`{key.name}`", _type_words(key), _default_words(key.default), where, flag, _meaning(key)]


def _name_table(level: str) -> Iterator[str]:
    """The keys of one level by name, in a table with a row for each topic."""
    yield from ("| About | Keys |", "|---|---|")
    for topic in (*schema.DATASET_TOPICS, *schema.SUBSET_TOPICS):
        names = [f"`{key.name}`" for key in topic.keys if level in key.levels]
        yield _line([topic.title, ", ".join(names)])


def _topic_table(topic: schema.Topic) -> Iterator[str]:
    yield from ("", f"#### {topic.title}", "", *HEADER)
    yield from (_line(key_row(key)) for key in topic.keys)


def _type_words(key: schema.Key) -> str:
    if key.choices:
        return f"one of {', '.join(f'`{_toml(choice)}`' for choice in key.choices)}"
    limits = schema.range_words(key)
    return f"{key.kind.words}, {limits}" if limits else key.kind.words


def _default_words(default: object) -> str:
    if default is None:
        return "not set"
    return f"`{_toml(default)}`" if isinstance(default, (str, Mapping)) else _toml(default)


def _meaning(key: schema.Key) -> str:
    """The help, which subsets the key is not for, and an example."""
    excluded = [f"`{name}`" for style, name in schema.STYLE_KEYS.items() if style not in key.styles]
    if key.name in schema.STYLE_KEYS.values():
        excluded = []  # what makes a style is not for the others, of course
    limits = f" Not in subsets with {' or '.join(excluded)}." if excluded else ""
    return f"{key.help}{limits} Example: `{key.name} = {_toml(key.example)}`"


def _toml(value: object) -> str:
    """A value as a TOML file writes it, on one line."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, float) and value == int(value):
        return f"{value:.1f}"
    return json.dumps(value)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the reference tables of docs/ as Markdown.")
    parser.add_argument("--write", action="store_true", help="put them into their pages instead")
    write = parser.parse_args(argv).write
    for name, tables in TABLES.items():
        if write:
            page = DOCS / name
            page.write_text(with_tables(page.read_text(encoding="utf-8"), tables()), encoding="utf-8", newline="\n")
        else:
            print(tables())


if __name__ == "__main__":
    main()
