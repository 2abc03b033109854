"""Sample pictures while training: when they are due, who draws which, and where they go."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.dataset.conditioning import Conditioning
from library.randomness import derive_seed
from library.sampling.pictures import is_due, picture_name, save_picture
from library.sampling.prompts import SamplePrompt
from library.training.preflight import CheckedRun
from library.training.trackers import log_picture

if TYPE_CHECKING:
    from accelerate import Accelerator

Draw = Callable[[SamplePrompt, Conditioning, Conditioning, int], Tensor]  # prompt, positive, negative, seed -> latents


class SamplePictures:
    """Draws the prompts of a run; each process its share.

    ``draw`` gives the latents of one picture, ``decode`` makes them pixels (1, 3, H, W) in [-1, 1], ``encode`` gives the
    conditioning of a text; only ``draw`` runs under autocast. ``ready`` is entered meanwhile (VAE on the device, dropout
    off). A prompt without a seed gets one of its own from the run's: fixed pictures can be compared.
    """

    def __init__(self, run: CheckedRun, accelerator: Accelerator, *, seed: int, draw: Draw, decode: Callable[[Tensor], Tensor],
                 encode: Callable[[str], Conditioning]):  # fmt: skip
        self._run, self._accelerator, self._seed = run, accelerator, seed
        self._draw, self._decode, self._encode = draw, decode, encode

    def draw_if_due(self, *, step: int, epoch: int | None, ready: Callable[[], AbstractContextManager[None]]) -> None:
        """``epoch``: the finished one at its end, 0 before training, None after a step."""
        if not self._run.prompts or not is_due(self._run.options.samples, step=step, epoch=epoch):
            return
        accelerator = self._accelerator
        with ready(), torch.no_grad():
            mine = self._run.prompts[accelerator.process_index :: accelerator.num_processes]
            pictures = [(prompt, self._draw_one(prompt, step, epoch)) for prompt in mine]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            pictures = gather_object(pictures)
        if accelerator.is_main_process:
            for prompt, pixels in pictures:
                log_picture(accelerator, f"sample_{prompt.index}", pixels, step, prompt.prompt)

    def _draw_one(self, prompt: SamplePrompt, step: int, epoch: int | None) -> Tensor:
        seed = prompt.seed if prompt.seed is not None else derive_seed(self._seed, "sample", prompt.index) % 2**32
        positive, negative = (
            self._encode(text).to(self._accelerator.device) for text in (prompt.prompt, prompt.negative_prompt or "")
        )
        with self._accelerator.autocast():
            latents = self._draw(prompt, positive, negative, seed)
        pixels = self._decode(latents)[0].float().cpu()  # (3, H, W)
        name = picture_name(
            self._run.options.saving.output_name,
            step=step,
            epoch=epoch,
            index=prompt.index,
            seed=prompt.seed,
            now=time.localtime(),
        )
        save_picture(pixels, self._run.names.folder / "sample" / name, prompt)
        return pixels
