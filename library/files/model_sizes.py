"""Sizes of a model, read off the names and shapes of its tensors and its config. Needs no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from library.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

FP8_SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8")  # ends of names; ComfyUI's


def block_count(shapes: Shapes, prefix: str) -> int:
    """Of blocks whose tensors are called ``prefix`` + number + a dot."""
    numbers = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in shapes)
    return 1 + max((int(match.group(1)) for match in numbers if match), default=0)


def usual_side(shapes: Shapes, pattern: str, axis: int, published: int) -> int:
    """The side on ``axis`` that most tensors of that name have; ``published`` when none is there."""
    sides = Counter(shape[axis] for name, shape in shapes.items() if len(shape) > axis and re.fullmatch(pattern, name))
    return sides.most_common(1)[0][0] if sides else published


def positive(settings: Mapping[str, Any], name: str, published: float) -> float:
    """The number that a model's config says, else the published one. Raises CheckpointError for what is none, or not above 0."""
    value = settings.get(name, published)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"the model's config says {name} = {value!r}; give a positive number (published: {published})")
    return float(value)


def scaled_float8_problem(names: Iterable[str]) -> str:
    """Empty where no weight has a scale beside it. Plain float8 files have none, and are read."""
    scales = [name for name in names if name.endswith(FP8_SCALES)]
    if not scales:
        return ""
    return (
        f"its weights are float8 with scales of their own ({len(scales):,} of them, such as {scales[0]}), which is not read; "
        "give the bfloat16 or float16 file, whose weights can be kept in 8 bits, too (--fp8_base; for pictures --fp8_scaled)"
    )
