"""The documents say what the program does: flags, keys, defaults, examples, links and file names are compared with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from library.dataset import schema
from library.dataset.buckets import Buckets
from library.dataset.dataset_file import read_dataset_file
from library.dataset.items import DatasetSettings
from library.dataset.toml_config import read_datasets
from library.options.anima import AnimaTrainOptions
from library.options.anima_inference import AnimaInferenceOptions
from library.options.cache_tool import CacheToolOptions
from library.options.command_line import read_options
from library.options.config_file import ConfigFileOptions, read_config
from library.options.dataset import DatasetOptions
from library.options.declare import groups_of, options_of
from library.options.lumina import LuminaTrainOptions
from library.options.scripts import OPTION_SETS, option_set_of
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.options.sd_inference import SdInferenceOptions, SdxlInferenceOptions
from library.options.train import TrainOptions
from library.sampling.prompts import FLAGS, read_prompts
from tools.make_reference_tables import END, FLOW_SCRIPTS, START, TABLES, key_row, with_tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.toml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:(?:library|networks|tests|tools|configs|docs)/[\w./<>*-]*|[\w<>]+\.py|\.ci/run)")
FOREIGN_FLAGS = {"slow", "logdir"}  # of pytest here (tests/conftest.py), and of tensorboard


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def fences(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def code_of(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    yield from (body for _, body in FENCE.findall(text))
    yield from INLINE.findall(FENCE.sub("", text))


@cache
def script_options():
    """Name -> option of all training scripts and of the caching tools."""
    groups = [group for script in OPTION_SETS for group in groups_of(option_set_of(script)).values()]
    return {option.name: option for group in (ConfigFileOptions, CacheToolOptions, *groups) for option in options_of(group)}


def flags_in_source(path: Path) -> set[str]:
    """The texts in a Python file that are a flag and nothing else: what its argument parser is given."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {match[1] for text in texts if (match := FLAG.fullmatch(text))}


def options_on(page: Path):
    """The same of the script that a page is about alone, where it is about one: its choices may be others."""
    if f"{page.stem}.py" not in OPTION_SETS:
        return script_options()
    groups = groups_of(option_set_of(f"{page.stem}.py")).values()
    return {option.name: option for group in (ConfigFileOptions, *groups) for option in options_of(group)}


@cache
def other_flags() -> set[str]:
    """Flags of our other scripts and tools, of accelerate's launcher, of prompt lines, and the few of other programs."""
    accelerate = importlib.util.find_spec("accelerate")
    assert accelerate is not None and accelerate.origin is not None
    tools = [*(ROOT / "tools").glob("*.py"), *(ROOT / "networks").glob("convert_*.py"), ROOT / "quickstart.py"]
    sources = [*tools, Path(accelerate.origin).parent / "commands" / "launch.py"]
    found = set().union(*(flags_in_source(path) for path in sources if path.is_file()))
    sets = (AnimaInferenceOptions, SdInferenceOptions, SdxlInferenceOptions, *FLOW_SCRIPTS.values())
    drawing = {option.name for kind in sets for group in groups_of(kind).values() for option in options_of(group)}
    return {*found, *drawing, *FLAGS, *FOREIGN_FLAGS, "help"}


@pytest.mark.parametrize("name", TABLES)
def test_the_reference_tables_are_up_to_date(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == with_tables(page, TABLES[name]()), "run: python tools/make_reference_tables.py --write"


@pytest.mark.parametrize("page", ["no markers", f"{END} {START}", f"{START} {END} {END}", f"{START} {START} {END}"])
def test_a_page_without_one_pair_of_markers_is_refused(page):
    with pytest.raises(ValueError, match="once each"):
        with_tables(page, "table")


def test_every_flag_in_the_docs_exists(page):
    known = {*script_options(), *other_flags()}
    unknown = {flag for code in code_of(page) for flag in FLAG.findall(code)} - known
    assert not unknown


def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_files_named_in_the_docs_exist(page):
    """Paths of this repository in backticks; a placeholder such as <arch> stands for anything."""
    named = {match for code in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))) for match in PATH.findall(code)}
    missing = [name for name in named if not list(ROOT.glob(re.sub(r"<\w+>", "*", name).rstrip("/.")))]
    assert not missing


# ---------------------------------------------------------------- examples


