"""The part of a run that comes before training: the accelerator, and filling the caches with the models that this takes.

``NetworkTrainer`` goes on from here; the tools that only make caches stop here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.dataset.caches.reference_caches import reference_latents, reference_text
from library.dataset.caches.text_files import PROMPT_MARK
from library.dataset.conditioning import Conditioning
from library.errors import OptionError, OutputError, found_by_all
from library.nn.devices import existing_device
from library.training.hooks import ArchitectureHooks
from library.training.models import networks
from library.training.models.fp8_models import wait_for_merging
from library.training.models.precision import WEIGHT_DTYPES, use_deterministic_kernels
from library.training.preflight import CheckedData, process_count, worker_count
from library.training.running import trackers
from library.training.running.processes import HostGroup
from library.training.running.same_images import require_same_images

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.dataset.caches.cache_file import CacheState
    from library.dataset.caches.latent_cache import LatentCache
    from library.dataset.caches.reference_caches import ReferenceFormat
    from library.dataset.caches.text_cache import TextCache

logger = logging.getLogger(__name__)

LATE_FILES_S = 60.0  # NFS may remember for half a minute that a file is not there
PLAIN_DISTRIBUTIONS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


class CacheFilling(ArchitectureHooks):
    """Encodes what a run's caches lack."""

    def __init__(self, run: CheckedData):
        self.run = run
        self.options = run.options

    def start_accelerator(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

        names = trackers.tracker_names(self.options.logging)
        log_dir = trackers.run_log_dir(self.options.logging)
        minutes = self.options.distributed.ddp_timeout
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # --deepspeed: the engine is the learner's, over plain processes
        patience = [InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))] if minutes else []
        try:
            self.accelerator: Accelerator = Accelerator(
                mixed_precision=self.options.run.mixed_precision,
                log_with=names or None,
                project_dir=str(log_dir) if log_dir else None,
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # update() divides by itself
                kwargs_handlers=patience,
            )
        except ValueError as error:  # a precision that this device does not have
            raise OptionError(f"--mixed_precision {self.options.run.mixed_precision}: {error}") from error
        if self.accelerator.distributed_type.value not in PLAIN_DISTRIBUTIONS:
            raise OptionError(
                f"accelerate is configured for {self.accelerator.distributed_type.value}, which LoRA training here does not "
                "use: choose plain multi-GPU training in accelerate config"
            )
        self.device = self.accelerator.device
        for flag, name in self.devices_apart().items():
            existing_device(name, flag=flag)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        if self.processes != process_count():
            why = "no GPU was found for them; " if self.device.type == "cpu" else ""
            raise found_by_all(
                OptionError(
                    f"{process_count()} processes were started together, but accelerate works with {self.processes}: {why}start "
                    "them with accelerate launch, with --cpu where they are to run on the CPU (another launcher: set "
                    "ACCELERATE_USE_CPU=true)"
                )
            )
        self.weight_dtype = WEIGHT_DTYPES[self.options.run.mixed_precision]
        self.vae_dtype = torch.float32 if self.options.model.no_half_vae else self.weight_dtype
        self.group = HostGroup()
        require_same_images(self.run.training_set, self.group)
        self.seed = self.group.broadcast(self.run.seed)  # without --seed each process has drawn its own
        if self.options.run.deterministic:
            use_deterministic_kernels()

    def fill_caches(self) -> None:
        """Takes over or encodes what the caches lack; the VAE and the text encoder are loaded only for the rest, and gone
        afterwards."""
        latents, texts = self.run.latent_cache, self.run.text_cache
        with torch.no_grad():
            if latents is not None and self.lacks(latents.state(refresh=True)):
                self.adopt_latents(latents)
                if self.lacks(latents.state()):
                    self.fill_latent_cache(latents)
                    self.after_caching()
                self.require_that_all_see(latents, in_memory="--cache_latents")
            if texts is not None and self.lacks(texts.state(refresh=True)):
                self.adopt_text(texts)
                if self.lacks(texts.state()):
                    self.fill_text_cache(texts)
                    self.after_caching()
                self.require_that_all_see(texts, in_memory="--cache_text_encoder_outputs")

    def lacks(self, state: CacheState) -> bool:
        """Whether something is missing for any process: all go the same way."""
        return self.group.any(not state.is_complete)

    def adopt_latents(self, cache: LatentCache) -> None:
        """Takes over what kohya-ss/sd-scripts has cached, if that is wanted."""
        if self.options.caches.import_reference_caches:
            self.say_whose_word_counts("VAE")
            read = partial(reference_latents, format=self.reference_format(), recipe=cache.recipe)
            cache.adopt(read, **self.cache_shares())
            self.group.wait()

    def adopt_text(self, cache: TextCache) -> None:
        if self.options.caches.import_reference_caches:
            self.say_whose_word_counts("text encoder")
            read = partial(reference_text, format=self.reference_format(), recipe=cache.recipe)
            cache.adopt(read, **self.cache_shares())
            self.group.wait()

    def reference_format(self) -> ReferenceFormat:
        return self.run.architecture.reference_format(self.run.layouts, self.options)

    def say_whose_word_counts(self, maker: str) -> None:
        logger.info("taking over .npz caches: that they were made with this %s and these settings cannot be checked", maker)

    def fill_latent_cache(self, cache: LatentCache) -> None:
        vae = self.load_vae(device=self.device, dtype=self.vae_dtype)
        cache.fill(
            lambda pixels, seeds: self.encode_images(vae, pixels.to(self.device), seeds),
            batch_size=self.options.caches.vae_batch_size,
            workers=worker_count(self.options),
            **self.cache_shares(),
        )

    def fill_text_cache(self, cache: TextCache) -> None:
        text_encoder = self.build_text_encoder()
        models = self.text_models(text_encoder)
        wait_for_merging(self.options, *models)
        self.load_text_encoder(text_encoder, device=self.device, dtype=self.weight_dtype)
        networks.merge_base_weights(self.options.network, None, models, self.weight_dtype)
        cache.fill(
            lambda texts: self.encode_cached(text_encoder, texts).to("cpu"),
            batch_size=self.options.caches.text_encoder_batch_size or self.options.dataset.train_batch_size,
            **self.cache_shares(),
        )

    def encode_cached(self, text_encoder: Any, texts: Sequence[str]) -> Conditioning:
        """Captions, or sample prompts that are marked as such; never both at once."""
        if not texts[0].startswith(PROMPT_MARK):
            return self.encode_text(text_encoder, texts)
        return self.encode_prompts(text_encoder, [text.removeprefix(PROMPT_MARK) for text in texts])

    def after_caching(self) -> None:
        self.group.wait()
        if self.device.type == "cuda" and not self.options.memory.highvram:
            torch.cuda.empty_cache()

    def require_that_all_see(self, cache: LatentCache | TextCache, *, in_memory: str) -> None:
        """Raises one OutputError where a process does not find what the others have written, as on machines that share no disk.

        Disks that are shared over a network show new files late: those are waited for.
        """
        if self.processes == 1 or not cache.on_disk:
            return
        cache.check.full_bytes = 0  # what has just been written need not be read
        end = time.monotonic() + LATE_FILES_S
        while not (state := cache.state(again=True)).is_complete and time.monotonic() < end:
            time.sleep(1)
        absent = self.group.gather(state.total - state.valid)
        if any(absent):
            blind = [f"process {rank} lacks {count:,} of {state.total:,}" for rank, count in enumerate(absent) if count]
            raise found_by_all(
                OutputError(
                    f"not all processes see the cache files that the others have written ({', '.join(blind)}): give a "
                    f"--cache_dir that all machines share, or keep the cache in memory with {in_memory}"
                )
            )

    def cache_shares(self) -> dict[str, Any]:
        return {"rank": self.rank, "processes": self.processes, "gather": self.group.gather}
