"""How long the training script takes to answer, and to its first step with warm caches."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from tools.bench_parts.figures import Figure, alternate
from tools.bench_parts.processes import checked, run_measured, script
from tools.bench_parts.tiny_run import CACHED_ON_DISK, make_tiny_run

ANSWER_S, START_RATIO = 0.5, 1.5  # targets
USER_ERROR = 2  # exit status for a mistake in the flags
ANSWERS = (("--help", "--help", 0), ("a mistyped flag", "--learning_rat=1", USER_ERROR))
IMPORTS = "import torch, transformers, accelerate"
MODEL_IMPORTS = f"{IMPORTS}; from transformers import Qwen3Model"  # transformers imports a model when it is named


def measure(repeats: int) -> list[Figure]:
    return [*answers(repeats), *first_step(repeats)]


def answers(repeats: int) -> list[Figure]:
    """Seconds of CPU of ``--help`` and of a mistyped flag."""
    found = []
    for name, flag, status in ANSWERS:
        bare = [checked(run_measured([sys.executable, "-c", "0"])).cpu_s for _ in range(repeats)]
        used = [checked(run_measured(script(flag)), status=status).cpu_s for _ in range(repeats)]
        how = f"{min(used):.2g} to {max(used):.2g} s in {repeats} calls; Python alone {median(bare):.2g} s"
        found.append(Figure(name=f"startup: {name}", value=median(used), unit="s CPU", at_most=ANSWER_S, how=how))
    return found


def first_step(repeats: int) -> list[Figure]:
    """Wall time until the LoRA of a one-step run is saved, over that of importing the libraries that a trainer needs."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_tiny_run(Path(folder))
        command = script(*run.flags, *CACHED_ON_DISK, "--max_train_steps=1")
        checked(run_measured(command))  # fills the caches
        start = until("saved ", command)
        found = []
        for name, statement, limit in (("imports", IMPORTS, START_RATIO), ("imports with Qwen3Model", MODEL_IMPORTS, None)):
            imports = until("done", [sys.executable, "-c", f"{statement}; print('done')"])
            turns = repeats if limit else min(repeats, 2)
            pairs = alternate(start, imports, repeats=turns, warm_up=False)
            how = pairs.described("to the saved LoRA of one step", "imports")
            found.append(Figure(name=f"startup: first step / {name}", value=pairs.ratio, unit="x", at_most=limit, how=how))
        return found


def until(line: str, command: Sequence[str]) -> Callable[[], float]:
    """A measurement: seconds from the start of ``command`` until it prints a line that begins so."""

    def measured() -> float:
        usage = checked(run_measured(command, awaited=line))
        if usage.said_s is None:
            raise RuntimeError(f"a measured process never said {line!r}:\n{usage.output[-3000:]}")
        return usage.said_s

    return measured
