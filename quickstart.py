"""From a fresh machine to a trained LoRA: ``python quickstart.py``. The tests: ``python quickstart.py test [pytest arguments]``.

Needs Python 3.10 or newer and nothing else. The first run makes a virtual environment in ``.venv`` and installs
requirements.txt into it; later runs skip that. Then it writes tiny checkpoints and some pictures to ``quickstart_output/``,
trains a small LoRA on them, and says what was made. Options: ``python quickstart.py --help``.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)
STAMP_NAME = "quickstart_stamp.json"
LOG_TAIL_LINES = 25
LORA_NAME = "my_anima_lora"
PICTURES = 20
MOST_TEST_PROCESSES = 4  # each takes a GiB or two


class QuickstartError(Exception):
    """A step failed; the message says which and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error, 130 after Ctrl-C, or that of the tests."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console that cannot show a progress bar's blocks still works
    try:
        python = set_up(options, testing=options.command == "test")
        if options.command == "test":
            return run_tests(python, options.pytest_arguments)
        run_training(python, options.output)
    except QuickstartError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command starts again", file=sys.stderr, flush=True)
        return 130
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Everything after the word ``test`` belongs to pytest."""
    own, tests = list(argv), None
    if "test" in own:
        place = own.index("test")
        own, tests = own[:place], own[place + 1 :]
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        usage="quickstart.py [options] [test [pytest arguments]]",
        description="Sets up, then trains a tiny Anima LoRA; with the word test, runs the tests instead.",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter for the environment (this one)")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (.venv)")
    parser.add_argument("--output", type=Path, default=ROOT / "quickstart_output", help="folder for what is made")
    parser.add_argument(
        "--pip-args",
        default=os.environ.get("QUICKSTART_PIP_ARGS", ""),
        help='more arguments for pip install, e.g. "--index-url URL"; also from $QUICKSTART_PIP_ARGS',
    )
    options = parser.parse_args(own)
    options.command = "train" if tests is None else "test"
    options.pytest_arguments = tests or []
    options.venv, options.output = options.venv.absolute(), options.output.absolute()
    return options


# ---- setting up


def set_up(options: argparse.Namespace, *, testing: bool) -> Path:
    """Makes the environment and installs what is missing; returns its Python."""
    python = venv_python(options.venv)
    files = ["requirements.txt", *(["requirements-dev.txt"] if testing else [])]
    if is_stamped(options.venv, files):
        return python
    logs = options.output / "logs"
    if not works(python):
        make_venv(options.python, options.venv, logs)
    pip_arguments = shlex.split(options.pip_args, posix=os.name != "nt")
    install(python, files, pip_arguments, logs)
    stamp(options.venv, files)
    return python


def venv_python(venv: Path, *, windows: bool = os.name == "nt") -> Path:
    return venv / "Scripts" / "python.exe" if windows else venv / "bin" / "python"


def works(python: Path) -> bool:
    """Whether this interpreter starts and has pip: an interrupted set-up leaves one that does not."""
    try:
        return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv(base: str, venv: Path, logs: Path) -> None:
    check_version(base)
    if venv.exists() and not (venv / "pyvenv.cfg").is_file():
        raise QuickstartError(f"{venv} exists and is not a virtual environment: name another folder with --venv")
    command = [base, "-m", "venv", "--clear", str(venv)]
    hint = "on Debian and Ubuntu: sudo apt install python3-venv"
    run_step("making the virtual environment", command, logs / "venv.log", hint=hint)


def check_version(python: str) -> None:
    try:
        question = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        answer = subprocess.run(question, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise QuickstartError(f"{python} does not run: name a Python interpreter with --python ({error})") from error
    version = tuple(int(part) for part in answer.split())
    if version < OLDEST_PYTHON:
        raise QuickstartError(f"{python} is Python {version[0]}.{version[1]}; 3.10 or newer is needed: name one with --python")


def install(python: Path, files: Sequence[str], pip_arguments: Sequence[str], logs: Path) -> None:
    constraints = ROOT / "constraints.txt"
    torch = installed_torch(python)
    if torch is not None:  # somebody chose this build; it stays
        constraints = write_constraints(python, torch)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *pip_arguments]
    hint = "check the network, or name another package index with --pip-args"
    if torch is None:
        say_what_torch_brings()
        torch_command = [*pip, "torch", "-c", str(constraints)]
        run_step("installing PyTorch (this can take some minutes)", torch_command, logs / "torch.log", hint=hint)
    chosen = [part for name in files for part in ("-r", str(ROOT / name))]
    run_step("installing the other packages", [*pip, *chosen, "-c", str(constraints)], logs / "packages.log", hint=hint)


def installed_torch(python: Path) -> str | None:
    """Version of the torch that this Python imports, if it is one that the requirements allow."""
    answer = subprocess.run([str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    version = answer.stdout.strip()
    return version if answer.returncode == 0 and version_pair(version) >= OLDEST_TORCH else None


def version_pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def write_constraints(python: Path, torch: str) -> Path:
    """A copy of the constraints with the torch that is there, in the environment's folder."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [f"torch=={torch}" if line.startswith("torch==") else line for line in lines]
    path = python.parent.parent / "quickstart_constraints.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def say_what_torch_brings() -> None:
    """On Linux the standard build carries gigabytes of CUDA, also where there is no GPU to use it."""
    if sys.platform.startswith("linux") and not shutil.which("nvidia-smi"):
        print("  (no NVIDIA GPU found: PyTorch's index of CPU builds, given by --pip-args, would make this download smaller)")


