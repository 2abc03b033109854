"""Every key a dataset file may hold: its type, its range, where it may stand, and the flag that stands in for it.

One row per key: a new key is a new row here and a field of SubsetSettings or DatasetSettings of the same name. The tables of
docs/dataset_config.md are made from these rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from library.errors import did_you_mean
from library.options import kinds
from library.options.dataset import INTERPOLATIONS as FLAG_INTERPOLATIONS
from library.options.dataset import parse_resolution, too_large_problem

GENERAL, DATASETS, SUBSETS = "[general]", "[[datasets]]", "[[datasets.subsets]]"  # the tables, as a user writes them
DATASET_LEVELS = (GENERAL, DATASETS)
ALL_LEVELS = (GENERAL, DATASETS, SUBSETS)

FOLDER, METADATA, MASKED = "image folder", "metadata file", "image folder with mask images"  # the styles of a subset
ALL_STYLES = (FOLDER, METADATA, MASKED)
STYLE_KEYS = {METADATA: "metadata_file", MASKED: "conditioning_data_dir"}  # the key that makes a subset one; the first counts

INTERPOLATIONS = (*FLAG_INTERPOLATIONS, "box")  # the flag has no box, as in the reference
PRESERVATION = "diff_output_preservation"  # the attribute of an image that training knows
SHOWN_LENGTH = 120  # characters of a wrong value that a message repeats


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
    help: str
    example: object  # a value for the documentation
    default: object = None
    levels: tuple[str, ...] = ALL_LEVELS
    styles: tuple[str, ...] = ALL_STYLES
    flag: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    above: float | None = None  # a minimum that is not allowed itself
    also_of_dataset: bool = False  # a subset's key whose value the dataset keeps too
    check: Callable[[Any], str | None] | None = None  # what else is wrong with a value of the right type, and what to do


@dataclass(frozen=True, slots=True)
class Topic:
    """Keys that belong together, under one heading in the documentation."""

    title: str
    keys: tuple[Key, ...]


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """Finite numbers only: TOML has nan and inf, with which nothing can be trained."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def _resolution(value: object) -> tuple[int, int] | None:
    """512, [512, 768], and the flag's texts "512" and "512,768"."""
    try:
        return parse_resolution(str(kinds.RESOLUTION.read(value)))
    except ValueError:
        return None


def _number_range(value: object) -> tuple[float, float] | None:
    """[2.0, 4.0]. The flag's text "2.0,4.0" is for the command line, as in the reference."""
    try:
        return None if isinstance(value, str) else kinds.number_range(value)
    except ValueError:
        return None


def _table(value: object) -> dict[str, object] | None:
    return plain(value) if isinstance(value, dict) and _is_plain(value) else None


