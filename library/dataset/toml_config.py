"""From a dataset file, or from --train_data_dir / --in_json, to settings with every key resolved.

A value is taken from the subset, else its dataset, else [general], else the command line, else the built-in default.
All problems are collected and raised together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.dataset import rules, schema
from library.dataset.buckets import bucket_problems
from library.dataset.dataset_file import find_path, missing_path_problem, read_dataset_file
from library.dataset.folders import layout_problem, named_folders
from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.rules import PlacedDataset, PlacedSubset
from library.errors import DatasetError, did_you_mean
from library.files.user_path import PathProblem
from library.options.kinds import number_range

if TYPE_CHECKING:
    from library.options.dataset import DatasetOptions
    from library.options.train import TrainOptions

Values = dict[str, object]  # key -> value as the program uses it
LIST_IN_JSON = '"{0}" must be a list: write "{0}": [{{...}}]'
PATH_KEYS = {"image_dir": True, "metadata_file": False, "conditioning_data_dir": True}  # name -> whether it names a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the settings come from: a file, or folders named by flags put into the same form."""

    name: str  # for messages: "my.toml" or "--train_data_dir data"
    document: dict
    folder: Path | None = None  # of the file; relative paths may be meant from here
    subset_names: tuple[str, ...] = ()  # for messages, where there is no file to point into
    warnings: tuple[str, ...] = ()

    @property
    def is_json(self) -> bool:
        return self.name.lower().endswith(".json")

    def list_words(self, toml: str, json: str) -> str:
        """How a list of tables is written in this kind of file."""
        return json if self.is_json else toml

    def subset_place(self, dataset_place: str, number: int) -> str:
        return self.subset_names[number - 1] if self.subset_names else f"{dataset_place}, subset {number}"


@dataclass(frozen=True, slots=True)
class Table:
    """The valid values of one table, and its name for messages; None is the command line."""

    values: Values
    place: str | None

    def spot(self, key: schema.Key) -> str:
        """Where the value of a key stands: "my.toml, [general]: flip_aug", or "--flip_aug"."""
        return f"--{key.flag}" if self.place is None else f"{self.place}: {key.name}"


@dataclass(slots=True)
class Reader:
    """Gathers problems while the settings of one source are put together."""

    source: Source
    bucket_step: int
    flags: Table
    general: Table = field(default_factory=lambda: Table({}, ""))
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_datasets(options: TrainOptions, *, bucket_step: int) -> tuple[DatasetSettings, ...]:
    """The datasets of a run; ``bucket_step``: the model needs sides that are multiples of this many pixels.

    Raises DatasetError with everything that is wrong. Warnings are left in DatasetSettings.warnings.
    """
    source = _source(options.dataset)
    flags, problems = _flag_values(options)
    reader = Reader(
        source=source, bucket_step=bucket_step, flags=Table(flags, None), problems=problems, warnings=[*source.warnings]
    )
    reader.general = _read_general(reader)
    tables = enumerate(_dataset_tables(reader), start=1)
    datasets = [dataset for number, table in tables if (dataset := _read_dataset(reader, number, table)) is not None]
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    reader.warnings += [*_idle_keys(reader.general, subsets), *_idle_keys(reader.flags, subsets)]
    complete = not reader.problems
    reader.problems += rules.clashes(datasets, options)
    if complete:
        reader.problems += rules.gaps(datasets, options)
    if reader.problems:
        raise DatasetError(*reader.problems)
    reader.warnings += [*_overridden_flags(reader, datasets), *rules.notices(datasets, options)]
    first, *others = (_without_unused_alpha(dataset.settings) for dataset in datasets)
    return (replace(first, warnings=tuple(reader.warnings)), *others)


