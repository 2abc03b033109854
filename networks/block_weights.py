"""Ranks, alphas and learning-rate factors for each block of a U-Net: their arguments, and which block a module belongs to.

A U-Net's blocks are counted from the picture's side down to the middle and up again: 25 for Stable Diffusion 1.x and 2.x
(12 down, 1 middle, 12 up), 23 for SDXL (the embedding of time and sizes, 9 down, 3 middle, 9 up, the output).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from library.errors import did_you_mean
from networks.arguments import NetworkArguments, argument, parse_number


@dataclass(frozen=True, kw_only=True)
class BlockCount:
    """How many blocks a U-Net has, in their order. ``before`` and ``after``: without a factor of their own."""

    before: int = 0
    down: int
    middle: int
    up: int
    after: int = 0

    @property
    def total(self) -> int:
        return self.before + self.down + self.middle + self.up + self.after

    def __str__(self) -> str:
        sides = f"{self.down} down, {self.middle} middle, {self.up} up"
        return f"{sides} and {self.before + self.after} around them" if self.before else sides


SD_BLOCKS = BlockCount(down=12, middle=1, up=12)
SDXL_BLOCKS = BlockCount(before=1, down=9, middle=3, up=9, after=1)


def sd_block(path: str) -> int | None:
    """The block of a module of Stable Diffusion 1.x and 2.x, by diffusers' path. 0, the first convolution, has no LoRA."""
    match = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if match is None:
        return None
    if match[1] == "mid":
        return SD_BLOCKS.down
    layer = int(match[4]) if match[3] in ("resnets", "attentions") else 2  # the way between two levels is the last of three
    return (1 if match[1] == "down" else SD_BLOCKS.down + 1) + 3 * int(match[2]) + layer


def sdxl_block(path: str) -> int | None:
    """The same for SDXL, by the original checkpoint's path."""
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", path)
    firsts = {"input_blocks": 1, "middle_block": 1 + SDXL_BLOCKS.down, "output_blocks": 1 + SDXL_BLOCKS.down + SDXL_BLOCKS.middle}
    return firsts[match[1]] + int(match[2]) if match else None


# ---------------------------------------------------------------- learning-rate factors


class Curve(NamedTuple):
    name: str
    offset: float = 0.0

    def values(self, count: int) -> list[float]:
        return [value + self.offset for value in CURVES[self.name](count)]


def _line(count: int) -> list[float]:
    return [place / max(count - 1, 1) for place in range(count)]


def _sine(count: int) -> list[float]:
    return [math.sin(math.pi / 2 * place) for place in _line(count)]


CURVES: dict[str, Callable[[int], list[float]]] = {
    "cosine": lambda count: _sine(count)[::-1],
    "sine": _sine,
    "linear": _line,
    "reverse_linear": lambda count: _line(count)[::-1],
    "zeros": lambda count: [0.0] * count,
}
Factors = Curve | tuple[float, ...]
CURVE_NAMES = ", ".join(CURVES)


def parse_factors(value: Any) -> Factors:
    """A list with commas, in which an empty place is 0, or the name of a curve, with ``+`` and what is added to each value."""
    text = str(value).strip()
    if "," in text:
        return parse_factor_list(text)
    name, plus, offset = text.partition("+")
    if name.strip() in CURVES:
        return Curve(name.strip(), parse_amount(offset) if plus else 0.0)
    try:
        number = float(text)
    except ValueError:
        raise ValueError(
            f"give numbers with commas between them, or one of {CURVE_NAMES}, such as linear or linear+0.25"
            f"{did_you_mean(name.strip(), CURVES)}"
        ) from None
    raise ValueError(
        f"one number is no list: give one for each block, with commas between them, or zeros+{number:g} for {number:g} in all"
    )


def parse_factor_list(value: Any) -> tuple[float, ...]:
    return tuple(parse_amount(part) if part.strip() else 0.0 for part in str(value).split(","))


def parse_amount(value: Any) -> float:
    number = parse_number(value, float)
    if not 0.0 <= number < math.inf:
        raise ValueError("give numbers from 0 on")
    return number


# ---------------------------------------------------------------- ranks and alphas


def parse_rank(value: Any) -> int:
    number = parse_number(value, int)
    if number < 0:
        raise ValueError("give a rank: a whole number, 0 or more")
    return number


def parse_rank_list(value: Any) -> tuple[int, ...]:
    try:
        return tuple(parse_rank(part) for part in str(value).split(","))
    except ValueError:
        raise ValueError("give whole numbers from 0 on, one for each block, with commas between them") from None


def parse_ranks_of(names: Sequence[str]) -> Callable[[Any], tuple[int, ...]]:
    """Reads one rank for each of ``names``, in brackets or without: ``[4,4,4]``, ``4,0,8``."""
    example = f"[{','.join('4' for _ in names)}]"

    def parse(value: Any) -> tuple[int, ...]:
        text = str(value).strip()
        text = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
        parts = text.split(",") if text.strip() else []
        if len(parts) != len(names):
            raise ValueError(
                f"it has {len(parts)} value{'' if len(parts) == 1 else 's'}: give {len(names)} ranks, for "
                f"{', '.join(names[:-1])} and {names[-1]}, such as {example}; 0 leaves one out"
            )
        try:
            return tuple(parse_rank(part) for part in parts)
        except ValueError:
            raise ValueError(f"give whole numbers from 0 on, such as {example}; 0 leaves one out") from None

    return parse


