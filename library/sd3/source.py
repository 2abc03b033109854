"""Where the parts of an SD3 model are: in the checkpoint, which may bundle text encoders and VAE, or in files of their own.

Needs no torch, except for pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from library.errors import CheckpointError
from library.files.model_path import CLIP, SD3, SD3_DIFFUSERS, T5, described, find_model_file, recognise_keys, with_article
from library.files.open_weights import open_weights
from library.files.weights_source import Part, WeightsSource
from library.sd.clip_layout import ALONE as PREFIXES_ALONE
from library.sd.clip_layout import ClipConfig, clip_part
from library.sd.source import INDEX_FILE, MODEL_FLAG, is_remote
from library.sd3.layout import MmditConfig, Sd3TextParts, mmdit_part, mmdit_prefix
from library.sd3.t5_layout import T5Config, t5_part

Sizes = TypeVar("Sizes")

PUBLISHED_WIDTHS = {768: "CLIP-L", 1280: "CLIP-G"}
SINGLE_FILE = "give its single-file checkpoint (such as sd3.5_medium.safetensors)"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderPlace:
    """Where one of the text encoders is looked for."""

    name: str  # as people call it
    flag: str
    kind: str  # as ``recognise_keys`` calls it
    bundled: str  # what its names begin with in a checkpoint of several models; else no prefix, or that of ALONE


CLIP_L = EncoderPlace(name="CLIP-L", flag="--clip_l", kind=CLIP, bundled="text_encoders.clip_l.transformer.")
CLIP_G = EncoderPlace(name="CLIP-G", flag="--clip_g", kind=CLIP, bundled="text_encoders.clip_g.transformer.")
T5XXL = EncoderPlace(name="T5-XXL", flag="--t5xxl", kind=T5, bundled="text_encoders.t5xxl.transformer.")


def find_checkpoint(value: str | None) -> WeightsSource:
    """The file that --pretrained_model_name_or_path names. Raises CheckpointError, also for other models than SD3."""
    if value and is_remote(value):
        raise CheckpointError(f"{MODEL_FLAG} {value} is a repository on the hub; SD3 is read from one file: {SINGLE_FILE}")
    if value and (Path(value) / INDEX_FILE).is_file():
        raise CheckpointError(f"{MODEL_FLAG} {value} is a diffusers folder; SD3 is read from one file: {SINGLE_FILE}")
    path = find_model_file(MODEL_FLAG, value, SD3)
    source = open_weights(path, flag=MODEL_FLAG)
    kind = recognise_keys(source.shapes)
    if kind == SD3_DIFFUSERS:
        raise CheckpointError(f"{MODEL_FLAG} {path} is {with_article(kind)}: {SINGLE_FILE}")
    if kind not in (None, SD3):
        raise CheckpointError(f"{MODEL_FLAG} {path} is {described(str(kind))}, not {with_article(SD3)}; give it that")
    return source


def denoiser_part(checkpoint: WeightsSource) -> Part[MmditConfig]:
    """Raises CheckpointError where the checkpoint has no MMDiT, or not a whole one."""
    prefix = mmdit_prefix(checkpoint.shapes)
    if prefix is None:
        some = next(iter(checkpoint.shapes), None)
        raise CheckpointError(
            f"{MODEL_FLAG} {checkpoint.path} is not {with_article(SD3)}: none of its {len(checkpoint.shapes):,} keys is known"
            f"{f', for example {some}' if some else ''}"
        )
    return _flagged(MODEL_FLAG, lambda: mmdit_part(checkpoint, prefix=prefix))


def clip_encoder(place: EncoderPlace, value: str | None, checkpoint: WeightsSource | None) -> Part[ClipConfig]:
    """The CLIP that the place's flag names, else the one in the checkpoint. Raises CheckpointError where there is none."""
    found = _find(place, value, checkpoint)
    if found is None:
        whose = "" if checkpoint is None else f", and {checkpoint.path} holds none ({place.bundled}*)"
        raise CheckpointError(f"{place.flag} is missing: give the file of the {place.name} text encoder{whose}")
    source, prefix = found
    return _flagged(place.flag if value else MODEL_FLAG, lambda: clip_part(source, prefix=prefix, layout="hf"))


def t5_encoder(value: str | None, checkpoint: WeightsSource | None) -> Part[T5Config] | None:
    """The T5 that --t5xxl names, else the one in the checkpoint; None where there is none. Raises CheckpointError."""
    found = _find(T5XXL, value, checkpoint)
    if found is None:
        return None
    source, prefix = found
    return _flagged(T5XXL.flag if value else MODEL_FLAG, lambda: t5_part(source, prefix=prefix))


