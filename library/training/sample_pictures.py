"""Sample pictures while training: when they are due, who draws which, and where they go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
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

# pictures that differ in texts and seeds alone, positives, negatives -> latents (B, C, h, w)
Draw = Callable[[Sequence[Picture], Sequence[Conditioning], "Sequence[Conditioning] | None"], Tensor]
Planned = list[tuple[SamplePrompt, Picture]]


@dataclass(frozen=True, kw_only=True)
class SamplePictures:
    """Draws the prompts of a run; each process its share.

    ``plan`` decides every setting of a prompt's picture, ``draw`` gives latents, ``decode`` makes those of one pixels
    (1, 3, H, W) in [-1, 1], ``encode`` gives the conditioning of a text; only ``draw`` runs under autocast. ``about`` is
    written into the pictures too, as label -> text. ``ready`` is entered meanwhile (VAE on the device, dropout off). A prompt
    without a seed gets one of its own from the run's: fixed pictures can be compared.
    """

    run: CheckedRun
    accelerator: Accelerator
    group: HostGroup
    seed: int
    plan: Callable[[SamplePrompt, int], Picture]  # prompt, seed -> picture
    draw: Draw
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[str], Conditioning]
    about: Mapping[str, str]
    stop_wanted: Callable[[], bool]  # asked between pictures: a signal does not wait for all of them

    def draw_if_due(self, *, step: int, epoch: int | None, ready: Callable[[], AbstractContextManager[None]]) -> None:
        """``epoch``: the finished one at its end, 0 before training, None after a step."""
        if not self.run.prompts or not is_due(self.run.options.samples, step=step, epoch=epoch):
            return
        accelerator = self.accelerator
        with ready(), torch.no_grad():
            mine = self.run.prompts[accelerator.process_index :: accelerator.num_processes]
            shares = self._alike([(prompt, self._planned(prompt)) for prompt in mine])
            drawn = [
                (one, pixels) for share in shares if not self.stop_wanted() for one, pixels in self._draw(share, step, epoch)
            ]
        pictures = sorted((one for share in self.group.gather(drawn) for one in share), key=lambda one: one[0].index)
        if accelerator.is_main_process:
            logger.info("drew %d of %d sample pictures", len(pictures), len(self.run.prompts))
            for prompt, pixels in pictures:
                log_picture(accelerator, f"sample_{prompt.index}", pixels, step, prompt.prompt)

    def _planned(self, prompt: SamplePrompt) -> Picture:
        seed = prompt.seed if prompt.seed is not None else derive_seed(self.seed, "sample", prompt.index) % 2**32
        return self.plan(prompt, seed)

    def _alike(self, planned: Sequence[tuple[SamplePrompt, Picture]]) -> Iterator[Planned]:
        """Those that may be drawn together, as many at once as the options allow."""
        groups: dict[Picture, Planned] = {}
        for prompt, picture in planned:
            groups.setdefault(replace(picture, prompt="", negative_prompt="", seed=0), []).append((prompt, picture))
        most = self.run.options.pictures_at_once
        for group in groups.values():
            yield from (group[start : start + most] for start in range(0, len(group), most))

    def _draw(self, share: Planned, step: int, epoch: int | None) -> Iterator[tuple[SamplePrompt, Tensor]]:
        pictures = [picture for _, picture in share]
        positives = [self.encode(self._positive(picture.prompt)) for picture in pictures]
        negatives = [self.encode(picture.negative_prompt) for picture in pictures] if pictures[0].is_guided else None
        with self.accelerator.autocast():
            latents = self.draw(pictures, positives, negatives)
        for (prompt, picture), own in zip(share, latents.split(1), strict=True):
            pixels = self.decode(own)[0].float().cpu()  # (3, H, W)
            self._save(prompt, picture, pixels, step, epoch)
            yield prompt, pixels

    def _positive(self, prompt: str) -> str:
        return self.run.architecture.positive_prompt(prompt, self.run.options)

    def _save(self, prompt: SamplePrompt, picture: Picture, pixels: Tensor, step: int, epoch: int | None) -> None:
        name = picture_name(
            self.run.options.saving.output_name,
            step=step,
            epoch=epoch,
            index=prompt.index,
            seed=prompt.seed,
            now=time.localtime(),
        )
        save_picture(pixels, self.run.names.folder / "sample" / name, picture_parameters(picture, self.about))
