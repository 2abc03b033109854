"""How long a run is, and with which numbers it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least

PRECISION_DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # --mixed_precision -> torch's name
SEED_LIMIT = 2**32  # what numpy and the reference take


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Run: length, seed and precision."""

    dry_run: bool = opt(False, "check everything that can be checked without loading a model, print the plan, and stop")
    deterministic: bool = opt(False, "use GPU kernels that give the same bits in every run; slower on a GPU, no change on a CPU")
    seed: int | None = opt(None, "random seed, 0 to 4294967295 (not set = a random one, which the plan shows)")
    max_train_steps: int = opt(1600, "optimizer steps to train; ignored when --max_train_epochs is given")
    max_train_epochs: int | None = opt(None, "epochs to train; decides instead of --max_train_steps (not set = count steps)")
    gradient_accumulation_steps: int = opt(1, "batches whose gradients make one optimizer step (1 = each batch is a step)")
    mixed_precision: str = opt(
        "no", "number format of the frozen model and of the computation (no = float32)", choices=tuple(PRECISION_DTYPES)
    )
    full_fp16: bool = opt(False, "keep the trained weights and gradients in fp16 too; needs --mixed_precision=fp16")
    full_bf16: bool = opt(False, "keep the trained weights and gradients in bf16 too; needs --mixed_precision=bf16")

    @property
    def weight_dtype(self) -> str:
        """Number format of the frozen models, as torch names it."""
        return PRECISION_DTYPES[self.mixed_precision]

    def problems(self) -> Iterator[str]:
        if self.seed is not None and not 0 <= self.seed < SEED_LIMIT:
            yield f"--seed is {self.seed}: give a whole number from 0 to {SEED_LIMIT - 1}"
        yield from at_least(self, 1, "max_train_steps", "max_train_epochs", "gradient_accumulation_steps")
        if self.full_fp16 and self.full_bf16:
            yield "--full_fp16 cannot be combined with --full_bf16: drop one of them"
            return
        for name in ("fp16", "bf16"):
            if getattr(self, f"full_{name}") and self.mixed_precision != name:
                yield f"--full_{name} needs --mixed_precision={name}, not {self.mixed_precision}: set it, or drop --full_{name}"
