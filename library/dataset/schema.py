"""Every key a dataset file may hold: its type, its range, where it may stand, and the flag that stands in for it.

One row per key: a new key is a new row here and a field of SubsetSettings or DatasetSettings of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType

from library.errors import did_you_mean
from library.options import kinds
from library.options.dataset import INTERPOLATIONS as FLAG_INTERPOLATIONS
from library.options.dataset import parse_resolution

GENERAL, DATASETS, SUBSETS = "[general]", "[[datasets]]", "[[datasets.subsets]]"  # the tables, as a user writes them
DATASET_LEVELS = (GENERAL, DATASETS)
ALL_LEVELS = (GENERAL, DATASETS, SUBSETS)

FOLDER, METADATA, MASKED = "image folder", "metadata file", "folder of mask images"  # the styles of a subset
ALL_STYLES = (FOLDER, METADATA, MASKED)

INTERPOLATIONS = (*FLAG_INTERPOLATIONS, "box")  # the flag has no box, as in the reference


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value. ``read`` gives the value as the program uses it, or None where the type is wrong."""

    words: str
    read: Callable[[object], object | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of the table. ``flag``: the command-line option that stands in where the file is silent."""

    name: str
    kind: Kind
    default: object = None
    levels: tuple[str, ...] = ALL_LEVELS
    styles: tuple[str, ...] = ALL_STYLES
    flag: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    above: float | None = None  # a minimum that is not allowed itself
    also_of_dataset: bool = False  # a subset's key whose value the dataset keeps too


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _resolution(value: object) -> tuple[int, int] | None:
    """512, [512, 768], and the flag's texts "512" and "512,768"."""
    try:
        return parse_resolution(str(kinds.RESOLUTION.read(value)))
    except ValueError:
        return None


def _number_range(value: object) -> tuple[float, float] | None:
    """[2.0, 4.0], and the flag's text "2.0,4.0"."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    try:
        low, high = (float(part) if isinstance(value, str) else _number(part) for part in parts)
    except ValueError:
        return None
    return None if low is None or high is None or not 0 < low <= high else (low, high)


WHOLE = Kind("a whole number", _whole)
NUMBER = Kind("a number", _number)
SWITCH = Kind("true or false", lambda value: value if isinstance(value, bool) else None)
TEXT = Kind("a text", lambda value: value if isinstance(value, str) else None)
TABLE = Kind("a table", lambda value: value if isinstance(value, dict) else None)
NUMBER_RANGE = Kind("two numbers above 0, [smallest, largest]", _number_range)
RESOLUTION = Kind("a size in pixels, 1024 or [width, height]", _resolution)

KEYS: tuple[Key, ...] = (
    # the dataset: what its subsets share
    Key(name="resolution", kind=RESOLUTION, levels=DATASET_LEVELS, flag="resolution"),
    Key(name="batch_size", kind=WHOLE, default=1, minimum=1, levels=DATASET_LEVELS, flag="train_batch_size"),
    Key(name="enable_bucket", kind=SWITCH, default=False, levels=DATASET_LEVELS, flag="enable_bucket"),
    Key(name="min_bucket_reso", kind=WHOLE, default=256, minimum=1, levels=DATASET_LEVELS, flag="min_bucket_reso"),
    Key(name="max_bucket_reso", kind=WHOLE, default=1024, minimum=1, levels=DATASET_LEVELS, flag="max_bucket_reso"),
    Key(name="bucket_reso_steps", kind=WHOLE, default=64, minimum=1, levels=DATASET_LEVELS, flag="bucket_reso_steps"),
    Key(name="bucket_no_upscale", kind=SWITCH, default=False, levels=DATASET_LEVELS, flag="bucket_no_upscale"),
    Key(name="network_multiplier", kind=NUMBER, default=1.0, levels=DATASET_LEVELS),
    Key(name="validation_split", kind=NUMBER, default=0.0, minimum=0, maximum=1, levels=DATASET_LEVELS, flag="validation_split"),
    Key(name="validation_seed", kind=WHOLE, levels=DATASET_LEVELS, flag="validation_seed"),
    # the subset: where its images are
    Key(name="image_dir", kind=TEXT, levels=(SUBSETS,)),
    Key(name="metadata_file", kind=TEXT, levels=(SUBSETS,), styles=(METADATA,)),
    Key(name="conditioning_data_dir", kind=TEXT, levels=(SUBSETS,), styles=(MASKED,)),
    Key(name="cache_info", kind=SWITCH, default=False, styles=(FOLDER, MASKED), flag="cache_info"),
    Key(name="is_reg", kind=SWITCH, default=False, levels=(SUBSETS,), styles=(FOLDER,)),
    Key(name="is_validation", kind=SWITCH, default=False, levels=(DATASETS, SUBSETS)),
    Key(name="class_tokens", kind=TEXT, styles=(FOLDER, MASKED)),
    Key(name="caption_extension", kind=TEXT, default=".caption", styles=(FOLDER, MASKED), flag="caption_extension"),
    # the subset: what its images count
    Key(name="loss_weight", kind=NUMBER, default=1.0, above=0),
    Key(name="alpha_mask", kind=SWITCH, default=False, levels=(SUBSETS,), styles=(FOLDER, METADATA), flag="alpha_mask"),
    Key(name="custom_attributes", kind=TABLE, default=MappingProxyType({})),
    # the subset: how its images are shown
    Key(name="num_repeats", kind=WHOLE, default=1, flag="dataset_repeats"),
    Key(name="flip_aug", kind=SWITCH, default=False, flag="flip_aug"),
    Key(name="color_aug", kind=SWITCH, default=False, flag="color_aug"),
    Key(name="random_crop", kind=SWITCH, default=False, styles=(FOLDER, METADATA), flag="random_crop"),
    Key(name="face_crop_aug_range", kind=NUMBER_RANGE, flag="face_crop_aug_range"),
    Key(name="resize_interpolation", kind=TEXT, choices=INTERPOLATIONS, flag="resize_interpolation", also_of_dataset=True),
    # the subset: captions
    Key(name="shuffle_caption", kind=SWITCH, default=False, flag="shuffle_caption"),
    Key(name="caption_separator", kind=TEXT, default=",", flag="caption_separator"),
    Key(name="keep_tokens", kind=WHOLE, default=0, minimum=0, flag="keep_tokens"),
    Key(name="keep_tokens_separator", kind=TEXT, default="", flag="keep_tokens_separator"),
    Key(name="secondary_separator", kind=TEXT, flag="secondary_separator"),
    Key(name="enable_wildcard", kind=SWITCH, default=False, flag="enable_wildcard"),
    Key(name="caption_prefix", kind=TEXT, flag="caption_prefix"),
    Key(name="caption_suffix", kind=TEXT, flag="caption_suffix"),
    Key(name="caption_dropout_rate", kind=NUMBER, default=0.0, minimum=0, maximum=1, flag="caption_dropout_rate"),
    Key(name="caption_dropout_every_n_epochs", kind=WHOLE, default=0, minimum=0, flag="caption_dropout_every_n_epochs"),
    Key(name="caption_tag_dropout_rate", kind=NUMBER, default=0.0, minimum=0, maximum=1, flag="caption_tag_dropout_rate"),
    Key(name="token_warmup_min", kind=WHOLE, default=1, minimum=0, flag="token_warmup_min"),
    Key(name="token_warmup_step", kind=NUMBER, default=0.0, minimum=0, flag="token_warmup_step"),
)


def dataset_keys() -> Iterator[Key]:
    """Keys of DatasetSettings: those that all subsets of a dataset share, and those it keeps besides."""
    return (key for key in KEYS if SUBSETS not in key.levels or key.also_of_dataset)


def subset_keys() -> Iterator[Key]:
    """Keys that each subset has its own value of."""
    return (key for key in KEYS if SUBSETS in key.levels)


def read_value(key: Key, value: object) -> object:
    """The value as the program uses it. Raises ValueError with what was found and what is allowed."""
    read = key.kind.read(value)
    if read is None:
        raise ValueError(f"{key.name} is {_shown(value)}, but must be {key.kind.words}")
    if key.choices and read not in key.choices:
        raise ValueError(f"{key.name} is {_shown(value)}, but must be one of {', '.join(key.choices)}")
    if isinstance(read, (int, float)) and not isinstance(read, bool):
        _check_range(key, read)
    if key.name in ("caption_separator", "caption_extension") and not str(read).strip("."):
        raise ValueError(f"{key.name} is empty: leave it out for {key.default!r}")
    return read


def read_table(table: dict, level: str, place: str, *, also_known: Iterable[str] = ()) -> tuple[dict[str, object], list[str]]:
    """The valid values of one table of the file, and a problem for every key that is unknown, misplaced or of a wrong type.

    ``also_known``: names of the tables inside. A value of null (JSON) counts as not given.
    """
    values: dict[str, object] = {}
    problems: list[str] = []
    inside = tuple(also_known)
    keys = {key.name: key for key in KEYS}
    for name, value in table.items():
        if name in inside or value is None:
            continue
        key = keys.get(name)
        if key is None:
            allowed = [known.name for known in KEYS if level in known.levels]
            problems.append(f"{place}: {name} is not a key{did_you_mean(name, [*allowed, *inside, *keys])}")
        elif level not in key.levels:
            problems.append(f"{place}: {name} belongs in {' or '.join(key.levels)}, not here")
        else:
            try:
                values[name] = read_value(key, value)
            except ValueError as error:
                problems.append(f"{place}: {error}")
    return values, problems


def style_problems(values: dict[str, object], style: str, place: str) -> Iterator[str]:
    """Keys of a subset's own table that its style has no use for."""
    for key in KEYS:
        if key.name in values and style not in key.styles:
            yield f"{place}: {key.name} is for subsets with an {FOLDER} alone; this one has a {METADATA}: take the key out"


def _check_range(key: Key, value: float) -> None:
    too_small = key.minimum is not None and value < key.minimum
    too_large = key.maximum is not None and value > key.maximum
    if key.above is not None and not value > key.above:
        raise ValueError(f"{key.name} is {value:g}, but must be above {key.above:g}")
    if too_small or too_large or value != value:
        allowed = f"at least {key.minimum:g}" if key.maximum is None else f"from {key.minimum:g} to {key.maximum:g}"
        raise ValueError(f"{key.name} is {value:g}, but must be {allowed}")


def _shown(value: object) -> str:
    """A value as the file writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
