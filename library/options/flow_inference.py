"""What the options of sd3_minimal_inference.py and lumina_minimal_inference.py share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.options.anima_inference import SAMPLERS
from library.options.declare import opt
from library.options.inference import SIDE_RANGE_PX, PromptOptions
from library.options.sd_inference import SdMergeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowMergeOptions(SdMergeOptions):
    """LoRA: files that act beside the weights, or are merged into them before the model draws."""

    lora_weights: list[str] | None = opt(
        None, "LoRA files for the denoiser, the text encoders or both, any layout; FILE or 'FILE;STRENGTH' (not set = none)"
    )
    merge_lora_weights: bool = opt(
        False, "merge LoRA files into the model's weights: draws faster, but prompts cannot set their strengths (--m)"
    )

    @property
    def merged(self) -> bool:
        return self.merge_lora_weights

    def warnings(self) -> Iterator[str]:
        if self.merge_lora_weights and not self.files:
            yield "--merge_lora_weights does nothing without --lora_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPromptOptions(PromptOptions):
    """Pictures: with a flag for each side. A subclass declares the two of ``SIDE_NAMES``."""

    STEPS_NAME: ClassVar[str] = "steps"
    SIDE_NAMES: ClassVar[tuple[str, str]]  # of height and width

    sampler: str = opt("euler", "way from noise to picture; er_sde adds fresh noise on the way", choices=SAMPLERS)
    steps: int = opt(50, "steps of the sampler, 1 to 1000")

    @property
    def infer_steps(self) -> int:
        return self.steps

    @property
    def image_size(self) -> list[int]:
        return [getattr(self, name) for name in self.SIDE_NAMES]

    def _size_problems(self) -> Iterator[str]:
        low, high = SIDE_RANGE_PX
        for name, side in zip(self.SIDE_NAMES, self.image_size, strict=True):
            if not low <= side <= high:
                yield f"--{name} is {side}: give {low} to {high} pixels"