def _source(options: DatasetOptions) -> Source:
    if options.dataset_config:
        path = Path(options.dataset_config)
        return Source(name=path.name, document=read_dataset_file(path), folder=path.parent)
    if options.in_json:
        if problem := missing_path_problem(Path(options.in_json), folder=False):
            raise DatasetError(f"--in_json: {problem}")
        subset = {"metadata_file": str(options.in_json)}
        if options.train_data_dir:
            subset["image_dir"] = str(options.train_data_dir)
        if options.conditioning_data_dir:
            subset["conditioning_data_dir"] = str(options.conditioning_data_dir)
        name = f"--in_json {options.in_json}"
        return Source(name=name, document={"datasets": [{"subsets": [subset]}]}, subset_names=(name,))
    if options.train_data_dir:
        return _named_folder_source(options)
    raise DatasetError("no images to train on: give --dataset_config FILE, or --train_data_dir with sub-folders named N_name")


def _named_folder_source(options: DatasetOptions) -> Source:
    subsets, names, problems, warnings = [], [], [], []
    masks = Path(options.conditioning_data_dir) if options.conditioning_data_dir else None
    if masks and (problem := missing_path_problem(masks, folder=True)):
        problems.append(f"--conditioning_data_dir: {problem}")
        masks = None
    for flag, given, is_reg in (
        ("--train_data_dir", options.train_data_dir, False),
        ("--reg_data_dir", options.reg_data_dir, True),
    ):
        if not given:
            continue
        parent = Path(given)
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
            subset = {"image_dir": str(folder.path), "num_repeats": folder.repeats, "class_tokens": folder.class_tokens}
            own = {"is_reg": True} if is_reg else {"conditioning_data_dir": _mask_folder(masks, folder.path)}
            subsets.append({**subset, **own})
            names.append(f"{flag}, folder {folder.path.name}")
    if problems:
        raise DatasetError(*problems)
    document = {"datasets": [{"subsets": subsets}]}
    return Source(name="--train_data_dir", document=document, subset_names=tuple(names), warnings=tuple(warnings))


def _mask_folder(masks: Path | None, images: Path) -> str | None:
    """The masks of one image folder: in the folder of the same name inside ``masks``, or directly in ``masks``."""
    return None if masks is None else str(masks / images.name if (masks / images.name).is_dir() else masks)


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
            values[key.name] = schema.read_value(key, number_range(given) if key.kind is schema.NUMBER_RANGE else given)
        except ValueError as error:
            problems.append(f"--{key.flag}: {error}")
    return values, problems


def _read_general(reader: Reader) -> Table:
    document, name = reader.source.document, reader.source.name
    for key in document:
        if key in ("general", "datasets"):
            continue
        known = next((known for known in schema.KEYS if known.name == key), None)
        if known is not None:
            reader.problems.append(f"{name}: {key} stands outside of the tables: it belongs in {' or '.join(known.levels)}")
        else:
            near = did_you_mean(key, ["general", "datasets"])
            reader.problems.append(f"{name}: {key} is not a table of a dataset file, which has [general] and [[datasets]]{near}")
    general = document.get("general")
    if general is not None and not isinstance(general, dict):
        reader.problems.append(f"{name}: general must be one table, [general]")
        general = None
    return _read_table(reader, general or {}, schema.GENERAL, f"{name}, [general]")


def _dataset_tables(reader: Reader) -> list[object]:
    source = reader.source
    tables = source.document.get("datasets")
    if isinstance(tables, dict):
        words = source.list_words("[datasets] must be written [[datasets]], with two brackets", LIST_IN_JSON.format("datasets"))
        reader.problems.append(f"{source.name}: {words}")
    elif not isinstance(tables, list) or not tables:
        words = source.list_words("there is no [[datasets]] table", 'there is no dataset in the list "datasets"')
        reader.problems.append(f"{source.name}: {words}: at least one is needed")
    else:
        return tables
    return []


def _read_dataset(reader: Reader, number: int, table: object) -> PlacedDataset | None:
    """None where something is missing without which no settings can be made; the reason is in ``reader.problems``."""
    place = reader.source.name if reader.source.subset_names else f"{reader.source.name}, [[datasets]] {number}"
    if not isinstance(table, dict):
        reader.problems.append(f"{place} must be a table")
        return None
    own = _read_table(reader, table, schema.DATASETS, place, also_known=("subsets",))
    subsets = _read_subsets(reader, table.get("subsets"), own)
    values, spots = _resolved(schema.dataset_keys(), own, reader.general, reader.flags)
    resolution_wh = values.pop("resolution")
    if resolution_wh is None:
        given_wrongly = table.get("resolution") is not None or any(": resolution is" in problem for problem in reader.problems)
        if not given_wrongly:
            reader.problems.append(f"{place}: resolution is missing: set it here or in [general], or give --resolution")
        return None
    if values["validation_split"] == 1:
        subsets = [_validating(subset, spots["validation_split"]) for subset in subsets]
    settings = DatasetSettings(
        place=place, resolution_wh=resolution_wh, subsets=tuple(subset.settings for subset in subsets), **values
    )
    reader.problems.extend(bucket_problems(settings, bucket_step=reader.bucket_step))
    return PlacedDataset(settings=settings, spots=spots, subsets=tuple(subsets))


