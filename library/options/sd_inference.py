"""Options of sd_minimal_inference.py and sdxl_minimal_inference.py. Names and defaults are those of the script of that name in
kohya-ss/sd-scripts, and where that has none, those of anima_minimal_inference.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.files.user_path import user_path
from library.options.attention import AttentionOptions
from library.options.console import ConsoleOptions
from library.options.declare import opt
from library.options.inference import DeviceOptions, InferenceRules, MergeOptions, OutputOptions, SizePromptOptions
from library.options.rules import at_least
from library.options.samples import SAMPLERS
from library.options.sd import CHUNK_TOKENS

USUAL_PROMPT = "A photo of a cat"  # the reference draws it where nothing else is asked for
STRENGTH_MARK = ";"  # between a LoRA file and its strength


@dataclass(frozen=True, slots=True, kw_only=True)
class SdxlFileOptions:
    """Model: the files of the model, and how it was trained."""

    ckpt_path: str | None = opt(
        None, "model: a .safetensors or .ckpt file, a diffusers folder, or OWNER/NAME of one on the hub", path=True
    )
    v_parameterization: bool = opt(False, "the model predicts velocity; needed only where nothing in its files says so")
    vae: str | None = opt(
        None, "another image coder (VAE): a file, a diffusers folder or OWNER/NAME (not set = the one of the model)", path=True
    )
    no_half_vae: bool = opt(False, "run the VAE in float32 whatever --mixed_precision says; cures black pictures")
    max_token_length: int | None = opt(
        None,
        "CLIP tokens of a prompt that count; the rest is cut off (not set = 75)",
        choices=(2 * CHUNK_TOKENS, 3 * CHUNK_TOKENS, CHUNK_TOKENS),
    )

    def problems(self) -> Iterator[str]:
        if not self.ckpt_path:
            yield "--ckpt_path is missing: name the model"


@dataclass(frozen=True, slots=True, kw_only=True)
class SdFileOptions:
    """Model: the files of the model, and how it was trained."""

    ckpt_path: str | None = opt(
        None, "model: a .safetensors or .ckpt file, a diffusers folder, or OWNER/NAME of one on the hub", path=True
    )
    v2: bool = opt(False, "the model is Stable Diffusion 2.x")
    v_parameterization: bool = opt(False, "the model predicts velocity; needed only where nothing in its files says so")
    clip_skip: int | None = opt(
        None, "take the text states of the N-th layer of CLIP counted from the end (not set = 1, the last)"
    )
    vae: str | None = opt(
        None, "another image coder (VAE): a file, a diffusers folder or OWNER/NAME (not set = the one of the model)", path=True
    )
    no_half_vae: bool = opt(False, "run the VAE in float32 whatever --mixed_precision says; cures black pictures")

    def problems(self) -> Iterator[str]:
        if not self.ckpt_path:
            yield "--ckpt_path is missing: name the model"
        yield from at_least(self, 1, "clip_skip")


@dataclass(frozen=True, slots=True, kw_only=True)
class SdMergeOptions(MergeOptions):
    """LoRA: files that are merged into the model before it draws, one after the other."""

    FLAG: ClassVar[str] = "--lora_weights"

    lora_weights: list[str] | None = opt(
        None, "LoRA files for the U-Net, the text encoders or both, any layout; FILE or 'FILE;STRENGTH' (not set = 1)"
    )

    @property
    def files(self) -> list[tuple[str, float]]:
        """(path, multiplier) of each file."""
        return [(path, 1.0 if strength is None else strength) for path, strength in map(split_strength, self.lora_weights or ())]

    def problems(self) -> Iterator[str]:
        for written in self.lora_weights or ():
            path, strength = split_strength(written)
            if strength is None and STRENGTH_MARK in written:
                yield f"--lora_weights {written!r}: write FILE;STRENGTH, with a number behind the semicolon"
            elif not path:
                yield f"--lora_weights {written!r} names no file: write FILE or FILE;STRENGTH"
        yield from MergeOptions.problems(self)


def split_strength(written: str) -> tuple[str, float | None]:
    """``"lora.safetensors;0.8"`` -> path and strength; None without one, or where it is no finite number."""
    path, mark, text = written.rpartition(STRENGTH_MARK)
    if not mark:
        return user_path(written), None
    try:
        strength = float(text)
    except ValueError:
        return user_path(path), None
    return user_path(path), strength if math.isfinite(strength) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SdPromptOptions(SizePromptOptions):
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures."""

    USUAL_PROMPT: ClassVar[str | None] = USUAL_PROMPT

    prompt: str | None = opt(USUAL_PROMPT, 'what the picture shows; "" draws one without a prompt', may_be_empty=True)
    image_size: list[int] = opt((512, 512), "height and width in pixels, rounded down to multiples of 8")
    sampler: str = opt("euler", "way from noise to picture", choices=SAMPLERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SdxlPromptOptions(SdPromptOptions):
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures."""

    prompt2: str | None = opt(None, "another text for the second text encoder, CLIP-G (not set = the prompt)", may_be_empty=True)
    image_size: list[int] = opt((1024, 1024), "height and width in pixels, rounded down to multiples of 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class SdOutputOptions(OutputOptions):
    """Output: what is written. Names are image_DATE-TIME_NUMBER.png and ..._latent.safetensors; nothing is overwritten."""

    FOLDER_FLAG: ClassVar[str] = "--output_dir"

    output_dir: str = opt(".", "folder for the files; made if missing", path=True)

    @property
    def folder(self) -> str:
        """For the files; made if missing."""
        return self.output_dir


@dataclass(frozen=True, kw_only=True)
class SdInferenceOptions(InferenceRules):
    """All options of sd_minimal_inference.py, in groups."""

    files: SdFileOptions = field(default_factory=SdFileOptions)
    prompts: SdPromptOptions = field(default_factory=SdPromptOptions)
    loras: SdMergeOptions = field(default_factory=SdMergeOptions)
    output: SdOutputOptions = field(default_factory=SdOutputOptions)
    compute: DeviceOptions = field(default_factory=DeviceOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


@dataclass(frozen=True, kw_only=True)
class SdxlInferenceOptions(InferenceRules):
    """All options of sdxl_minimal_inference.py, in groups."""

    files: SdxlFileOptions = field(default_factory=SdxlFileOptions)
    prompts: SdxlPromptOptions = field(default_factory=SdxlPromptOptions)
    loras: SdMergeOptions = field(default_factory=SdMergeOptions)
    output: SdOutputOptions = field(default_factory=SdOutputOptions)
    compute: DeviceOptions = field(default_factory=DeviceOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)

    def problems(self) -> Iterator[str]:
        yield from InferenceRules.problems(self)
        if self.prompts.prompt2 is not None and (self.output.latent_path or self.prompts.interactive):
            yield "--prompt2 goes with --prompt or --from_file: drop it, or write --p2 TEXT behind a typed prompt"
