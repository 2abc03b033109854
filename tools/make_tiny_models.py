"""Writes tiny checkpoints in the layout of the real ones, for the quick start, the tests and the benchmark.

    python tools/make_tiny_models.py OUT_DIR [--model anima|lumina|sd1|sd2|sdxl|sd3|...] [--size tiny|bench] [--seed 0]

``--qwen3_folder`` and ``--gemma2_folder`` add Anima's or Lumina's text encoder as a folder, ``--layouts`` says in which forms
Stable Diffusion 1, 2 and XL are written. The weights are random, a pure function of the seed and the tensor's name, and scaled
so that no layer is dead. Anima's autoencoder is the exception: its main path carries the colours of 8x8 pixel cells, so that
samples look like something.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.tiny_anima import SIZES, make_anima
from tools.tiny_lumina import SIZES as LUMINA_SIZES
from tools.tiny_lumina import make_lumina
from tools.tiny_sd import LAYOUTS, make_sd, report_lines
from tools.tiny_sd3 import KINDS as SD3_KINDS
from tools.tiny_sd3 import SIZES as SD3_SIZES
from tools.tiny_sd3 import make_sd3
from tools.tiny_sd_models import MODELS

# model -> what it can be written as; the first is the default
DTYPES = {
    "anima": ("bf16", "fp32"),
    "lumina": ("bf16", "fp16", "fp32"),
    **dict.fromkeys((*MODELS, *SD3_KINDS), ("fp16", "bf16", "fp32")),
}
MODEL_SIZES: dict[str, Collection[str]] = {
    "anima": SIZES,
    "lumina": LUMINA_SIZES,
    **MODELS,
    **dict.fromkeys(SD3_KINDS, SD3_SIZES),
}


def main(argv: Sequence[str] | None = None) -> None:
    from library.errors import user_errors_end_the_script

    options = _parser().parse_args(argv)
    with user_errors_end_the_script():
        for line in report_lines(_made(options)):
            print(line)


def _made(options: argparse.Namespace) -> dict[str, Path]:
    from library.errors import OptionError

    dtype = options.dtype or DTYPES[options.model][0]
    sizes = MODEL_SIZES[options.model]
    for flag, value, allowed in (("--dtype", dtype, DTYPES[options.model]), ("--size", options.size, sizes)):
        if value not in allowed:
            raise OptionError(f"{flag} {value} is not there for {options.model}: give one of {', '.join(allowed)}")
    shared = {"size": options.size, "seed": options.seed, "dtype": dtype}
    if options.model == "anima":
        return make_anima(options.out_dir, qwen3_folder=options.qwen3_folder, **shared)
    if options.model == "lumina":
        return make_lumina(options.out_dir, gemma2_folder=options.gemma2_folder, **shared)
    if options.model in SD3_KINDS:
        return make_sd3(options.out_dir, options.model, **shared)
    return make_sd(options.out_dir, options.model, layouts=options.layouts, v_prediction=options.v_prediction, **shared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write tiny checkpoints in the layout of the real ones.")
    parser.add_argument("out_dir", type=Path, help="folder for the checkpoints; made if missing")
    parser.add_argument("--model", choices=tuple(MODEL_SIZES), default="anima", help="which model")
    parser.add_argument("--size", default="tiny", help="tiny: for tests; bench: wide enough to time; deep: SDXL's real depth")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="number format of the weights (fp16; Anima, Lumina: bf16)"
    )
    parser.add_argument("--qwen3_folder", action="store_true", help="also write Anima's text encoder as a Hugging Face folder")
    parser.add_argument("--gemma2_folder", action="store_true", help="also write Lumina's text encoder as a Hugging Face folder")
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=["file"], help="forms of Stable Diffusion 1, 2, XL to write"
    )
    parser.add_argument("--v_prediction", action="store_true", help="mark Stable Diffusion as a model that predicts velocity")
    return parser


if __name__ == "__main__":
    main()