def _validating(subset: PlacedSubset, spot: str) -> PlacedSubset:
    """A subset of a dataset whose images all validate. Regularisation images never do."""
    if subset.settings.is_reg or subset.settings.is_validation:
        return subset
    return PlacedSubset(settings=replace(subset.settings, is_validation=True), spots={**subset.spots, "is_validation": spot})


def _read_subsets(reader: Reader, tables: object, dataset: Table) -> list[PlacedSubset]:
    place = dataset.place or ""
    if isinstance(tables, dict):
        words = "subsets must be written [[datasets.subsets]], with two brackets"
        reader.problems.append(f"{place}: {reader.source.list_words(words, LIST_IN_JSON.format('subsets'))}")
        return []
    if not isinstance(tables, list) or not tables:
        words = reader.source.list_words("no [[datasets.subsets]] table", 'no subset in a list "subsets"')
        reader.problems.append(f"{place} has {words}: at least one is needed")
        return []
    problems_before = len(reader.problems)
    subsets = []
    for number, table in enumerate(tables, start=1):
        subset = _read_subset(reader, table, dataset, reader.source.subset_place(place, number))
        if subset is not None:
            subsets.append(subset)
    reader.warnings += _idle_keys(dataset, subsets)
    reader.problems += _style_differences([subset.settings for subset in subsets])
    kept = list(_kept_subsets(subsets, reader.warnings))
    if not kept and len(reader.problems) == problems_before:
        reader.problems.append(f"{place}: no subset is left: num_repeats must be at least 1")
    return kept


def _read_subset(reader: Reader, table: object, dataset: Table, place: str) -> PlacedSubset | None:
    if not isinstance(table, dict):
        reader.problems.append(f"{place} must be a table")
        return None
    own = _read_table(reader, table, schema.SUBSETS, place)
    style = schema.style_of(table)
    reader.problems.extend(schema.style_problems(own.values, style, place))
    keys = [key for key in schema.subset_keys() if style in key.styles]
    values, spots = _resolved(keys, own, dataset, reader.general, reader.flags)
    source = "metadata_file" if style == schema.METADATA else "image_dir"
    if values[source] is None and table.get(source) is None:
        reader.problems.append(f"{place}: image_dir is missing: the folder of the images")
    if values[source] is None or any(table.get(name) is not None and values.get(name) is None for name in PATH_KEYS):
        return None  # what is wrong with the value has been told
    if not _take_paths(reader, values, place):
        return None
    if not values.get("caption_extension", ".").startswith("."):
        values["caption_extension"] = f".{values['caption_extension']}"
    return PlacedSubset(settings=SubsetSettings(place=place, **values), spots=spots)


def _take_paths(reader: Reader, values: dict[str, Any], place: str) -> bool:
    """Puts found paths in place of the texts that name them; False where one is no path. A subset without repeats is left out,
    whatever it names."""
    problems = []
    for name, is_folder in PATH_KEYS.items():
        if values.get(name) is None:
            continue
        try:
            values[name] = find_path(values[name], reader.source.folder)
            problem = missing_path_problem(values[name], folder=is_folder)
        except PathProblem as error:
            reader.problems.append(f"{place}: {name} {error}")
            return False
        problems += [f"{place}: {name} {problem}"] if problem else []
    if values["num_repeats"] >= 1:
        reader.problems += problems
    return True


