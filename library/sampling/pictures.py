"""Pictures as files: when samples are due, what they are called, how they are saved, and what is written into them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.files.atomic import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from library.sampling.picture_plan import Picture

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


def no_picture_warning(options: SampleTimes, steps: range, epochs: range) -> Iterator[str]:
    """One where no picture is due in a run that ends the (1-based) ``steps`` and ``epochs``, though there are times for them."""
    every_epochs, every_steps = options.sample_every_n_epochs or 0, options.sample_every_n_steps or 0
    if options.sample_at_first and steps.start == 1:
        return
    flag, every, what, ended = "--sample_every_n_steps", every_steps, "steps", steps
    if every_epochs > 0:
        flag, every, what, ended = "--sample_every_n_epochs", every_epochs, "epochs", epochs
    if every > 0 and (ended.stop - 1) // every == (ended.start - 1) // every:
        yield (
            f"no picture will be drawn: {flag} is {every:,}, and this run ends {what} {ended.start:,} to {ended.stop - 1:,}: "
            "give a smaller number"
        )


def picture_name(
    output_name: str | None, *, step: int, epoch: int | None, index: int, seed: int | None, now: time.struct_time
) -> str:
    """``NAME_e000002_00_20260131120000_42.png``; the step's six digits where no epoch is given, ``now`` in local time."""
    start = f"{output_name}_" if output_name is not None else ""
    number = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    end = f"_{seed}" if seed is not None else ""
    return f"{start}{number}_{index:02d}_{time.strftime('%Y%m%d%H%M%S', now)}{end}.png"


def save_picture(pixels: Tensor, path: Path, parameters: str | None = None) -> None:
    """Writes ``pixels`` (3, H, W) in [-1, 1] as a PNG, atomically, with ``parameters`` as its text of that name.

    Raises OutputError when the disk is full or the folder cannot be written. Values that are not finite become mid-grey
    and are reported: a broken sample must not end a training run.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if not pixels.isfinite().all():
        logger.warning("picture %s has values that are not numbers: shown in grey", path.name)
        pixels = pixels.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    levels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    about = PngInfo()
    if parameters is not None:
        about.add_text("parameters", parameters)
    write_atomically(path, lambda file: picture.save(file, "PNG", pnginfo=about))


def picture_parameters(picture: Picture, about: Mapping[str, str]) -> str:
    """The text for a picture: the settings that it was drawn with, given or not. ``about``: the models, as label -> name."""
    settings: dict[str, object] = {
        "Steps": picture.steps,
        "Sampler": picture.sampler,
        "CFG scale": f"{picture.scale:g}",
        "Seed": picture.seed,
        **({} if picture.shift is None else {"Shift": f"{picture.shift:g}"}),
        **({} if picture.cfg_trunc_ratio is None else {"CFG trunc ratio": f"{picture.cfg_trunc_ratio:g}"}),
        **({} if picture.renorm_cfg is None else {"CFG renorm": f"{picture.renorm_cfg:g}"}),
        "Size": f"{picture.width}x{picture.height}",
        **({} if picture.prompt2 is None else {"Prompt 2": picture.prompt2}),
    }
    return parameters_text(picture.prompt, picture.negative_prompt if picture.is_guided else None, {**settings, **about})


def parameters_text(prompt: str, negative_prompt: str | None, settings: Mapping[str, object]) -> str:
    """Prompt and settings in the form that picture viewers for generated images read."""
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{label}: {_quoted(str(value))}" for label, value in settings.items())])


def _quoted(value: str) -> str:
    """In quotes where a reader would take a comma or a colon for the value's end."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def free_stem(folder: Path, stem: str, endings: Iterable[str]) -> str:
    """``stem``, or with -2, -3, ... behind it: with none of ``endings`` it is a name that is taken in ``folder``."""
    endings = tuple(endings)
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 10**6))
    return next(name for name in names if not any((folder / f"{name}{ending}").exists() for ending in endings))


def dated_stem(number: int | str, moment: float) -> str:
    """``20260131-090507-123_42``: local time of ``moment`` (seconds since 1970) with its milliseconds, and a seed or a name."""
    seconds = time.strftime("%Y%m%d-%H%M%S", time.localtime(moment))
    return f"{seconds}-{int(moment * 1000) % 1000:03d}_{number}"
