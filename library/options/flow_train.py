"""What the option sets of all flow models have in common: their groups, and what they cannot use of Stable Diffusion's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.options.ddpm import ClipOptions, DdpmOptions
from library.options.declare import opt
from library.options.flow import FlowOptions
from library.options.memory import BlockMemoryOptions
from library.options.rules import belongs_elsewhere
from library.options.samples import SAMPLERS, SampleOptions
from library.options.train import TrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDdpmOptions(DdpmOptions):
    """Stable Diffusion's noise: for models with a table of noise levels; an error here."""

    MODEL: ClassVar[str] = "this model"  # as messages call it

    def problems(self) -> Iterator[str]:
        yield from belongs_elsewhere(self, "it changes how models with a table of noise levels (SD 1, 2, XL) are trained, and "
                                     f"{self.MODEL} is a flow model")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NoClipOptions(ClipOptions):
    """Stable Diffusion's text: for models with CLIP text encoders; an error here, except for --tokenizer_cache_dir."""

    WHY: ClassVar[str] = "it is about Stable Diffusion's CLIP text encoders"

    def problems(self) -> Iterator[str]:
        yield from belongs_elsewhere(self, self.WHY, but=("tokenizer_cache_dir",))

    def warnings(self) -> Iterator[str]:
        if self.tokenizer_cache_dir:
            yield "--tokenizer_cache_dir does nothing: the tokenizers come with this project, and nothing is downloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSampleOptions(SampleOptions):
    """Samples: pictures drawn while training."""

    sample_sampler: str | None = opt(
        None, "sampler of the pictures: euler or er_sde; others are for other models (not set = euler)",
        choices=(*SAMPLERS, "er_sde"),
    )  # fmt: skip

    def warnings(self) -> Iterator[str]:
        yield from SampleOptions.warnings(self)
        if self.sample_sampler not in (None, "euler", "k_euler", "er_sde"):
            yield f"--sample_sampler={self.sample_sampler} is no sampler for a flow model: pictures are drawn with euler"


@dataclass(frozen=True, kw_only=True)
class FlowTrainOptions(TrainOptions):
    """Base of the flow models' options: a subclass states its ``flow``, and what else it has."""

    flow: FlowOptions = field(default_factory=FlowOptions)
    memory: BlockMemoryOptions = field(default_factory=BlockMemoryOptions)
    samples: FlowSampleOptions = field(default_factory=FlowSampleOptions)
    ddpm: NoDdpmOptions = field(default_factory=NoDdpmOptions)
    clip: NoClipOptions = field(default_factory=NoClipOptions)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.loss.flow_problems()

    @property
    def objective(self) -> str:
        return self.flow.objective

    @property
    def needs_dataset(self) -> bool:
        """Some ways to draw noise levels depend on the sizes of the pictures."""
        return TrainOptions.needs_dataset.fget(self) or self.flow.depends_on_sizes  # type: ignore[attr-defined]

    def _diffusers_text_problems(self) -> Iterator[str]:
        """Of a model whose text encoder diffusers gives no LoRA."""
        if "denoiser" in self.parts and self.saving.save_format == "diffusers" and self.trains_text_encoder:
            yield (
                f"--save_format=diffusers cannot hold a text encoder's LoRA, which diffusers does not load for {self.MODEL}: add "
                "--network_train_unet_only, or give --save_format=comfy"
            )
