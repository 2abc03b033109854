"""What tests share: tiny checkpoints, picture folders, and scripts run as real processes.

``pytest`` runs all but the slow tests, ``pytest --slow`` runs everything, ``pytest -m slow`` only the slow ones.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--slow"):
        config.option.markexpr = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: nothing may need a hub
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A script's start in this process sets up the project's loggers; the next test finds them as they were."""
    loggers = [logging.getLogger(name) for name in ("library", "networks", "train_network")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def accelerate_as_new() -> Iterator[None]:
    """It keeps the number format of a process's first run."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_anima(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints in the real layout: paths under ``dit``, ``qwen3``, ``qwen3_folder`` and ``vae``. Read only."""
    from tools.make_tiny_models import make_anima

    return make_anima(tmp_path_factory.mktemp("tiny_anima"), qwen3_folder=True)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Stable Diffusion checkpoints in the real layouts. Read only.

    Single files under ``sd1``, ``sd2`` and ``sdxl``, ``sd1_ckpt``; diffusers folders under ``sd1_folder``, ``sd2_folder`` and
    ``sdxl_folder``; other VAEs (of another seed) under ``vae`` (a file) and ``vae_folder``.
    """
    from tools.tiny_sd import make_sd

    folder = tmp_path_factory.mktemp("tiny_sd")
    paths = {}
    for kind, layouts in {"sd1": ("file", "ckpt", "folder"), "sd2": ("file", "folder"), "sdxl": ("file", "folder")}.items():
        made = make_sd(folder, kind, layouts=layouts)
        paths.update({kind if layout == "file" else f"{kind}_{layout}": path for layout, path in made.items()})
    other = make_sd(folder / "other", "sd1", seed=1, layouts=("vae", "vae_diffusers"))
    return {**paths, "vae": other["vae"], "vae_folder": other["vae_diffusers"]}


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Stable Diffusion 3 and 3.5 checkpoints in the real layouts. Read only.

    Denoiser and VAE in one file under ``sd3``, ``sd35_medium`` and ``sd35_large``; the same with all text encoders under
    ``sd3_whole`` and so on, without T5 under ``sd3_clips``; separate files of the same weights under ``clip_l``, ``clip_g``,
    ``t5xxl`` and ``vae``.
    """
    from tools.tiny_sd3 import FILES, KINDS, make_sd3

    folder, paths = tmp_path_factory.mktemp("tiny_sd3"), {}
    for kind in KINDS:
        made = make_sd3(folder, kind, files=FILES if kind == "sd3" else ("model", "whole"))
        names = {"model": kind, "clips": f"{kind}_clips", "whole": f"{kind}_whole"}
        paths.update({names.get(file, file): path for file, path in made.items()})
    return paths


@pytest.fixture(scope="session")
def tiny_lumina(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Lumina Image 2.0 checkpoints in the real layouts: ``dit``, ``gemma2`` (which carries its tokenizer) and ``ae`` of their
    own, the same weights all in one file under ``whole``, and Gemma as a Hugging Face folder of two shards under
    ``gemma2_folder``. Read only."""
    from tools.tiny_lumina import make_lumina

    return make_lumina(tmp_path_factory.mktemp("tiny_lumina"), gemma2_folder=True)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """``picture_folder(count=4, scale=0.25, name="pictures", captions=True)``: drawn pictures of mixed sizes and formats.

    Sides are 200 to 700 pixels times ``scale``; the folder is this test's own and may be changed.
    """
    from tools.make_sample_pictures import make_pictures

    def make(count: int = 4, *, scale: float = 0.25, name: str = "pictures", captions: bool = True) -> Path:
        folder = tmp_path / name
        pictures = make_pictures(folder, count, scale=scale)
        if not captions:
            for picture in pictures:
                picture.with_suffix(".txt").unlink()
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is full after 64 KiB: a file system of its own. Skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def script_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a script under test: this checkout, one CPU thread, no GPU, no hub and none of the user's settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PYTEST_"))}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["ACCELERATE_USE_CPU"] = "true"
    environment["HF_HUB_OFFLINE"] = "1"
    environment["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))  # also holds accelerate's default configuration
    environment["PYTHONUTF8"] = "1"
    return environment


@pytest.fixture
def run_script(script_environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_script("anima_train_network.py", "--dry_run", ..., launcher=None)`` waits and returns the finished process.

    ``launcher``: None = this Python, 1 = ``accelerate launch``, more = that many processes that train together on the CPU.
    Text of stdout and stderr is in the result; a run past ``timeout`` seconds fails the test.
    """

    def run(
        script: str,
        *arguments: object,
        launcher: int | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path = tmp_path,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        command = script_command(script, *arguments, launcher=launcher)
        variables = {**script_environment, **(environment or {})}
        return subprocess.run(
            command, cwd=cwd, env=variables, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=timeout
        )

    return run


@pytest.fixture
def start_script(script_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """As ``run_script``, but returns the running process (stderr joined to stdout); what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(
        script: str, *arguments: object, launcher: int | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            script_command(script, *arguments, launcher=launcher),
            cwd=tmp_path,
            env={**script_environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            preexec_fn=None if os.name == "nt" else heed_ctrl_c,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def heed_ctrl_c() -> None:
    """A shell that runs the tests in the background lets them ignore Ctrl-C, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def script_command(script: str, *arguments: object, launcher: int | None = None) -> list[str]:
    """The command line for a script of this checkout with this Python: plain, launched, or as several processes (gloo)."""
    command = [sys.executable]
    if launcher == 1:
        command += ["-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--num_processes", "1"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    elif launcher is not None:  # accelerate's own launcher starts several CPU processes only through MPI
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(launcher)]
    return [*command, str(REPOSITORY / script), *(str(argument) for argument in arguments)]
