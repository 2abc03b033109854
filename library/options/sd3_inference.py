"""Options of sd3_minimal_inference.py. Names and defaults are those of kohya-ss/sd-scripts where it has the option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.options.attention import AttentionOptions
from library.options.console import ConsoleOptions
from library.options.declare import opt
from library.options.flow_inference import FlowMergeOptions, StepPromptOptions
from library.options.inference import DeviceOptions, InferenceRules
from library.options.rules import above_zero, at_least
from library.options.sd_inference import USUAL_PROMPT, SdOutputOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3FileOptions:
    """Model: the files of the model, and how its text encoders read a prompt."""

    ckpt_path: str | None = opt(None, "model: a .safetensors file of SD 3 or 3.5, with or without its other parts", path=True)
    clip_l: str | None = opt(None, "file of the text encoder CLIP-L (not set = the one inside the model's file)", path=True)
    clip_g: str | None = opt(None, "file of the text encoder CLIP-G (not set = the one inside the model's file)", path=True)
    t5xxl: str | None = opt(
        None,
        "file of the text encoder T5-XXL (not set = the one inside the model's file, or none: zeros take its place)",
        path=True,
    )
    vae: str | None = opt(None, "file of the image coder (VAE) (not set = the one inside the model's file)", path=True)
    t5xxl_token_length: int = opt(256, "T5 tokens of a prompt that count; the rest is cut off")
    apply_lg_attn_mask: bool = opt(False, "hide the padding of a prompt from CLIP-L and CLIP-G; as the LoRA was trained")
    apply_t5_attn_mask: bool = opt(False, "hide the padding of a prompt from T5-XXL; as the LoRA was trained")
    no_half_vae: bool = opt(False, "run the VAE in float32 whatever --mixed_precision says; cures black pictures")

    def problems(self) -> Iterator[str]:
        if not self.ckpt_path:
            yield "--ckpt_path is missing: name the model"
        yield from at_least(self, 1, "t5xxl_token_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3PromptOptions(StepPromptOptions):
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures."""

    USUAL_PROMPT: ClassVar[str | None] = USUAL_PROMPT
    SCALE_NAME: ClassVar[str] = "cfg_scale"
    SIDE_NAMES: ClassVar[tuple[str, str]] = ("height", "width")

    prompt: str | None = opt(USUAL_PROMPT, 'what the picture shows; "" draws one without a prompt', may_be_empty=True)
    negative_prompt: str = opt("", "what it does not show; without effect where --cfg_scale is 1")
    seed: int | None = opt(1, "seed of the first picture; further pictures of a prompt count up (empty = random)")
    cfg_scale: float = opt(5.0, "how strongly the prompt counts (classifier-free guidance; 1 = none, twice as fast)")
    width: int = opt(1024, "width in pixels, rounded down to a multiple of 16")
    height: int = opt(1024, "height in pixels, rounded down to a multiple of 16")
    flow_shift: float = opt(3.0, "above 1 = more of the steps at high noise; SD3 is made for 3")

    @property
    def guidance_scale(self) -> float:
        return self.cfg_scale

    def problems(self) -> Iterator[str]:
        yield from StepPromptOptions.problems(self)
        yield from above_zero(self, "flow_shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3OutputOptions(SdOutputOptions):
    """Output: what is written. Names are DATE_TIME.png and DATE_TIME_latent.safetensors; nothing is overwritten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3DeviceOptions(DeviceOptions):
    """Device: where and with which numbers the models work."""

    fp16: bool = opt(False, "the older way to write --mixed_precision=fp16")
    bf16: bool = opt(False, "the older way to write --mixed_precision=bf16")

    @property
    def precision(self) -> str | None:
        return next(iter(self._named), self.mixed_precision)

    @property
    def _named(self) -> list[str]:
        return [name for name in ("fp16", "bf16") if getattr(self, name)]

    def problems(self) -> Iterator[str]:
        yield from DeviceOptions.problems(self)
        flags = [f"--{name}" for name in self._named]
        if self.mixed_precision not in (None, self.precision):
            flags.append(f"--mixed_precision={self.mixed_precision}")
        if len(flags) > 1:
            yield f"{' and '.join(flags)} name different number formats: keep one of them"


@dataclass(frozen=True, kw_only=True)
class Sd3InferenceOptions(InferenceRules):
    """All options of sd3_minimal_inference.py, in groups."""

    files: Sd3FileOptions = field(default_factory=Sd3FileOptions)
    prompts: Sd3PromptOptions = field(default_factory=Sd3PromptOptions)
    loras: FlowMergeOptions = field(default_factory=FlowMergeOptions)
    output: Sd3OutputOptions = field(default_factory=Sd3OutputOptions)
    compute: Sd3DeviceOptions = field(default_factory=Sd3DeviceOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