def _read_table(reader: Reader, table: dict, level: str, place: str, *, also_known: tuple[str, ...] = ()) -> Table:
    values, problems = schema.read_table(table, level, place, also_known=also_known)
    reader.problems.extend(problems)
    return Table(values, place)


def _resolved(keys: Iterable[schema.Key], *tables: Table) -> tuple[dict[str, Any], dict[str, str]]:
    """Every key's value from the first table that has it, else its default; and where those that are no defaults stand."""
    values: dict[str, Any] = {}
    spots: dict[str, str] = {}
    for key in keys:
        table = next((table for table in tables if key.name in table.values), None)
        values[key.name] = key.default if table is None else table.values[key.name]
        if table is not None:
            spots[key.name] = table.spot(key)
    return values, spots


def _style_differences(subsets: list[SubsetSettings]) -> Iterator[str]:
    """Subsets of one dataset are of one style. Regularisation images need no masks beside images that have them."""
    for name, having in (("metadata_file", subsets), ("conditioning_data_dir", [s for s in subsets if not s.is_reg])):
        with_it = next((subset.place for subset in having if getattr(subset, name) is not None), None)
        without = next((subset.place for subset in having if getattr(subset, name) is None), None)
        if with_it and without:
            yield f"{with_it} has a {name} and {without} has none: put them into [[datasets]] of their own"


def _idle_keys(table: Table, subsets: list[PlacedSubset]) -> Iterator[str]:
    """Keys that stand in for subsets of a style which none of the subsets below has. A flag always has a value."""
    styles = {_style(subset.settings) for subset in subsets}
    for key in schema.subset_keys():
        given = key.name in table.values and (table.place is not None or table.values[key.name] != key.default)
        if styles and given and not styles.intersection(key.styles):
            name = schema.STYLE_KEYS[next(iter(styles))]
            yield f"{table.spot(key)} does nothing: it is not for subsets with a {name}, and there are no others"


def _overridden_flags(reader: Reader, datasets: list[PlacedDataset]) -> Iterator[str]:
    """Flags that nothing falls back to, because the file says something else in every place."""
    idle = []
    for key in schema.KEYS:
        flag = reader.flags.values.get(key.name, key.default)
        holders: list[PlacedDataset | PlacedSubset] = [*datasets, *(subset for dataset in datasets for subset in dataset.subsets)]
        held_by = [holder for holder in holders if key.name in holder.spots]
        falls_back = any(holder.spots[key.name] == reader.flags.spot(key) for holder in held_by)
        if flag != key.default and held_by and not falls_back and any(_value(holder, key.name) != flag for holder in held_by):
            idle.append(f"--{key.flag}")
    if idle:
        verb = "does" if len(idle) == 1 else "do"
        yield f"{', '.join(idle)} {verb} nothing: {reader.source.name} sets its own in every dataset or subset"


def _value(holder: PlacedDataset | PlacedSubset, name: str) -> object:
    return getattr(holder.settings, "resolution_wh" if name == "resolution" else name)


def _style(subset: SubsetSettings) -> str:
    if subset.metadata_file is not None:
        return schema.METADATA
    return schema.FOLDER if subset.conditioning_data_dir is None else schema.MASKED


def _kept_subsets(subsets: list[PlacedSubset], warnings: list[str]) -> Iterator[PlacedSubset]:
    """Without those that are never shown and those whose images another subset of the dataset has: the first one wins."""
    seen: dict[str, str] = {}
    for subset in subsets:
        settings = subset.settings
        source = settings.metadata_file or settings.image_dir
        assert source is not None
        place = os.path.realpath(source)  # Path.resolve raises for links that lead back to themselves, in some versions
        if settings.num_repeats < 1:
            warnings.append(f"{settings.place}: num_repeats is {settings.num_repeats}: the subset is left out")
        elif place in seen:
            warnings.append(f"{settings.place}: {source} is already in {seen[place]}: the subset is left out")
        else:
            seen[place] = settings.place
            yield subset


def _without_unused_alpha(dataset: DatasetSettings) -> DatasetSettings:
    """Where there are mask images, they alone count."""
    subsets = (s if s.conditioning_data_dir is None else replace(s, alpha_mask=False) for s in dataset.subsets)
    return replace(dataset, subsets=tuple(subsets))
