"""Writes tiny checkpoints in the layout of the real ones, for the quick start, the tests and the benchmark.

    python tools/make_tiny_models.py OUT_DIR [--size tiny|bench] [--seed 0] [--dtype bf16|fp32] [--qwen3_folder]

The weights are random, a pure function of the seed and the tensor's name, and scaled so that no layer is dead. The
autoencoder is the exception: its main path carries the colours of 8x8 pixel cells, so that samples look like something.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.tiny_anima import SIZES, make_anima


def main(argv: Sequence[str] | None = None) -> None:
    from library.errors import user_errors_end_the_script

    options = _parser().parse_args(argv)
    with user_errors_end_the_script():
        paths = make_anima(
            options.out_dir, size=options.size, seed=options.seed, dtype=options.dtype, qwen3_folder=options.qwen3_folder
        )
        for line in _report(paths):
            print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write tiny Anima checkpoints in the layout of the real ones.")
    parser.add_argument("out_dir", type=Path, help="folder for the checkpoints; made if missing")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="tiny: for tests; bench: wide enough to time")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="number format of the weights")
    parser.add_argument("--qwen3_folder", action="store_true", help="also write the text encoder as a Hugging Face folder")
    return parser


def _report(paths: dict[str, Path]) -> Iterator[str]:
    for role, path in paths.items():
        files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
        yield f"{role}: {path} ({sum(f.stat().st_size for f in files) / 1e6:.1f} MB)"


if __name__ == "__main__":
    main()
