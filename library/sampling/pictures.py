"""Sample pictures as files: when they are due, what they are called, and how they are saved."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.files.atomic import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from library.sampling.prompts import SamplePrompt

logger = logging.getLogger(__name__)


class SampleTimes(Protocol):
    """The options that say when to draw; values <= 0 count as not set."""

    @property
    def sample_at_first(self) -> bool: ...
    @property
    def sample_every_n_steps(self) -> int | None: ...
    @property
    def sample_every_n_epochs(self) -> int | None: ...


def is_due(options: SampleTimes, *, step: int, epoch: int | None) -> bool:
    """Whether to draw now. ``step``: optimizer steps done; ``epoch``: its number at its end, 0 before training, else None.

    A number of epochs decides instead of a number of steps, as in the reference.
    """
    if step == 0:
        return options.sample_at_first
    every_epochs, every_steps = options.sample_every_n_epochs or 0, options.sample_every_n_steps or 0
    if every_epochs > 0:
        return epoch is not None and epoch % every_epochs == 0
    return every_steps > 0 and epoch is None and step % every_steps == 0


def picture_name(
    output_name: str | None, *, step: int, epoch: int | None, index: int, seed: int | None, now: time.struct_time
) -> str:
    """``NAME_e000002_00_20260131120000_42.png``; the step's six digits where no epoch is given, ``now`` in local time."""
    start = f"{output_name}_" if output_name is not None else ""
    number = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    end = f"_{seed}" if seed is not None else ""
    return f"{start}{number}_{index:02d}_{time.strftime('%Y%m%d%H%M%S', now)}{end}.png"


def save_picture(pixels: Tensor, path: Path, prompt: SamplePrompt | None = None) -> None:
    """Writes ``pixels`` (3, H, W) in [-1, 1] as a PNG, atomically; the prompt goes into its ``parameters`` text.

    Raises OutputError when the disk is full or the folder cannot be written. Values that are not finite become mid-grey
    and are reported: a broken sample must not end a training run.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if not pixels.isfinite().all():
        logger.warning("sample picture %s has values that are not numbers: shown in grey", path.name)
        pixels = pixels.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    levels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    about = PngInfo()
    if prompt is not None:
        about.add_text("parameters", parameters_text(prompt, *picture.size))
    write_atomically(path, lambda file: picture.save(file, "PNG", pnginfo=about))


def parameters_text(prompt: SamplePrompt, width: int, height: int) -> str:
    """Prompt and settings in the form that picture viewers for generated images read."""
    names = {"sample_steps": "Steps", "sample_sampler": "Sampler", "scale": "CFG scale", "seed": "Seed", "flow_shift": "Shift"}
    settings = prompt.settings()
    parts = [f"{label}: {settings[key]}" for key, label in names.items() if key in settings]
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    return "\n".join([*lines, ", ".join([*parts, f"Size: {width}x{height}"])])
