"""What a console cannot show ends no run: through real processes."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.options.console import ConsoleOptions
from library.training.running.console import SHOWN_FROM, progress_bar, set_up_console

REPOSITORY = Path(__file__).parents[3]
START = """
import logging
from library.options.console import ConsoleOptions
from library.training.running.console import set_up_console
set_up_console(ConsoleOptions(console_log_simple=True{options}))
log = logging.getLogger("library.x").info
"""


def run(code: str, *, options: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252", **variables}
    environment.pop("RANK", None)
    command = [sys.executable, "-c", START.replace("{options}", options) + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="cp1252", timeout=60)


def test_names_that_the_console_does_not_have():
    done = run(r'log("saved %s", "\u732b \xe9.safetensors"); print("plain \u732b"); log("after")')
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == ["saved \\u732b \xe9.safetensors", "plain \\u732b", "after"]


def test_names_that_are_no_text_on_a_utf8_console_and_in_a_log_file(tmp_path):
    code = r'log("saved %s", "a\udcff.safetensors"); log("after")'
    done = run(code, PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["saved a\\udcff.safetensors", "after"])
    done = run(code, options=f", console_log_file={str(tmp_path / 'log')!r}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == ["saved a\\udcff.safetensors", "after"]


@pytest.mark.parametrize(("level", "shown"), [("WARNING", ["b"]), ("DEBUG", ["x", "a", "b"]), (None, ["a", "b"])])
def test_what_is_less_severe_is_not_shown(capsys, level, shown):
    set_up_console(ConsoleOptions(console_log_simple=True, console_log_level=level))
    logger = logging.getLogger("library.x")
    logger.debug("x")
    logger.info("a")
    logger.warning("b")
    assert capsys.readouterr().out.splitlines() == shown


def test_lines_tell_the_time_unless_they_are_to_be_simple(capsys):
    for simple in (False, True):
        set_up_console(ConsoleOptions(console_log_simple=simple))
        logging.getLogger("library.x").info("saved")
    timed, plain = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d saved", timed) and plain == "saved"


def count_to(total):
    with progress_bar("checking images", "image") as progress:
        for done in range(1, total + 1):
            progress(done, total)


def test_a_bar_appears_where_there_is_much_to_do(capsys, monkeypatch):
    count_to(SHOWN_FROM - 1)
    assert capsys.readouterr().err == ""
    count_to(SHOWN_FROM)
    shown = capsys.readouterr().err
    assert f"0/{SHOWN_FROM}" in shown and "checking images" in shown and "image" in shown
    assert shown.endswith("\r")  # it leaves nothing behind
    monkeypatch.setenv("RANK", "1")
    count_to(SHOWN_FROM)
    assert capsys.readouterr().err == ""


def test_a_line_that_cannot_be_made_is_told_and_the_run_goes_on():
    done = run('log("%d steps", "no number"); log("after")')
    assert done.returncode == 0 and done.stdout == "after\n"
    assert "Logging error" in done.stderr and "no number" in done.stderr


def test_what_a_package_says_to_nobodys_use_is_not_shown():
    text = "Paged optimizers are not supported on CPU. Falling back to non-paged optimizer behavior."
    done = run(f"import warnings; warnings.warn({text!r}); warnings.warn('but this')")
    assert "Paged" not in done.stderr and "but this" in done.stderr