def has_t5(value: str | None, checkpoint: str | None) -> bool:
    """Whether a run with these values of --t5xxl and --pretrained_model_name_or_path has a T5, as far as files can be read."""
    if value:
        return True
    try:
        return bool(checkpoint) and _has(find_checkpoint(checkpoint), T5XXL.bundled)
    except CheckpointError:  # told where the files are checked
        return False


def _find(place: EncoderPlace, value: str | None, checkpoint: WeightsSource | None) -> tuple[WeightsSource, str] | None:
    """The file, and what the encoder's names begin with in it."""
    if not value:
        return (checkpoint, place.bundled) if checkpoint is not None and _has(checkpoint, place.bundled) else None
    path = find_model_file(place.flag, value, f"{place.name} text encoder", allow_folder=True)
    source = open_weights(path, flag=place.flag)
    if _has(source, place.bundled):
        return source, place.bundled
    kind = recognise_keys(source.shapes)
    if kind not in (None, place.kind):
        raise CheckpointError(
            f"{place.flag} {path} is {described(str(kind))}, not a {place.name} text encoder; give {place.flag} the file of that"
        )
    return source, next((prefix for prefix in PREFIXES_ALONE if prefix and _has(source, prefix)), "")


def _has(source: WeightsSource, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in source.shapes)


def _flagged(flag: str, read: Callable[[], Part[Sizes]]) -> Part[Sizes]:
    """What ``read`` gives, its errors beginning with the flag."""
    try:
        return read()
    except CheckpointError as error:
        raise CheckpointError(*(f"{flag} {problem}" for problem in error.problems)) from error


# ---------------------------------------------------------------- parts that do not fit together


def encoder_problems(text: Sd3TextParts) -> Iterator[str]:
    """CLIPs that stand in each other's flag: CLIP-L is the narrower one."""
    low, high = text.clip_l, text.clip_g
    if low.config.width > high.config.width:
        yield (
            f"--clip_l {low.source.path} is a CLIP-G and --clip_g {high.source.path} a CLIP-L, by their widths of "
            f"{low.config.width} and {high.config.width}: exchange them"
        )
    elif low.config.width == high.config.width:
        yield _same_width_problem(low, high)
    elif high.config.projection is None:
        yield (
            f"--clip_g {high.source.path} has no text_projection.weight, which SD3 needs; give the clip_g file that was "
            "published for SD3"
        )


def _same_width_problem(low: Part[ClipConfig], high: Part[ClipConfig]) -> str:
    """Of two CLIPs that are one and the same model, or as wide as each other."""
    width = low.config.width
    if (name := PUBLISHED_WIDTHS.get(width)) is None:
        return (
            f"--clip_l {low.source.path} and --clip_g {high.source.path} are both {width} wide, and CLIP-L is the narrower one: "
            "give each its own file"
        )
    flag, part, wanted = ("--clip_g", high, "CLIP-G") if name == "CLIP-L" else ("--clip_l", low, "CLIP-L")
    return f"{flag} {part.source.path} is a {name}, not a {wanted}; give {flag} that one"


def width_problems(denoiser: Part[MmditConfig], text: Sd3TextParts) -> Iterator[str]:
    """Text encoders of other widths than the model was trained with."""
    config, name = denoiser.config, denoiser.source.path
    widths = text.clip_l.config.width, text.clip_g.config.width
    pooled = pooled_width(text)
    if pooled != config.pooled_width or sum(widths) > config.context_width:
        yield (
            f"{MODEL_FLAG} {name} takes a pooled text of {config.pooled_width} values and states of {config.context_width}; "
            f"CLIP-L ({text.clip_l.source.path}) and CLIP-G ({text.clip_g.source.path}) give {pooled} and {sum(widths)}: give "
            "--clip_l and --clip_g the encoders that belong to SD3"
        )
    if text.t5 is not None and text.t5.config.width != config.context_width:
        yield (
            f"{MODEL_FLAG} {name} takes text of width {config.context_width}, T5 ({text.t5.source.path}) gives "
            f"{text.t5.config.width}: give --t5xxl the T5-XXL v1.1 encoder"
        )


def pooled_width(text: Sd3TextParts) -> int:
    """Of both CLIPs; without a projection the pooled vector is as wide as the states."""
    configs: tuple[Any, ...] = (text.clip_l.config, text.clip_g.config)
    return sum(config.projection or config.width for config in configs)
