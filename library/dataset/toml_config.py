"""From a dataset file, or from --train_data_dir / --in_json, to settings with every key resolved.

A value is taken from the subset, else its dataset, else [general], else the command line, else the built-in default.
All problems are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.dataset import schema
from library.dataset.buckets import bucket_problems
from library.dataset.dataset_file import find_path, missing_path_problem, read_dataset_file
from library.dataset.folders import layout_problem, named_folders
from library.dataset.items import DatasetSettings, SubsetSettings
from library.errors import DatasetError

if TYPE_CHECKING:
    from library.options.dataset import DatasetOptions
    from library.options.train import TrainOptions

Values = dict[str, object]  # key -> value as the program uses it


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the settings come from: a file, or folders named by flags put into the same form."""

    name: str  # for messages: "my.toml" or "--train_data_dir data"
    document: dict
    folder: Path | None = None  # of the file; relative paths may be meant from here
    subset_names: tuple[str, ...] = ()  # for messages, where there is no file to point into
    warnings: tuple[str, ...] = ()

    def subset_place(self, dataset_place: str, number: int) -> str:
        return self.subset_names[number - 1] if self.subset_names else f"{dataset_place}, subset {number}"


@dataclass(slots=True)
class Reader:
    """Gathers problems while the settings of one source are put together."""

    source: Source
    bucket_step: int
    flags: Values  # by key
    general: Values = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_datasets(options: TrainOptions, *, bucket_step: int) -> tuple[DatasetSettings, ...]:
    """The datasets of a run; ``bucket_step``: the model needs sides that are multiples of this many pixels.

    Raises DatasetError with everything that is wrong. Warnings are left in DatasetSettings.warnings.
    """
    source = _source(options.dataset)
    flags, problems = _flag_values(options)
    reader = Reader(source=source, bucket_step=bucket_step, flags=flags, problems=problems)
    reader.general = _read_general(reader)
    datasets = [_read_dataset(reader, number, table) for number, table in enumerate(_dataset_tables(reader), start=1)]
    if reader.problems:
        raise DatasetError(*reader.problems)
    read = [dataset for dataset in datasets if dataset is not None]
    return (replace(read[0], warnings=(*source.warnings, *read[0].warnings)), *read[1:])


def _source(options: DatasetOptions) -> Source:
    if options.dataset_config:
        path = Path(options.dataset_config)
        return Source(name=path.name, document=read_dataset_file(path), folder=path.parent)
    if options.in_json:
        subset = {"metadata_file": str(options.in_json)}
        if options.train_data_dir:
            subset["image_dir"] = str(options.train_data_dir)
        name = f"--in_json {options.in_json}"
        return Source(name=name, document={"datasets": [{"subsets": [subset]}]}, subset_names=(name,))
    if options.train_data_dir:
        return _named_folder_source(options)
    raise DatasetError("no images to train on: give --dataset_config FILE, or --train_data_dir with sub-folders named N_name")


def _named_folder_source(options: DatasetOptions) -> Source:
    subsets, names, problems, warnings = [], [], [], []
    for flag, given, is_reg in (
        ("--train_data_dir", options.train_data_dir, False),
        ("--reg_data_dir", options.reg_data_dir, True),
    ):
        if not given:
            continue
        parent = Path(given).expanduser()
        problem = missing_path_problem(parent, folder=True)
        if problem:
            problems.append(f"{flag}: {problem}")
            continue
        folders, ignored = named_folders(parent)
        if not folders:
            problems.append(layout_problem(flag, parent, ignored))
        elif ignored:
            warnings.append(f"{flag} {parent}: sub-folders not named N_name are left out: {', '.join(ignored)}")
        for folder in folders:
            subsets.append({"image_dir": str(folder.path), "num_repeats": folder.repeats, "class_tokens": folder.class_tokens,
                            "is_reg": is_reg})  # fmt: skip
            names.append(f"{flag}, folder {folder.path.name}")
    if problems:
        raise DatasetError(*problems)
    document = {"datasets": [{"subsets": subsets}]}
    return Source(name="--train_data_dir", document=document, subset_names=tuple(names), warnings=tuple(warnings))


def _flag_values(options: TrainOptions) -> tuple[Values, list[str]]:
    values, problems = {}, []
    groups = (options.dataset, options.captions, options.validation)
    for key in schema.KEYS:
        if key.flag is None:
            continue
        given = next(getattr(group, key.flag) for group in groups if hasattr(group, key.flag))
        if key.name == "caption_extension":
            given = options.captions.caption_extention or given  # the reference's misspelt flag wins there too
        if given is None:
            continue
        try:
            values[key.name] = schema.read_value(key, given)
        except ValueError as error:
            problems.append(f"--{key.flag}: {error}")
    return values, problems


def _read_general(reader: Reader) -> Values:
    document, name = reader.source.document, reader.source.name
    for key in document:
        if key in ("general", "datasets"):
            continue
        known = next((known for known in schema.KEYS if known.name == key), None)
        if known is not None:
            reader.problems.append(f"{name}: {key} stands outside of the tables: it belongs in {' or '.join(known.levels)}")
        else:
            near = schema.did_you_mean(key, ["general", "datasets"])
            reader.problems.append(f"{name}: {key} is not a table of a dataset file, which has [general] and [[datasets]]{near}")
    general = document.get("general")
    if general is None:
        return {}
    if not isinstance(general, dict):
        reader.problems.append(f"{name}: general must be one table, [general]")
        return {}
    return _read_table(reader, general, schema.GENERAL, f"{name}, [general]")