def requirement_hashes(files: Sequence[str]) -> dict[str, str]:
    constraints = (ROOT / "constraints.txt").read_bytes()
    return {name: hashlib.sha256((ROOT / name).read_bytes() + constraints).hexdigest() for name in files}


def is_stamped(venv: Path, files: Sequence[str]) -> bool:
    """Whether an earlier run installed just these requirement files, as they are now, with the environment's Python."""
    try:
        stamped = json.loads((venv / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(stamped, dict) or not venv_python(venv).exists():
        return False
    return all(stamped.get(name) == value for name, value in requirement_hashes(files).items())


def stamp(venv: Path, files: Sequence[str]) -> None:
    (venv / STAMP_NAME).write_text(json.dumps(requirement_hashes(files), indent=1), encoding="utf-8")


# ---- running things


def run_step(what: str, command: Sequence[str], log: Path, *, hint: str = "", show: bool = False) -> str:
    """Runs a command with its output in ``log`` (and on the screen with ``show``); returns the output.

    Raises QuickstartError with the log's tail when it fails.
    """
    print(f"{what} ...", flush=True)
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("wb", buffering=0) as file:  # readable while the command runs
            status = follow(command, file, show=show)
    except OSError as error:
        raise QuickstartError(f"{what} failed: {error}") from error
    output = log.read_bytes().decode("utf-8", errors="replace")
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        tail = "\n".join(output.splitlines()[-LOG_TAIL_LINES:])
        shown = "" if show else f"\n{tail}"
        raise QuickstartError(
            f"{what} failed (exit status {status}); the whole log is {log}{shown}" + (f"\n{hint}" if hint else "")
        )
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)
    return output


def follow(command: Sequence[str], file, *, show: bool) -> int:
    """Copies the output of a command to ``file``, and to the screen, as it comes; returns the exit status.

    Ctrl-C reaches the command too; it gets the time that it needs to end (a training saves its state first).
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # a thread of its own: Ctrl-C interrupts the main one, and between reading and writing that would lose output
    copier = threading.Thread(target=copy_output, args=(process.stdout, file, show), daemon=True)
    copier.start()
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = 130
        try:
            process.wait()
        except KeyboardInterrupt:  # the second Ctrl-C: no more waiting
            process.kill()
            process.wait()
    copier.join()
    return status


def copy_output(stream, file, show: bool) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := os.read(stream.fileno(), 65536):
        file.write(chunk)
        if show:
            print(decoder.decode(chunk).replace("\r\n", "\n"), end="", flush=True)


def run_tests(python: Path, pytest_arguments: Sequence[str]) -> int:
    """In a few processes at once; a ``-n`` of one's own, which comes later, counts instead."""
    processes = min(os.cpu_count() or 1, MOST_TEST_PROCESSES)
    one_thread = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}  # of each process: no crowd
    spread = ("-n", str(processes), "--dist", "worksteal")  # whoever is done early takes over what is left of another's share
    command = [str(python), "-m", "pytest", *spread, *pytest_arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **one_thread})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


# ---- the training


def run_training(python: Path, output: Path) -> None:
    start = time.monotonic()
    make_inputs(python, output)
    for folder in ("training", "tensorboard"):  # what an earlier quick start made
        shutil.rmtree(output / folder, ignore_errors=True)
    launcher = [str(python), "-m", "accelerate.commands.launch", *LAUNCH_FLAGS]
    command = [*launcher, str(ROOT / "anima_train_network.py"), *training_flags(output)]
    run_step("training", command, output / "logs" / "training.log", show=True)
    losses = read_losses(python, output)
    print("\n".join(summary(output, losses, time.monotonic() - start, python)), flush=True)


def make_inputs(python: Path, output: Path) -> None:
    """Checkpoints, pictures and the two files that name them; what is there already stays."""
    output.mkdir(parents=True, exist_ok=True)
    if len(list((output / "models").glob("*.safetensors"))) < 3:
        command = [str(python), str(ROOT / "tools" / "make_tiny_models.py"), str(output / "models")]
        run_step("making tiny checkpoints", command, output / "logs" / "models.log")
    if len(list((output / "pictures").glob("*.txt"))) < PICTURES:
        command = [
            str(python),
            str(ROOT / "tools" / "make_sample_pictures.py"),
            str(output / "pictures"),
            "--count",
            str(PICTURES),
        ]
        run_step("drawing pictures", command, output / "logs" / "pictures.log")
    (output / "dataset.toml").write_text(dataset_file(output / "pictures"), encoding="utf-8")
    (output / "sample_prompts.txt").write_text(SAMPLE_PROMPTS, encoding="utf-8")


