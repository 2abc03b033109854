"""Measures what the project promises about speed and memory, and prints one table.

    python tools/bench.py [startup step lora lora_dit ...] [--repeats 5] [--threads 1]

Everything runs on the CPU, on tiny or random models made on the spot; ``gpu`` or ``gpu_dits``, if it is the only one named, on
the GPU. Where two things are compared, both are measured in turn in one run, and the median of the ratios is shown. With one
thread (the default) work inside this process counts in seconds of CPU, which other programs on the machine hardly change; with
more it counts by the clock, and the machine should be idle. The exit status is 0 whatever the figures are, and 1 when something
could not be measured.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench_parts.figures import Figure, table

PHASES = {
    "startup": "CPU of --help and of a mistyped flag; time to the first step with warm caches",
    "step": "the trainer's own work in a step of the tiny model",
    "lora": "what a LoRA adds to forward and backward of a DiT of width 1024",
    "lora_dit": "the same for the DiTs of Stable Diffusion 3 and Lumina Image 2.0",
    "unet": "what a LoRA adds to forward and backward of a quarter-width SDXL U-Net",
    "attention": "a step without the zero rows of the context, against one with them",
    "lumina_padding": "a step of Lumina with captions of unlike lengths, against its samples alone",
    "compile": "a step with --torch_compile, against a plain one",
    "load": "peak memory while checkpoints are loaded",
    "vae": "encoding an image, against diffusers",
    "cache": "a cold and a warm start",
    "fp8": "how far frozen weights in 8 bits move results, and what they take",
    "memory": "the bookkeeping of swapping blocks",
    "gpu": "a step of the real-size Anima and SDXL on a GPU, its share of the matrix peak, its memory",
    "gpu_dits": "the same of Stable Diffusion 3 and 3.5 and Lumina Image 2.0",
    "data": "the start of a set of 100,000 images, reading caches, decoding images",
}
ON_GPU = ("gpu", "gpu_dits", "compile")  # each only when it is the only one named


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a hub
    if len(options.phases) != 1 or options.phases[0] not in ON_GPU:
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["ACCELERATE_USE_CPU"] = "", "true"
    figures: list[Figure] = []
    failed = []
    for name in options.phases or list(PHASES):
        found = run_phase(name, repeats=options.repeats, threads=options.threads)
        figures += found or []
        failed += [name] if found is None else [figure.name for figure in found if math.isnan(figure.value)]
    print(f"\n{machine(options.threads)}\n\n{table(figures)}")
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure speed and memory.",
        epilog="phases: " + "; ".join(f"{name}: {text}" for name, text in PHASES.items()),
    )
    parser.add_argument("phases", type=phase_name, nargs="*", metavar="PHASE", help="what to measure (none named: everything)")
    parser.add_argument("--repeats", type=positive, default=5, help="how often each comparison is made")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch in this process")
    return parser


def phase_name(text: str) -> str:
    if text not in PHASES:
        raise argparse.ArgumentTypeError(f"{text!r} is no phase; choose from {', '.join(PHASES)}")
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def run_phase(name: str, *, repeats: int, threads: int) -> list[Figure] | None:
    """The figures of a phase; None, with the traceback on stderr, when it fails."""
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    print(f"{name}: {PHASES[name]} ...", file=sys.stderr, flush=True)
    try:
        figures = importlib.import_module(f"tools.bench_parts.{name}").measure(repeats)
    except (Exception, SystemExit):  # a phase that fails must not take the others' figures with it
        traceback.print_exc()
        return None
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return figures


def machine(threads: int) -> str:
    """What the numbers were taken on, and how busy it was."""
    import torch

    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    kind = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {load}"
    return f"{kind}; Python {platform.python_version()}, torch {torch.__version__}, threads: {threads}"


if __name__ == "__main__":
    sys.exit(main())