def _dataset_tables(reader: Reader) -> list[object]:
    tables = reader.source.document.get("datasets")
    if isinstance(tables, dict):
        reader.problems.append(f"{reader.source.name}: [datasets] must be written [[datasets]], with two brackets")
    elif not isinstance(tables, list) or not tables:
        reader.problems.append(f"{reader.source.name}: there is no [[datasets]] table: at least one is needed")
    else:
        return tables
    return []


def _read_dataset(reader: Reader, number: int, table: object) -> DatasetSettings | None:
    """None where something is missing without which no settings can be made; the reason is in ``reader.problems``."""
    place = reader.source.name if reader.source.subset_names else f"{reader.source.name}, [[datasets]] {number}"
    if not isinstance(table, dict):
        reader.problems.append(f"{place} must be a table")
        return None
    own = _read_table(reader, table, schema.DATASETS, place, also_known=("subsets",))
    warnings: list[str] = []
    subsets = _read_subsets(reader, table.get("subsets"), own, place, warnings)
    values = _resolved(schema.dataset_keys(), own, reader.general, reader.flags)
    resolution_wh = values.pop("resolution")
    if resolution_wh is None:
        given_wrongly = "resolution" in table or any(": resolution is" in problem for problem in reader.problems)
        if not given_wrongly:
            reader.problems.append(f"{place}: resolution is missing: set it here or in [general], or give --resolution")
        return None
    settings = DatasetSettings(
        place=place, resolution_wh=resolution_wh, subsets=tuple(subsets), warnings=tuple(warnings), **values
    )
    reader.problems.extend(bucket_problems(settings, bucket_step=reader.bucket_step))
    return settings


def _read_subsets(
    reader: Reader, tables: object, dataset: Values, dataset_place: str, warnings: list[str]
) -> list[SubsetSettings]:
    if isinstance(tables, dict):
        reader.problems.append(f"{dataset_place}: subsets must be written [[datasets.subsets]], with two brackets")
        return []
    if not isinstance(tables, list) or not tables:
        reader.problems.append(f"{dataset_place} has no [[datasets.subsets]] table: at least one is needed")
        return []
    problems_before = len(reader.problems)
    subsets = []
    for number, table in enumerate(tables, start=1):
        subset = _read_subset(reader, table, dataset, reader.source.subset_place(dataset_place, number))
        if subset is not None:
            subsets.append(subset)
    if len({subset.metadata_file is None for subset in subsets}) > 1:
        reader.problems.append(
            f"{dataset_place}: some subsets have a metadata_file and others have not: put them into [[datasets]] of their own"
        )
    kept = list(_kept_subsets(subsets, warnings))
    if not kept and len(reader.problems) == problems_before:
        reader.problems.append(f"{dataset_place}: no subset is left: num_repeats must be at least 1")
    return kept


def _read_subset(reader: Reader, table: object, dataset: Values, place: str) -> SubsetSettings | None:
    if not isinstance(table, dict):
        reader.problems.append(f"{place} must be a table")
        return None
    own = _read_table(reader, table, schema.SUBSETS, place)
    style = schema.METADATA if "metadata_file" in own else schema.FOLDER
    reader.problems.extend(schema.style_problems(own, style, place))
    values = _resolved(schema.subset_keys(), own, dataset, reader.general, reader.flags)
    if values["image_dir"] is None and style == schema.FOLDER:
        if "image_dir" not in table:
            reader.problems.append(f"{place}: image_dir is missing: the folder of the images")
        return None
    values["image_dir"] = _path(reader, values["image_dir"])
    values["metadata_file"] = _path(reader, values["metadata_file"])
    values["conditioning_data_dir"] = _path(reader, values["conditioning_data_dir"])
    if values["num_repeats"] >= 1:  # otherwise it is left out, whatever it names
        reader.problems.extend(_path_problems(values, place))
    extension = str(values["caption_extension"])
    values["caption_extension"] = extension if extension.startswith(".") else f".{extension}"
    return SubsetSettings(place=place, **values)


def _read_table(reader: Reader, table: dict, level: str, place: str, *, also_known: tuple[str, ...] = ()) -> Values:
    values, problems = schema.read_table(table, level, place, also_known=also_known)
    reader.problems.extend(problems)
    return values


def _resolved(keys: Iterator[schema.Key], *tables: Values) -> dict[str, Any]:
    """Every key's value from the first table that has it, else its default."""
    return {key.name: next((table[key.name] for table in tables if key.name in table), key.default) for key in keys}


def _path(reader: Reader, text: str | None) -> Path | None:
    return None if text is None else find_path(text, reader.source.folder)


def _path_problems(values: dict[str, Any], place: str) -> Iterator[str]:
    for name in ("image_dir", "metadata_file"):
        problem = values[name] and missing_path_problem(values[name], folder=name == "image_dir")
        if problem:
            yield f"{place}: {name} {problem}"


def _kept_subsets(subsets: list[SubsetSettings], warnings: list[str]) -> Iterator[SubsetSettings]:
    """Without those that are never shown and those whose images another subset of the dataset has: the first one wins."""
    seen: dict[Path, str] = {}
    for subset in subsets:
        source = subset.metadata_file or subset.image_dir
        assert source is not None
        if subset.num_repeats < 1:
            warnings.append(f"{subset.place}: num_repeats is {subset.num_repeats}: the subset is left out")
        elif source.resolve() in seen:
            warnings.append(f"{subset.place}: {source} is already in {seen[source.resolve()]}: the subset is left out")
        else:
            seen[source.resolve()] = subset.place
            yield subset