LAUNCH_FLAGS = ("--num_cpu_threads_per_process", "1", "--num_processes", "1", "--num_machines", "1",
                "--mixed_precision", "bf16", "--dynamo_backend", "no")  # fmt: skip

SAMPLE_PROMPTS = """\
# one picture a line; --w and --h: size, --s: steps, --l: guidance scale, --d: seed, --n: negative prompt
tiny scene, sea, sunset, sun, sailing boat, waves, wide --w 192 --h 128 --s 12 --l 2 --d 1
tiny scene, landscape, blue sky, sun, green hills, grass, square --w 128 --h 128 --s 12 --l 2 --d 2 --n night
"""


def dataset_file(pictures: Path) -> str:
    return f"""\
[general]
resolution = 128            # pixels; a real training uses 768 to 1536
enable_bucket = true        # keep the pictures' shapes
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 16
caption_extension = ".txt"

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = {json.dumps(pictures.as_posix())}
num_repeats = 2
"""


def training_flags(output: Path) -> list[str]:
    """The command line of docs/anima_train_network.md, with paths of this folder and a fixed seed."""
    models = output / "models"
    return [
        f"--pretrained_model_name_or_path={models / 'anima_tiny.safetensors'}",
        f"--qwen3={models / 'qwen3_tiny.safetensors'}",
        f"--vae={models / 'qwen_image_vae_tiny.safetensors'}",
        f"--dataset_config={output / 'dataset.toml'}",
        f"--output_dir={output / 'training'}",
        f"--output_name={LORA_NAME}",
        "--save_model_as=safetensors",
        "--network_module=networks.lora_anima",
        "--network_dim=8",
        "--learning_rate=1e-4",
        "--optimizer_type=AdamW8bit",
        "--lr_scheduler=constant",
        "--timestep_sampling=sigmoid",
        "--discrete_flow_shift=1.0",
        "--max_train_epochs=10",
        "--save_every_n_epochs=5",
        "--mixed_precision=bf16",
        "--gradient_checkpointing",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--vae_chunk_size=64",
        "--vae_disable_cache",
        "--seed=42",
        "--save_state",
        f"--logging_dir={output / 'tensorboard'}",
        f"--sample_prompts={output / 'sample_prompts.txt'}",
        "--sample_every_n_epochs=5",
        "--sample_at_first",
    ]


def read_losses(python: Path, output: Path) -> list[float]:
    command = [str(python), str(ROOT / "tools" / "read_scalars.py"), str(output / "tensorboard"), "--tag", "loss/current"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if answer.returncode != 0:
        raise QuickstartError(f"the training left no losses to read: {answer.stderr.strip()}")
    return json.loads(answer.stdout.splitlines()[-1])["values"]


def quarter_means(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last quarter of the steps: single losses jump with the noise that was drawn."""
    size = max(len(losses) // 4, 1)
    return sum(losses[:size]) / size, sum(losses[-size:]) / size


def summary(output: Path, losses: Sequence[float], seconds: float, python: Path) -> Iterator[str]:
    """The closing report: what was made, where, how the loss moved, what to do next."""
    training = output / "training"
    first, last = quarter_means(losses)
    direction = "fell" if last < first else "rose"
    lora = training / f"{LORA_NAME}.safetensors"
    samples = sorted((training / "sample").glob("*.png"))
    states = sorted(path.name for path in training.iterdir() if path.is_dir() and path.name.endswith("-state"))
    tool = "tensorboard.exe" if os.name == "nt" else "tensorboard"
    yield ""
    yield f"Trained a LoRA in {len(losses)} steps; making everything below took {seconds:.0f} s."
    yield f"  loss      {direction} from {first:.3f} (mean of the first quarter) to {last:.3f} (last quarter)"
    yield f"  LoRA      {lora} ({lora.stat().st_size / 1000:.0f} kB)"
    yield f"  samples   {training / 'sample'} ({len(samples)} pictures: before, during and after training)"
    yield "            coloured noise: the tiny checkpoints are random, so there is nothing in them that a LoRA could bring out"
    yield f"  states    {training} ({', '.join(states)})"
    yield f"  logs      {output / 'tensorboard'}"
    yield f"  inputs    {output / 'models'}, {output / 'pictures'}, {output / 'dataset.toml'}"
    yield ""
    yield "What to run next:"
    yield f"  see the curves   {typed(python.parent / tool)} --logdir {typed(output / 'tensorboard')}"
    yield f"  run the tests    {Path(sys.executable).name} quickstart.py test"
    yield "  your own LoRA    put your paths into configs/examples/anima_dataset.toml and anima_training.toml, then"
    launch = f"{typed(python.parent / 'accelerate')} launch --num_cpu_threads_per_process 1"
    yield f"                   {launch} anima_train_network.py --config_file configs/examples/anima_training.toml"
    yield "  every option     docs/anima_train_network.md"


def typed(path: Path) -> str:
    """A path as one would type it in a shell."""
    if os.name == "nt":
        return f'"{path}"' if " " in str(path) else str(path)
    return shlex.quote(str(path))


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"error: this is Python {sys.version.split()[0]}; 3.10 or newer is needed")
    sys.exit(main())
