"""The part of a run that comes before training: the accelerator, and filling the caches with the models that this takes.

``NetworkTrainer`` goes on from here; the tools that only make caches stop here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library.errors import OptionError
from library.training import trackers
from library.training.hooks import ArchitectureHooks
from library.training.precision import WEIGHT_DTYPES, use_deterministic_kernels
from library.training.preflight import CheckedData, worker_count
from library.training.processes import HostGroup

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.dataset.latent_cache import LatentCache
    from library.dataset.text_cache import TextCache

PLAIN_DISTRIBUTIONS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


class CacheFilling(ArchitectureHooks):
    """Encodes what a run's caches lack."""

    def __init__(self, run: CheckedData):
        self.run = run
        self.options = run.options

    def start_accelerator(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin

        names = trackers.tracker_names(self.options.logging)
        log_dir = trackers.run_log_dir(self.options.logging)
        try:
            self.accelerator: Accelerator = Accelerator(
                mixed_precision=self.options.run.mixed_precision,
                log_with=names or None,
                project_dir=str(log_dir) if log_dir else None,
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # update() divides by itself
            )
        except ValueError as error:  # a precision that this device does not have
            raise OptionError(f"--mixed_precision {self.options.run.mixed_precision}: {error}") from error
        if self.accelerator.distributed_type.value not in PLAIN_DISTRIBUTIONS:
            raise OptionError(
                f"accelerate is configured for {self.accelerator.distributed_type.value}, which LoRA training here does not "
                "use: choose plain multi-GPU training in accelerate config"
            )
        self.device = self.accelerator.device
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.weight_dtype = WEIGHT_DTYPES[self.options.run.mixed_precision]
        self.vae_dtype = torch.float32 if self.options.model.no_half_vae else self.weight_dtype
        self.group = HostGroup()
        self.seed = self.group.broadcast(self.run.seed)  # without --seed each process has drawn its own
        if self.options.run.deterministic:
            use_deterministic_kernels()

    def fill_caches(self) -> None:
        """Encodes what the caches lack; the VAE and the text encoder are loaded only then, and gone afterwards."""
        latents, texts = self.run.latent_cache, self.run.text_cache
        with torch.no_grad():
            if latents is not None and self.group.any(not latents.state(refresh=True).is_complete):
                self.fill_latent_cache(latents)
                self.after_caching()
            if texts is not None and self.group.any(not texts.state().is_complete):
                self.fill_text_cache(texts)
                self.after_caching()

    def fill_latent_cache(self, cache: LatentCache) -> None:
        vae = self.load_vae(device=self.device, dtype=self.vae_dtype)
        cache.fill(
            lambda pixels: self.encode_images(vae, pixels.to(self.device)),
            batch_size=self.options.caches.vae_batch_size,
            workers=worker_count(self.options),
            **self.cache_shares(),
        )

    def fill_text_cache(self, cache: TextCache) -> None:
        text_encoder = self.load_text_encoder(device=self.device, dtype=self.weight_dtype)
        cache.fill(
            lambda captions: self.encode_text(text_encoder, captions).to("cpu"),
            batch_size=self.options.caches.text_encoder_batch_size or self.options.dataset.train_batch_size,
            **self.cache_shares(),
        )

    def after_caching(self) -> None:
        self.group.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def cache_shares(self) -> dict[str, Any]:
        return {"rank": self.rank, "processes": self.processes, "gather": self.group.gather}
