from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.dataset.token_use import TokenUse
from library.errors import UserError
from library.options.anima import AnimaTrainOptions
from library.options.caches import CacheOptions
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.look import LookOptions
from library.options.run import RunOptions
from library.options.saving import SavingOptions
from library.training.look import look

ROOT = Path(__file__).resolve().parents[3]


class WordArchitecture:
    name, bucket_step = "words", 16

    def __init__(self, before=""):
        self.before = before

    def positive_prompt(self, prompt, options):
        return self.before + prompt

    def token_counter(self, options):
        return lambda text: (TokenUse("words", len(text.split()), 6, None),)


@pytest.fixture
def options_for(tmp_path, picture_folder):
    """``options_for(debug_dataset=True)``: options over a folder of four pictures, and further groups by name."""
    folder = picture_folder(4)
    (tmp_path / "my.toml").write_text(
        f"""[general]
resolution = 64
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
caption_extension = ".txt"
[[datasets]]
batch_size = 3
[[datasets.subsets]]
image_dir = '{folder}'
num_repeats = 2
""",
        encoding="utf-8",
    )

    def make(*, debug_dataset=False, show_captions=None, **groups):
        groups.setdefault("saving", SavingOptions(output_dir=str(tmp_path / "out"), output_name="tiny"))
        groups.setdefault("dataset", DatasetOptions(dataset_config=tmp_path / "my.toml"))
        return AnimaTrainOptions(look=LookOptions(debug_dataset=debug_dataset, show_captions=show_captions), **groups)

    return make


def test_the_page_and_its_facts(options_for, tmp_path, capsys):
    look(options_for(debug_dataset=True), WordArchitecture())
    page = tmp_path / "out" / "tiny-dataset.html"
    told = capsys.readouterr().out
    assert f"page: {page} (" in told
    assert "4 of 4 images shown" in told
    assert "4 images, 8 with repeats" in told
    assert "words: at most" in told
    assert "seed 0" in page.read_text(encoding="utf-8")
    assert [entry.name for entry in page.parent.iterdir()] == [page.name]


def test_captions_come_with_the_warnings_of_the_page(options_for, tmp_path, capsys):
    file = tmp_path / "my.toml"
    file.write_text(file.read_text(encoding="utf-8").replace('".txt"', '".cap"'), encoding="utf-8")
    look(options_for(show_captions=1), WordArchitecture())
    captions = capsys.readouterr().out
    assert "4 .txt files beside them are NOT read" in captions
    look(options_for(debug_dataset=True, show_captions=1), WordArchitecture())
    both = capsys.readouterr().out
    warnings = [line for line in captions.splitlines() if line.startswith("warning: ")]
    assert warnings == [line for line in both.splitlines() if line.startswith("warning: ")]
    assert both.splitlines()[-1].startswith("page: ")


def test_without_a_folder_the_page_lies_here(options_for, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    look(options_for(debug_dataset=True, saving=SavingOptions(), run=RunOptions(seed=3)), WordArchitecture())
    html = (tmp_path / "dataset.html").read_text(encoding="utf-8")
    assert "seed 3" in html
    assert "No --seed" not in html
    assert "page: dataset.html" in capsys.readouterr().out


def test_captions_alone_write_nothing(options_for, tmp_path, capsys):
    look(options_for(show_captions=2, saving=SavingOptions()), WordArchitecture())
    told = capsys.readouterr().out
    assert "2 of 4 captions" in told
    assert told.count("as read:") == 2
    assert "page:" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", ["", "You are <an> assistant. <Prompt Start> "])
def test_what_stands_before_every_caption_is_told_once(options_for, tmp_path, capsys, before):
    look(options_for(debug_dataset=True, show_captions=2), WordArchitecture(before))
    told, html = capsys.readouterr().out, (tmp_path / "out" / "tiny-dataset.html").read_text(encoding="utf-8")
    lines = told.splitlines()[:1] if before else []
    assert lines == [line for line in told.splitlines() if "before every caption" in line]
    assert lines == ["before every caption: You are <an> assistant. <Prompt Start>"] * bool(before)
    assert html.count("Before every caption: You are &lt;an&gt; assistant. &lt;Prompt Start&gt;") == bool(before)


def test_both_together(options_for, capsys):
    look(options_for(debug_dataset=True, show_captions=1), WordArchitecture())
    told = capsys.readouterr().out
    assert told.index("as read:") < told.index("page: ")


def test_cached_captions_are_shown_in_their_variants(options_for, tmp_path, capsys):
    shuffled = CaptionOptions(shuffle_caption=True)
    cached = CacheOptions(cache_text_encoder_outputs=True, caption_variants=2)
    look(options_for(debug_dataset=True, show_captions=1, captions=shuffled, caches=cached), WordArchitecture())
    texts = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  epoch")]
    assert len(texts) == 3
    assert len(set(texts)) == 2
    assert "(4 of 4) are cached in up to 2 variants" in (tmp_path / "out" / "tiny-dataset.html").read_text(encoding="utf-8")


def test_warnings_are_on_the_page_and_the_terminal(options_for, picture_folder, tmp_path, capsys):
    (tmp_path / "pictures" / "picture_01.txt").write_text("", encoding="utf-8")
    look(
        options_for(debug_dataset=True, dataset=DatasetOptions(dataset_config=tmp_path / "my.toml", in_json="x")),
        WordArchitecture(),
    )
    told, html = capsys.readouterr().out, (tmp_path / "out" / "tiny-dataset.html").read_text(encoding="utf-8")
    for words in ("ignored: --in_json", "caption files are empty"):
        assert words in told
        assert words in html


def test_all_that_is_wrong_is_told_together(options_for, tmp_path):
    (tmp_path / "out").write_text("a file")
    options = options_for(debug_dataset=True, dataset=DatasetOptions(dataset_config=tmp_path / "none.toml"))
    with pytest.raises(UserError) as raised:
        look(options, WordArchitecture())
    assert len(raised.value.problems) == 2
    assert "--output_dir" in str(raised.value)
    assert "none.toml" in str(raised.value)


def test_only_the_main_process_looks(options_for, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    look(options_for(debug_dataset=True, show_captions=1), WordArchitecture())
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_batches_of_several_processes(options_for, capsys, monkeypatch):
    look(options_for(debug_dataset=True), WordArchitecture())
    alone = capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    look(options_for(debug_dataset=True), WordArchitecture())
    both = capsys.readouterr().out
    assert alone != both


def test_the_page_is_the_same_every_time(options_for, tmp_path):
    page = tmp_path / "out" / "tiny-dataset.html"
    look(options_for(debug_dataset=True), WordArchitecture())
    first = page.read_bytes()
    look(options_for(debug_dataset=True), WordArchitecture())
    assert page.read_bytes() == first


def test_a_look_imports_no_torch(options_for, picture_folder, tmp_path):
    picture_folder(20, scale=1.0)
    code = (
        "import sys; from library.options.anima import AnimaTrainOptions; from library.options.command_line import *\n"
        "import library.training.look as module, cv2, PIL.Image\n"
        "from library.anima.architecture import ANIMA; from library.options.look import LookOptions\n"
        "from library.options.dataset import DatasetOptions; from library.options.saving import SavingOptions\n"
        "from pathlib import Path\n"
        "options = AnimaTrainOptions(look=LookOptions(debug_dataset=True, show_captions=1), saving=SavingOptions(output_dir='out'),\n"
        "                            dataset=DatasetOptions(dataset_config=Path('my.toml')))\n"
        "module.look(options, ANIMA)\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 images shown" in done.stdout