def test_one_spelling_of_regularisation():
    """In documents, help and messages; the other one is in a name of the protocol of network modules alone."""
    files = [*PAGES, *ROOT.glob("*.py"), *(ROOT / "library").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert [path.name for path in files if re.search(r"(?i)(?<!max_norm_)regulariz", path.read_text(encoding="utf-8"))] == []


def test_dataset_examples_are_read(tmp_path, monkeypatch):
    for path in EXAMPLES:
        if path.name.endswith("_dataset.toml"):
            check_dataset(path, tmp_path, monkeypatch)


def check_dataset(path: Path, folder: Path, monkeypatch) -> None:
    """Reads a dataset file with the folders that it names, through everything but the images."""
    subsets = [subset for table in read_dataset_file(path)["datasets"] for subset in table["subsets"]]
    for subset in subsets:
        for key in ("image_dir", "conditioning_data_dir"):
            (folder / subset.get(key, ".")).mkdir(parents=True, exist_ok=True)
        if "metadata_file" in subset:
            (folder / subset["metadata_file"]).write_text("{}")
    monkeypatch.chdir(folder)
    masked = any("conditioning_data_dir" in subset for subset in subsets)
    options = TrainOptions(dataset=DatasetOptions(dataset_config=path, masked_loss=masked))
    assert read_datasets(options, bucket_step=16)


def test_one_example_has_every_key():
    document = read_dataset_file(ROOT / "configs" / "examples" / "all_keys_dataset.toml")
    tables = [
        document["general"],
        *document["datasets"],
        *(subset for table in document["datasets"] for subset in table["subsets"]),
    ]
    assert {key.name for key in schema.KEYS} == {name for table in tables for name in table} - {"subsets"}


TRAINED: dict[str, Any] = {
    "anima": AnimaTrainOptions,
    "lumina": LuminaTrainOptions,
    "sd": StableDiffusionTrainOptions,
    "sd3": Sd3TrainOptions,
    "sdxl": SdxlTrainOptions,
}


def test_training_examples_are_valid_options():
    for path in EXAMPLES:
        if path.name.endswith("_training.toml"):
            options = read_options(TRAINED[path.name.removesuffix("_training.toml")], ["--config_file", str(path)])
            assert options.saving.output_name and options.network.network_module == options.NETWORK_MODULE
            assert (ROOT / options.dataset.dataset_config).is_file()


def test_what_an_example_suggests_is_known():
    """Its commented-out values are options of the script."""
    for path in EXAMPLES:
        kind = path.name.removesuffix("_training.toml")
        for line in path.read_text(encoding="utf-8").splitlines() if kind in TRAINED else ():
            if match := re.match(r"# (\w+) = ", line):
                values = {option.name for group in groups_of(TRAINED[kind]).values() for option in options_of(group)}
                assert match[1] in values, f"{path.name}: {line}"


def test_there_are_examples_of_both_kinds():
    assert {path.name for path in EXAMPLES} >= {f"{kind}_{what}.toml" for kind in TRAINED for what in ("dataset", "training")}


def test_toml_in_the_docs_is_read(page, tmp_path, monkeypatch):
    for number, text in enumerate(fences(page, "toml")):
        if "[[datasets.subsets]]" in text and "[[datasets]]" not in text:  # a piece of a file
            text = f"[[datasets]]\nresolution = 1024\n{text}"
        path = tmp_path / f"block{number}.toml"
        path.write_text(text, encoding="utf-8")
        if "[[datasets]]" in text:
            check_dataset(path, tmp_path, monkeypatch)
        elif "[prompt]" in text:
            assert read_prompts(path)
        else:
            assert not read_config(path, options_on(page)).problems


def test_json_in_the_docs_is_read(tmp_path, monkeypatch):
    for number, text in enumerate(fences(DATASET_PAGE, "json")):
        path = tmp_path / f"block{number}.json"
        path.write_text(text, encoding="utf-8")
        check_dataset(path, tmp_path, monkeypatch)


# ---------------------------------------------------------------- the dataset's keys


def table_rows(page: Path, first_header: str) -> list[list[str]]:
    """Cells of all tables whose first column has this header."""
    rows, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == first_header:
            inside = True
        elif inside and not set(cells[0]) <= set("-: "):
            rows.append(cells)
    return rows


DATASET_PAGE = ROOT / "docs" / "dataset_config.md"


def test_every_key_of_the_schema_has_one_row():
    rows = table_rows(DATASET_PAGE, "Key")
    assert [row[0].strip("`") for row in rows] == [key.name for key in schema.KEYS]


def test_a_row_tells_type_default_tables_flag_and_limits():
    keys = {key.name: key for key in schema.KEYS}
    assert key_row(keys["batch_size"])[:5] == ["`batch_size`", "a whole number, at least 1", "1", "G D", "`--train_batch_size`"]
    assert key_row(keys["caption_dropout_rate"])[1:3] == ["a number, from 0 to 1", "0.0"]
    assert key_row(keys["image_dir"])[2:5] == ["not set", "S", "none"]
    assert key_row(keys["class_tokens"])[5].endswith('Not in subsets with `metadata_file`. Example: `class_tokens = "a cat"`')
    assert key_row(keys["custom_attributes"])[5].endswith("`custom_attributes = { diff_output_preservation = true }`")


@pytest.mark.parametrize("level", [schema.GENERAL, schema.DATASETS])
def test_the_names_of_a_level_are_listed(level):
    section = DATASET_PAGE.read_text(encoding="utf-8").partition(f"### Keys of `{level}`\n")[2].partition("\n####")[0]
    table = section.partition("| About | Keys |")[2].partition("\n\n")[0]
    assert set(INLINE.findall(table)) == {key.name for key in schema.KEYS if level in key.levels}


def test_the_bucket_examples_are_right():
    rows = table_rows(DATASET_PAGE, "Image")
    assert len(rows) >= 8
    settings = {"buckets": {"max_bucket_reso": 2048}, "no upscaling": {"bucket_no_upscale": True}, "buckets off": {}}
    for image, kind, *written in rows:
        dataset = DatasetSettings(
            place="", subsets=(), resolution_wh=(1024, 1024), enable_bucket=kind != "buckets off", **settings[kind]
        )
        placement = Buckets(dataset).place(size(image))
        (width, height), (left, top) = placement.resized_wh, placement.crop_left_top
        cut = (width - placement.bucket_wh[0], height - placement.bucket_wh[1])
        assert [size(cell) for cell in written] == [placement.resized_wh, placement.bucket_wh, cut], image
        assert (left, top) == (cut[0] // 2, cut[1] // 2)


def size(text: str) -> tuple[int, int]:
    width, height = re.findall(r"\d+", text)
    return int(width), int(height)
