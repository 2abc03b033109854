"""The answers that all rectified-flow models share: objective, and the way from a prompt to latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from library.dataset.conditioning import Conditioning
from library.sampling.flow_pictures import draw_pictures
from library.sampling.flow_samplers import Predict, flow_sampler_name
from library.sampling.picture_plan import Picture, sample_defaults, sample_picture
from library.sampling.prompts import SamplePrompt
from library.training.hooks import ArchitectureHooks
from library.training.loss.objective import FlowObjective

TOLD_FOR_ALL = ("min_timestep", "max_timestep")  # in the metadata, whatever the model


class FlowHooks(ArchitectureHooks):
    """Stands before NetworkTrainer among the bases of a trainer."""

    SCHEDULE: ClassVar[str] = "even"  # of the noise levels of sample pictures; see library/sampling/flow_samplers.py

    @abstractmethod
    def velocity(self) -> Predict:
        """The denoiser as samplers call it, with what ``flow_text`` gives: (latents, sigmas (B,), text) -> velocity."""

    @abstractmethod
    def flow_text(self, text: Any) -> Any:
        """The conditioning of B prompts as ``velocity`` takes it; computed once for a picture, not in each of its steps."""

    def create_objective(self) -> FlowObjective:
        return FlowObjective(self.options.flow, self.options.noise, self.options.loss)

    def plan_sample(self, prompt: SamplePrompt, seed: int) -> Picture:
        sampler = flow_sampler_name(prompt.sample_sampler, self.options.samples.sample_sampler)
        return sample_picture(prompt, seed, sampler=sampler, defaults=sample_defaults(self.run.architecture.name))

    def draw_sample(self, picture: Picture, positive: Conditioning, negative: Conditioning | None) -> Tensor:
        return self.draw_samples([picture], [positive], None if negative is None else [negative])

    def draw_samples(
        self, pictures: Sequence[Picture], positives: Sequence[Conditioning], negatives: Sequence[Conditioning] | None
    ) -> Tensor:
        stack = type(positives[0]).stack
        return draw_pictures(
            self.velocity(),
            pictures,
            self.flow_text(stack(positives)),
            None if negatives is None else self.flow_text(stack(negatives)),
            channels=self.run.layouts.denoiser.config.in_channels,
            schedule=self.SCHEDULE,
            device=self.device,
        )

    def flow_metadata(self) -> dict[str, str]:
        """What a LoRA file says of the noise levels that it was trained at: options as ``ss_*``."""
        flow = self.options.flow
        names = (option.name for option in fields(flow) if option.name not in TOLD_FOR_ALL)
        return {f"ss_{name}": str(getattr(flow, name)) for name in names}
