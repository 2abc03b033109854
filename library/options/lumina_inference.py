"""Options of lumina_minimal_inference.py. Names and defaults are those of kohya-ss/sd-scripts where it has the option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.options.console import ConsoleOptions
from library.options.declare import opt
from library.options.flow_inference import FlowMergeOptions, StepPromptOptions
from library.options.inference import InferenceRules, PlaceOptions
from library.options.lumina import GEMMA_TOKENS, LONGEST_GEMMA_TOKENS, LuminaAttentionOptions
from library.options.rules import above_zero, at_least
from library.options.sd_inference import SdOutputOptions

USUAL_PROMPT = "A beautiful sunset over the mountains"  # the reference draws it where nothing else is asked for
# what the flags of number formats take -> as --mixed_precision names it
PRECISIONS = {
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("fp32", "float32", "float", "no"), "no"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaFileOptions:
    """Model: the files of the model, and how its text encoder reads a prompt."""

    pretrained_model_name_or_path: str | None = opt(
        None, "model: a .safetensors file of Lumina Image 2.0, with or without its other parts", path=True
    )
    gemma2_path: str | None = opt(
        None, "text encoder Gemma 2 2B: a .safetensors file or a folder (not set = the one inside the model's file)", path=True
    )
    gemma2_tokenizer: str | None = opt(
        None, "tokenizer of Gemma 2: a folder, a file of it, or OWNER/NAME on the hub (not set = the one that comes with "
        "--gemma2_path, else google/gemma-2-2b)", path=True,
    )  # fmt: skip
    ae_path: str | None = opt(
        None, "file of the image coder, the autoencoder of FLUX (not set = the one inside the model's file)", path=True
    )
    gemma2_max_token_length: int = opt(
        GEMMA_TOKENS, "Gemma tokens of the system prompt and a prompt that count, 1 to 4096; the rest is cut off"
    )

    @property
    def no_half_vae(self) -> bool:
        """Here --ae_dtype says it."""
        return False

    def problems(self) -> Iterator[str]:
        if not self.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path is missing: name the model"
        if not 1 <= self.gemma2_max_token_length <= LONGEST_GEMMA_TOKENS:
            yield f"--gemma2_max_token_length is {self.gemma2_max_token_length}: give 1 to {LONGEST_GEMMA_TOKENS} tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaPromptOptions(StepPromptOptions):
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures."""

    USUAL_PROMPT: ClassVar[str | None] = USUAL_PROMPT
    SIDE_NAMES: ClassVar[tuple[str, str]] = ("image_height", "image_width")

    prompt: str | None = opt(USUAL_PROMPT, 'what the picture shows; "" draws one without a prompt', may_be_empty=True)
    system_prompt: str = opt("", "text put before every prompt, with a marker between; as the LoRA was trained (empty = none)")
    add_system_prompt_to_negative_prompt: bool = opt(False, "put it before negative prompts too")
    steps: int = opt(36, "steps of the sampler, 1 to 1000")
    guidance_scale: float = opt(3.5, "how strongly the prompt counts (classifier-free guidance; 1 = none, twice as fast)")
    image_width: int = opt(1024, "width in pixels, rounded down to a multiple of 16")
    image_height: int = opt(1024, "height in pixels, rounded down to a multiple of 16")
    discrete_flow_shift: float = opt(6.0, "above 1 = more of the steps at high noise; Lumina is made for 6")
    cfg_trunc_ratio: float = opt(
        0.25, "share of the way from noise to picture, 0 to 1, on which there is guidance (1 or more = all of it)"
    )
    renorm_cfg: float = opt(1.0, "longest that guidance makes a step, in lengths of one without (0 = any)")

    @property
    def flow_shift(self) -> float:
        return self.discrete_flow_shift

    def problems(self) -> Iterator[str]:
        yield from StepPromptOptions.problems(self)
        yield from above_zero(self, "discrete_flow_shift")
        yield from at_least(self, 0, "cfg_trunc_ratio", "renorm_cfg")

    def warnings(self) -> Iterator[str]:
        if self.add_system_prompt_to_negative_prompt and not self.system_prompt:
            yield "--add_system_prompt_to_negative_prompt does nothing without --system_prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaOutputOptions(SdOutputOptions):
    """Output: what is written. Names are image_DATETIME_SEED.png and ..._latent.safetensors; nothing is overwritten."""

    output_dir: str = opt("outputs", "folder for the files; made if missing", path=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaPlaceOptions(PlaceOptions):
    """Device: where and with which numbers the models work."""

    dtype: str = opt("bf16", "number format of the denoiser: bf16, fp16 or fp32")
    gemma2_dtype: str = opt("bf16", "number format of the text encoder: bf16, fp16 or fp32")
    ae_dtype: str = opt("bf16", "number format of the image coder: bf16, fp16 or fp32")

    @property
    def precision(self) -> str | None:
        return PRECISIONS.get(self.dtype)

    @property
    def text_precision(self) -> str | None:
        """Number format of the text encoder, as --mixed_precision names it."""
        return PRECISIONS.get(self.gemma2_dtype)

    @property
    def vae_precision(self) -> str | None:
        """Number format of the image coder, as --mixed_precision names it."""
        return PRECISIONS.get(self.ae_dtype)

    def problems(self) -> Iterator[str]:
        yield from PlaceOptions.problems(self)
        for name in ("dtype", "gemma2_dtype", "ae_dtype"):
            if getattr(self, name) not in PRECISIONS:
                yield f"--{name} is {getattr(self, name)!r}: give bf16, fp16 or fp32"


@dataclass(frozen=True, kw_only=True)
class LuminaInferenceOptions(InferenceRules):
    """All options of lumina_minimal_inference.py, in groups."""

    files: LuminaFileOptions = field(default_factory=LuminaFileOptions)
    prompts: LuminaPromptOptions = field(default_factory=LuminaPromptOptions)
    loras: FlowMergeOptions = field(default_factory=FlowMergeOptions)
    output: LuminaOutputOptions = field(default_factory=LuminaOutputOptions)
    compute: LuminaPlaceOptions = field(default_factory=LuminaPlaceOptions)
    attention: LuminaAttentionOptions = field(default_factory=LuminaAttentionOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