def plain(value: Any) -> Any:
    """A copy made of ordinary dictionaries and lists; the TOML reader has classes of its own for some tables."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(_is_plain(inner) for inner in value)
    return isinstance(value, (str, bool)) or _number(value) is not None


def attributes_problem(attributes: dict[str, object]) -> str | None:
    """What is wrong with the attributes that training reads; all others are free."""
    preserved = attributes.get(PRESERVATION, False)
    return None if isinstance(preserved, bool) else f"has {PRESERVATION} = {_shown(preserved)}, but it must be true or false"


def _separator_problem(text: str) -> str | None:
    return None if text else 'is empty: leave it out for ","'


def _folder_problem(text: str) -> str | None:
    return None if text.strip() else "is empty: name a folder, or leave it out"


def _file_problem(text: str) -> str | None:
    return None if text.strip() else "is empty: name a file, or leave it out"


def _extension_problem(text: str) -> str | None:
    return None if text.strip(".") else 'is empty: leave it out for ".caption"'


WHOLE = Kind("a whole number", _whole)
NUMBER = Kind("a number", _number)
SWITCH = Kind("true or false", lambda value: value if isinstance(value, bool) else None)
TEXT = Kind("a text", lambda value: value if isinstance(value, str) else None)
TABLE = Kind("a table of texts, numbers, true or false, lists and tables", _table)
NUMBER_RANGE = Kind("two numbers above 0, [smallest, largest], such as [2.0, 4.0]", _number_range)
RESOLUTION = Kind("a size in pixels, 1024 or [width, height]", _resolution)

SIZES = Topic("Size and batches", (
    Key(name="resolution", kind=RESOLUTION, levels=DATASET_LEVELS, flag="resolution", check=too_large_problem, example=1024,
        help="The training size in pixels: with buckets the *area* that images get, without buckets their exact size. "
        "Must be set somewhere; a side has at most 16384 px."),
    Key(name="batch_size", kind=WHOLE, default=1, minimum=1, levels=DATASET_LEVELS, flag="train_batch_size", example=2,
        help="Images in one batch, per process."),
    Key(name="enable_bucket", kind=SWITCH, default=False, levels=DATASET_LEVELS, flag="enable_bucket", example=True,
        help="Group images by shape instead of cropping all of them to `resolution`."),
    Key(name="min_bucket_reso", kind=WHOLE, default=256, minimum=1, levels=DATASET_LEVELS, flag="min_bucket_reso", example=512,
        help="Shortest side of a bucket, in pixels; rounded down to a multiple of the steps."),
    Key(name="max_bucket_reso", kind=WHOLE, default=1024, minimum=1, levels=DATASET_LEVELS, flag="max_bucket_reso", example=2048,
        help="Longest side of a bucket, in pixels; rounded up to a multiple of the steps."),
    Key(name="bucket_reso_steps", kind=WHOLE, default=64, minimum=1, levels=DATASET_LEVELS, flag="bucket_reso_steps", example=32,
        help="Sides of buckets are multiples of this many pixels, and it must be a multiple of what the model needs: 64 for "
        "Stable Diffusion 1 and 2, 32 for SDXL, 16 for SD 3, Lumina and Anima."),
    Key(name="bucket_no_upscale", kind=SWITCH, default=False, levels=DATASET_LEVELS, flag="bucket_no_upscale", example=True,
        help="Never enlarge an image; its own size makes the bucket. Ignores `min_bucket_reso` and `max_bucket_reso`."),
))  # fmt: skip

VALIDATION = Topic("Validation and strength", (
    Key(name="validation_split", kind=NUMBER, default=0.0, minimum=0, maximum=1, levels=DATASET_LEVELS, flag="validation_split",
        example=0.1,
        help="Share of each subset's images that [validate](validation.md) instead of being trained. 1: all of them do, as with "
        "`is_validation`. Regularisation images never validate."),
    Key(name="validation_seed", kind=WHOLE, levels=DATASET_LEVELS, flag="validation_seed", example=42,
        help="Seed of the choice of these images. Not set: `--seed`, else 0."),
    Key(name="network_multiplier", kind=NUMBER, default=1.0, levels=DATASET_LEVELS, example=0.5,
        help="Strength of the LoRA while images of this dataset are trained, see [below](#strength-of-the-lora)."),
))  # fmt: skip

PLACES = Topic("Where the images are", (
    Key(name="image_dir", kind=TEXT, levels=(SUBSETS,), check=_folder_problem, example="pictures/cat",
        help="The folder of the images; with `metadata_file`, what relative image names start from (and may be left out)."),
    Key(name="metadata_file", kind=TEXT, levels=(SUBSETS,), styles=(METADATA,), check=_file_problem, example="cat.jsonl",
        help="A `.json` or `.jsonl` file with names and captions, see [below](#a-metadata-file)."),
    Key(name="conditioning_data_dir", kind=TEXT, levels=(SUBSETS,), styles=(METADATA, MASKED), check=_folder_problem,
        example="masks/cat",
        help="The folder of [mask images](masked_loss.md), each with the base name of its image. Needs `--masked_loss`."),
    Key(name="caption_extension", kind=TEXT, default=".caption", styles=(FOLDER, MASKED), flag="caption_extension",
        check=_extension_problem, example=".txt", help="Ending of caption files; the dot may be left out."),
    Key(name="class_tokens", kind=TEXT, styles=(FOLDER, MASKED), example="a cat",
        help="The caption of images that have no caption file."),
    Key(name="cache_info", kind=SWITCH, default=False, styles=(FOLDER, MASKED), flag="cache_info", example=True,
        help="Keep names, sizes and captions of the images in `metadata_cache.json` in their folder, and read them from there. "
        "Delete that file after changing images or captions."),
))  # fmt: skip

WEIGHTS = Topic("What the images count", (
    Key(name="num_repeats", kind=WHOLE, default=1, flag="dataset_repeats", example=10,
        help="How often one epoch shows each image; 0 leaves the subset out, with a warning."),
    Key(name="is_reg", kind=SWITCH, default=False, levels=(SUBSETS,), styles=(FOLDER,), example=True,
        help="These are [regularisation images](#regularisation-images-and-weights)."),
    Key(name="is_validation", kind=SWITCH, default=False, levels=(DATASETS, SUBSETS), example=True,
        help="These images are never trained: the loss on them is what [validation](validation.md) reports."),
    Key(name="loss_weight", kind=NUMBER, default=1.0, above=0, example=0.5,
        help="What the loss of these images is multiplied by."),
    Key(name="alpha_mask", kind=SWITCH, default=False, levels=(SUBSETS,), flag="alpha_mask", example=True,
        help="The alpha channel is the [loss mask](masked_loss.md): transparent places do not count. Not used where there are "
        "mask images."),
    Key(name="custom_attributes", kind=TABLE, default=MappingProxyType({}), check=attributes_problem,
        example={PRESERVATION: True}, help="[Attributes](#attributes) of each image."),
))  # fmt: skip

SHOWINGS = Topic("How images are shown", (
    Key(name="flip_aug", kind=SWITCH, default=False, flag="flip_aug", example=True,
        help="Mirror each showing left to right with a chance of one half."),
    Key(name="color_aug", kind=SWITCH, default=False, flag="color_aug", example=True,
        help="Change hue or brightness a little in one showing of three. Not with cached latents."),
    Key(name="random_crop", kind=SWITCH, default=False, flag="random_crop", example=True,
        help="Crop at a random place instead of the centre. Not with cached latents."),
    Key(name="face_crop_aug_range", kind=NUMBER_RANGE, flag="face_crop_aug_range", example=[2.0, 4.0],
        help="Crop around the face that the file's name tells, so that the crop is this many times as large as the face; see "
        "[below](#chance-in-images). Needs buckets off, and not with cached latents."),
    Key(name="resize_interpolation", kind=TEXT, choices=INTERPOLATIONS, flag="resize_interpolation", also_of_dataset=True,
        example="lanczos", help="Filter for resizing. Not set: `area` where neither side grows, else `lanczos`."),
))  # fmt: skip

CAPTIONS = Topic("Captions", (
    Key(name="shuffle_caption", kind=SWITCH, default=False, flag="shuffle_caption", example=True,
        help="A new order of the tags in each showing."),
    Key(name="caption_separator", kind=TEXT, default=",", flag="caption_separator", check=_separator_problem, example=";",
        help="What separates tags. Not empty."),
    Key(name="keep_tokens", kind=WHOLE, default=0, minimum=0, flag="keep_tokens", example=1,
        help="So many leading tags are fixed: neither shuffled, dropped nor held back."),
    Key(name="keep_tokens_separator", kind=TEXT, default="", flag="keep_tokens_separator", example="|||",
        help="A marker inside captions: tags before it are fixed, and so are those after a second one. Wins over `keep_tokens` "
        "in captions that have it."),
    Key(name="secondary_separator", kind=TEXT, flag="secondary_separator", example=";;;",
        help="Separates tags that must stay together; becomes `caption_separator` at last."),
    Key(name="enable_wildcard", kind=SWITCH, default=False, flag="enable_wildcard", example=True,
        help="Pick one of `{a|b|c}`, and one line of a caption with several."),
    Key(name="caption_prefix", kind=TEXT, flag="caption_prefix", example="mychar,",
        help="Put before every caption, with a space between."),
    Key(name="caption_suffix", kind=TEXT, flag="caption_suffix", example=", best quality",
        help="Put after every caption, with a space between."),
    Key(name="caption_dropout_rate", kind=NUMBER, default=0.0, minimum=0, maximum=1, flag="caption_dropout_rate", example=0.05,
        help="Share of showings that train with an empty caption."),
    Key(name="caption_dropout_every_n_epochs", kind=WHOLE, default=0, minimum=0, flag="caption_dropout_every_n_epochs", example=5,
        help="Every N-th epoch (N, 2N, ...) trains with empty captions. 0 = never."),
    Key(name="caption_tag_dropout_rate", kind=NUMBER, default=0.0, minimum=0, maximum=1, flag="caption_tag_dropout_rate",
        example=0.1, help="Chance of each tag that is not fixed to be left out of a showing."),
    Key(name="token_warmup_min", kind=WHOLE, default=1, minimum=0, flag="token_warmup_min", example=3,
        help="How many tags that are not fixed the first step uses, with `token_warmup_step`."),
    Key(name="token_warmup_step", kind=NUMBER, default=0.0, minimum=0, flag="token_warmup_step", example=0.5,
        help="The step from which on all tags are used; until then their number grows. Below 1 it is a share of the run. "
        "0 = all from the start. Not with cached text."),
))  # fmt: skip

DATASET_TOPICS = (SIZES, VALIDATION)
SUBSET_TOPICS = (PLACES, WEIGHTS, SHOWINGS, CAPTIONS)
KEYS: tuple[Key, ...] = tuple(key for topic in (*DATASET_TOPICS, *SUBSET_TOPICS) for key in topic.keys)


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
    if isinstance(read, (int, float)) and not _is_in_range(key, read):
        raise ValueError(f"{key.name} is {_shown(value)}, but must be {range_words(key)}")
    if key.check and (problem := key.check(read)):
        raise ValueError(f"{key.name} {problem}")
    return read


def range_words(key: Key) -> str:
    """Which numbers are allowed: "at least 1", "from 0 to 1", "above 0"; empty where all are."""
    if key.above is not None:
        return f"above {key.above:g}"
    if key.minimum is None:
        return ""
    return f"at least {key.minimum:g}" if key.maximum is None else f"from {key.minimum:g} to {key.maximum:g}"


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


def style_of(table: dict) -> str:
    """The style of a subset, by the keys in its own table."""
    return next((style for style, name in STYLE_KEYS.items() if table.get(name) is not None), FOLDER)


def style_problems(values: dict[str, object], style: str, place: str) -> Iterator[str]:
    """Keys of a subset's own table that its style has no use for."""
    for key in KEYS:
        if key.name in values and style not in key.styles:
            yield f"{place}: {key.name} does nothing in a subset with a {STYLE_KEYS[style]}: take one of the two out"


def _is_in_range(key: Key, value: float) -> bool:
    too_small = key.minimum is not None and value < key.minimum or key.above is not None and value <= key.above
    return not too_small and not (key.maximum is not None and value > key.maximum)


def _shown(value: object) -> str:
    """A value about as the file writes it, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (bool, str, dict, list)) else str(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]} ..."
