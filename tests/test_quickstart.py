"""The quick start without an installation: arguments, environment, stamp, steps, report."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quickstart
from quickstart import QuickstartError

ROOT = Path(quickstart.__file__).parent


@pytest.fixture
def venv(tmp_path):
    """A folder with an interpreter where a virtual environment has one."""
    python = quickstart.venv_python(tmp_path / "venv")
    python.parent.mkdir(parents=True)
    python.write_text("")
    return tmp_path / "venv"


def test_everything_after_test_goes_to_pytest():
    options = quickstart.parse_arguments(["--venv", "env", "test", "-m", "not slow", "--python"])
    assert options.command == "test" and options.pytest_arguments == ["-m", "not slow", "--python"]
    assert options.venv == Path("env").absolute()


def test_without_a_word_it_trains(monkeypatch):
    monkeypatch.setenv("QUICKSTART_PIP_ARGS", "--no-cache-dir")
    options = quickstart.parse_arguments([])
    assert (options.command, options.python, options.pip_args) == ("train", sys.executable, "--no-cache-dir")
    assert options.output == ROOT / "quickstart_output"


@pytest.mark.parametrize(("windows", "expected"), [(False, "bin/python"), (True, "Scripts/python.exe")])
def test_the_environments_python(windows, expected):
    assert quickstart.venv_python(Path("x"), windows=windows).as_posix() == f"x/{expected}"


def test_a_stamp_holds_until_the_requirements_change(venv, tmp_path, monkeypatch):
    files = ("requirements.txt", "requirements-dev.txt", "constraints.txt")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    for name in files:
        (tmp_path / name).write_text(name)
    assert not quickstart.is_stamped(venv, ["requirements.txt"])
    quickstart.stamp(venv, ["requirements.txt"])
    assert quickstart.is_stamped(venv, ["requirements.txt"])
    assert not quickstart.is_stamped(venv, ["requirements.txt", "requirements-dev.txt"])  # the tests need more
    quickstart.stamp(venv, files[:2])
    assert quickstart.is_stamped(venv, files[:1])
    (tmp_path / "constraints.txt").write_text("torch==9")
    assert not quickstart.is_stamped(venv, files[:1])


def test_a_damaged_stamp_or_a_missing_python_means_set_up(venv):
    quickstart.stamp(venv, ["requirements.txt"])
    (venv / quickstart.STAMP_NAME).write_text("{")
    assert not quickstart.is_stamped(venv, ["requirements.txt"])
    quickstart.stamp(venv, ["requirements.txt"])
    quickstart.venv_python(venv).unlink()
    assert not quickstart.is_stamped(venv, ["requirements.txt"])


def test_set_up_runs_nothing_when_the_stamp_holds(venv, monkeypatch):
    quickstart.stamp(venv, ["requirements.txt"])
    monkeypatch.setattr(quickstart, "run_step", lambda *a, **k: pytest.fail("it ran a step"))
    options = quickstart.parse_arguments(["--venv", str(venv)])
    assert quickstart.set_up(options, testing=False) == quickstart.venv_python(venv)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(QuickstartError, match="photos exists and is not a virtual environment"):
        quickstart.make_venv(sys.executable, tmp_path / "photos", tmp_path)


def test_an_interpreter_that_does_not_run_is_named(tmp_path):
    assert not quickstart.works(tmp_path / "python")
    with pytest.raises(QuickstartError, match="python-9 does not run.*--python"):
        quickstart.check_version(str(tmp_path / "python-9"))


def test_the_torch_that_is_there_stays(venv):
    path = quickstart.write_constraints(quickstart.venv_python(venv), "2.11.0+cu128")
    lines = path.read_text().splitlines()
    assert "torch==2.11.0+cu128" in lines and sum(line.startswith("torch==") for line in lines) == 1
    assert quickstart.version_pair("2.11.0+cu128") == (2, 11)


def test_every_requirement_is_pinned_once():
    def names(file):
        lines = (ROOT / file).read_text().splitlines()
        return [line.split(";")[0].split("=")[0].split(">")[0].strip().lower() for line in lines if line and line[0] != "#"]

    pinned = names("constraints.txt")
    assert len(pinned) == len(set(pinned))
    assert set(names("requirements.txt") + names("requirements-dev.txt")) <= set(pinned)


def test_the_size_of_torch_is_told_only_where_it_surprises(monkeypatch, capsys):
    for platform, gpu, told in (("linux", None, True), ("linux", "/usr/bin/nvidia-smi", False), ("win32", None, False)):
        monkeypatch.setattr(quickstart.sys, "platform", platform)
        monkeypatch.setattr(quickstart.shutil, "which", lambda name, gpu=gpu: gpu)
        quickstart.say_what_torch_brings()
        assert ("--pip-args" in capsys.readouterr().out) == told


def test_a_step_leaves_its_output_in_the_log_and_on_the_screen(tmp_path, capsys):
    command = [sys.executable, "-c", "print('élan'); import sys; print('warned', file=sys.stderr)"]
    output = quickstart.run_step("a step", command, tmp_path / "logs" / "a.log", show=True)
    assert "élan" in output and "warned" in (tmp_path / "logs" / "a.log").read_text(encoding="utf-8")
    assert "élan" in capsys.readouterr().out


def test_a_failed_step_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "print('\\n'.join(f'line {n}.' for n in range(100))); raise SystemExit(3)"]
    with pytest.raises(QuickstartError) as caught:
        quickstart.run_step("a step", command, tmp_path / "a.log", hint="try this")
    message = str(caught.value)
    assert "a step failed (exit status 3)" in message and str(tmp_path / "a.log") in message
    assert "line 99." in message and "line 10." not in message and message.endswith("try this")


def test_a_command_that_does_not_exist_is_an_error_not_a_traceback(tmp_path):
    with pytest.raises(QuickstartError, match="a step failed"):
        quickstart.run_step("a step", [str(tmp_path / "nothing")], tmp_path / "a.log")


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_lets_the_command_finish(tmp_path):
    # a shell that starts the tests in the background lets them ignore Ctrl-C, and children inherit that
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    child = heed + "import time\ntry:\n    print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    command = [sys.executable, "-c", child]
    code = heed + f"import pathlib, quickstart; quickstart.run_step('x', {command!r}, pathlib.Path('x.log'))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = tmp_path / "x.log"
    deadline = time.monotonic() + 20
    while not (log.exists() and "up" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert "saved" in log.read_text() and "KeyboardInterrupt" in output and process.returncode != 0


def test_main_ends_an_error_with_one_message(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    status = quickstart.main(["--venv", str(tmp_path / "photos"), "--output", str(tmp_path / "out")])
    assert status == 1
    assert capsys.readouterr().err.startswith("\nerror: ")


def test_the_exit_status_of_the_tests_is_passed_on(venv, monkeypatch, tmp_path):
    (tmp_path / "test_two.py").write_text("def test_bad():\n    assert False\n")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    assert quickstart.run_tests(Path(sys.executable), ["-q", "test_two.py"]) == 1
    assert quickstart.run_tests(Path(sys.executable), ["-q", "test_two.py", "-k", "none"]) == 5


def test_the_inputs_are_real_and_made_once(tmp_path, capsys):
    quickstart.make_inputs(Path(sys.executable), tmp_path)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 3
    suffixes = {path.suffix for path in (tmp_path / "pictures").iterdir()}
    assert {".png", ".jpg", ".webp", ".txt"} <= suffixes
    capsys.readouterr()
    quickstart.make_inputs(Path(sys.executable), tmp_path)
    assert capsys.readouterr().out == ""


def test_the_files_that_it_writes_are_valid(tmp_path):
    from library.sampling.prompts import read_prompts

    toml = pytest.importorskip("toml")
    document = toml.loads(quickstart.dataset_file(Path("/tmp/my pictures")))
    assert document["datasets"][0]["subsets"][0]["image_dir"] == "/tmp/my pictures"
    (tmp_path / "p.txt").write_text(quickstart.SAMPLE_PROMPTS, encoding="utf-8")
    assert [prompt.seed for prompt in read_prompts(tmp_path / "p.txt")] == [1, 2]


def test_the_losses_come_from_the_log(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tensorboard" / "run")) as writer:
        for step in range(8):
            writer.add_scalar("loss/current", 2.0 - step / 8, step)
    losses = quickstart.read_losses(Path(sys.executable), tmp_path)
    assert len(losses) == 8 and quickstart.quarter_means(losses) == pytest.approx((1.9375, 1.1875))


def test_a_run_without_losses_is_an_error(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(QuickstartError, match="loss/current"):
        quickstart.read_losses(Path(sys.executable), tmp_path)


def test_the_report_says_what_was_made(tmp_path):
    training = tmp_path / "training"
    (training / "sample").mkdir(parents=True)
    (training / "my_anima_lora-state").mkdir()
    (training / "my_anima_lora.safetensors").write_bytes(b"0" * 2000)
    (training / "sample" / "a.png").write_bytes(b"")
    text = "\n".join(quickstart.summary(tmp_path, [4.0, 3.0, 2.0, 1.0], 61.4, Path("env/bin/python")))
    assert "fell from 4.000" in text and "1.000" in text and "4 steps" in text and "61 s" in text
    assert all(str(training / name) in text for name in ("my_anima_lora.safetensors", "sample")) and "my_anima_lora-state" in text
    assert "quickstart.py test" in text


def test_help_needs_no_environment(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-I", str(ROOT / "quickstart.py"), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert answer.returncode == 0 and "--pip-args" in answer.stdout


def test_nothing_of_the_project_or_of_torch_is_imported():
    code = "import sys, quickstart; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", "import json; " + code], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = set(json.load(io.StringIO(answer.stdout)))
    assert not modules & {"torch", "numpy", "library", "toml", "PIL"}