def parse_alpha_list(value: Any) -> tuple[float, ...]:
    try:
        return tuple(parse_amount(part) for part in str(value).split(","))
    except ValueError:
        raise ValueError("give numbers from 0 on, one for each block, with commas between them") from None


SIZE_LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
FACTORS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


@dataclass(frozen=True, kw_only=True)
class BlockArguments(NetworkArguments):
    """The arguments of U-Nets whose blocks are counted. Where network_reg_dims and network_reg_lrs match, they override these."""

    BLOCKS: ClassVar[BlockCount]
    SELECTING: ClassVar[tuple[str, ...]] = (*NetworkArguments.SELECTING, "conv_dim", "conv_alpha", *SIZE_LISTS)

    conv_dim: int | None = argument(parse_rank, "rank of 3x3 convolutions, which otherwise have no LoRA")
    conv_alpha: float | None = argument(parse_amount, "alpha of 3x3 convolutions (not given = 1)")
    block_dims: tuple[int, ...] = argument(parse_rank_list, "rank in each block of the U-Net, 0 = no LoRA", default=())
    block_alphas: tuple[float, ...] = argument(parse_alpha_list, "alpha in each block", default=())
    conv_block_dims: tuple[int, ...] = argument(parse_rank_list, "rank of 3x3 convolutions in each block", default=())
    conv_block_alphas: tuple[float, ...] = argument(parse_alpha_list, "alpha of 3x3 convolutions in each block", default=())
    down_lr_weight: Factors = argument(parse_factors, "factor of the learning rate in each block on the way down", default=())
    mid_lr_weight: tuple[float, ...] = argument(parse_factor_list, "the same in the middle", default=())
    up_lr_weight: Factors = argument(parse_factors, "the same on the way up", default=())
    block_lr_zero_threshold: float = argument(parse_amount, "factors up to this count as 0: no LoRA there", default=0.0)

    @property
    def has_convolutions(self) -> bool:
        return bool(self.conv_dim or any(self.conv_block_dims))

    def size_of(self, block: int | None, *, wide: bool, rank: int, alpha: float) -> tuple[int, float]:
        if block is None:
            return rank, alpha
        if wide and self.has_convolutions:
            rank, alpha = self.conv_dim or 0, 1.0 if self.conv_alpha is None else self.conv_alpha
        dims, alphas = (self.conv_block_dims, self.conv_block_alphas) if wide else (self.block_dims, self.block_alphas)
        return dims[block] if dims else rank, alphas[block] if alphas else alpha

    def block_factor(self, block: int | None) -> float | None:
        return None if block is None or self.factors is None else self.factors[block]

    @cached_property
    def factors(self) -> tuple[float, ...] | None:
        """Of each block; None where no factor is given."""
        if not any(getattr(self, name) != () for name in FACTORS):
            return None
        sides = (
            (self.down_lr_weight, self.BLOCKS.down),
            (self.mid_lr_weight, self.BLOCKS.middle),
            (self.up_lr_weight, self.BLOCKS.up),
        )
        inner = [value for given, count in sides for value in _values(given, count)]
        kept = [value if value > self.block_lr_zero_threshold else 0.0 for value in inner]
        return (*[1.0] * self.BLOCKS.before, *kept, *[1.0] * self.BLOCKS.after)

    def problems(self) -> Iterator[str]:
        total = self.BLOCKS.total
        for name in SIZE_LISTS:
            given = len(getattr(self, name))
            if given not in (0, total):
                yield (f"--network_args: {name} has {given} value{'s' if given > 1 else ''}, and this U-Net has {total} blocks "
                       f"({self.BLOCKS}): give {total}, with commas between them")  # fmt: skip

    def warnings(self) -> Iterator[str]:
        for name, count in zip(FACTORS, (self.BLOCKS.down, self.BLOCKS.middle, self.BLOCKS.up), strict=True):
            given = getattr(self, name)
            if given == () or isinstance(given, Curve) or len(given) == count:
                continue
            rest = "the rest is left out" if len(given) > count else "1 is taken for the others"
            yield f"{name} has {len(given)} values for {count} block{'s' if count > 1 else ''}: {rest}"
        if self.block_lr_zero_threshold and self.factors is None:
            yield f"block_lr_zero_threshold does nothing without {', '.join(FACTORS[:-1])} or {FACTORS[-1]}"
        if not self.has_convolutions:
            for name in ("conv_alpha", "conv_block_alphas"):
                if getattr(self, name) not in (None, ()):
                    yield f"{name} does nothing without conv_dim or conv_block_dims: 3x3 convolutions have no LoRA"


def _values(given: Factors, count: int) -> list[float]:
    """``count`` of them: a list that is too short goes on with 1, one that is too long is cut."""
    values = given.values(count) if isinstance(given, Curve) else list(given[:count])
    return values + [1.0] * (count - len(values))
