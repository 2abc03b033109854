"""Sample pictures while training: when they are due, who draws which, and where they go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.dataset.conditioning import Conditioning
from library.randomness import derive_seed
from library.sampling.picture_plan import Picture
from library.sampling.pictures import is_due, picture_name, picture_parameters, save_picture
from library.sampling.prompts import SamplePrompt
from library.training.preflight import CheckedRun
from library.training.running.processes import HostGroup
from library.training.running.trackers import log_picture

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from accelerate import Accelerator

Draw = Callable[[Picture, Conditioning, Conditioning | None], Tensor]  # picture, positive, negative -> latents


@dataclass(frozen=True, kw_only=True)
class SamplePictures:
    """Draws the prompts of a run; each process its share.

    ``plan`` decides every setting of a prompt's picture, ``draw`` gives its latents, ``decode`` makes them pixels
    (1, 3, H, W) in [-1, 1], ``encode`` gives the conditioning of a text; only ``draw`` runs under autocast. ``ready`` is
    entered meanwhile (VAE on the device, dropout off). A prompt without a seed gets one of its own from the run's: fixed
    pictures can be compared.
    """

    run: CheckedRun
    accelerator: Accelerator
    group: HostGroup
    seed: int
    plan: Callable[[SamplePrompt, int], Picture]  # prompt, seed -> picture
    draw: Draw
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[str], Conditioning]
    stop_wanted: Callable[[], bool]  # asked between pictures: a signal does not wait for all of them

    def draw_if_due(self, *, step: int, epoch: int | None, ready: Callable[[], AbstractContextManager[None]]) -> None:
        """``epoch``: the finished one at its end, 0 before training, None after a step."""
        if not self.run.prompts or not is_due(self.run.options.samples, step=step, epoch=epoch):
            return
        accelerator = self.accelerator
        with ready(), torch.no_grad():
            mine = self.run.prompts[accelerator.process_index :: accelerator.num_processes]
            pictures = [(prompt, self._draw_one(prompt, step, epoch)) for prompt in mine if not self.stop_wanted()]
        pictures = [picture for share in self.group.gather(pictures) for picture in share]
        if accelerator.is_main_process:
            logger.info("drew %d of %d sample pictures", len(pictures), len(self.run.prompts))
            for prompt, pixels in pictures:
                log_picture(accelerator, f"sample_{prompt.index}", pixels, step, prompt.prompt)

    def _draw_one(self, prompt: SamplePrompt, step: int, epoch: int | None) -> Tensor:
        seed = prompt.seed if prompt.seed is not None else derive_seed(self.seed, "sample", prompt.index) % 2**32
        picture = self.plan(prompt, seed)
        positive = self.encode(picture.prompt).to(self.accelerator.device)
        negative = self.encode(picture.negative_prompt).to(self.accelerator.device) if picture.is_guided else None
        with self.accelerator.autocast():
            latents = self.draw(picture, positive, negative)
        pixels = self.decode(latents)[0].float().cpu()  # (3, H, W)
        name = picture_name(
            self.run.options.saving.output_name,
            step=step,
            epoch=epoch,
            index=prompt.index,
            seed=prompt.seed,
            now=time.localtime(),
        )
        save_picture(pixels, self.run.names.folder / "sample" / name, picture_parameters(picture, {}))
        return pixels
