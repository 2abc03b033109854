"""Caching: how fast the first run encodes, and that a second one encodes nothing."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anima_train_network import AnimaNetworkTrainer
from library.dataset.caches.latent_cache import LatentCache
from tools.bench_parts.figures import Figure, seconds
from tools.bench_parts.tiny_run import CACHED_ON_DISK, TinyRun, make_tiny_run

BATCH = 4  # --vae_batch_size


@dataclass(slots=True)
class Work:
    """What the encoders had to do, and wall time."""

    start_s: float = 0.0  # from the parsed flags to complete caches
    latents_s: float = 0.0  # of it, filling the latent cache, without loading the VAE
    vae_s: float = 0.0  # of that, inside the VAE
    images: int = 0
    image_calls: int = 0
    text_calls: int = 0
    models_loaded: int = 0


class CountingTrainer(AnimaNetworkTrainer):
    """The trainer, counting what its encoders are asked for."""

    def __init__(self, run: Any):
        super().__init__(run)
        self.work = Work()

    def load_vae(self, **where: Any) -> Any:
        self.work.models_loaded += 1
        with self.adding_time_to("latents_s", sign=-1):
            return super().load_vae(**where)

    def load_text_encoder(self, text_encoder: Any, **where: Any) -> None:
        self.work.models_loaded += 1
        super().load_text_encoder(text_encoder, **where)

    def fill_latent_cache(self, cache: LatentCache) -> None:
        with self.adding_time_to("latents_s"):
            super().fill_latent_cache(cache)

    def encode_images(self, vae: Any, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        self.work.images += len(pixels)
        self.work.image_calls += 1
        with self.adding_time_to("vae_s"):
            return super().encode_images(vae, pixels, seeds)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> Any:
        self.work.text_calls += 1
        return super().encode_text(text_encoder, captions)

    @contextmanager
    def adding_time_to(self, field: str, *, sign: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self.work, field, getattr(self.work, field) + sign * (time.perf_counter() - start))


def measure(repeats: int, *, pictures: int = 40, resolution: int = 256) -> list[Figure]:
    """One cold and one warm start on the tiny model; counts do not need ``repeats``."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_tiny_run(Path(folder), pictures=pictures, resolution=resolution)
        cold, warm = caching(run), caching(run)
    calls = warm.image_calls + warm.text_calls + warm.models_loaded
    share = 100 * cold.vae_s / cold.latents_s
    return [
        Figure(name="cache: encoders loaded or called, warm", value=calls, unit="times", at_most=0,
               how=f"cold: {cold.image_calls} VAE calls, {cold.text_calls} of the text encoder"),
        Figure(name="cache: images per VAE call, cold", value=cold.images / cold.image_calls, unit="",
               how=f"--vae_batch_size {BATCH}, buckets of mixed sizes"),
        Figure(name="cache: latents, cold", value=cold.images / cold.latents_s, unit="images/s",
               how=f"inside the tiny VAE {share:.0f} % of the time; the rest is decoding and writing that it does not hide"),
        Figure(name="cache: cold / warm start", value=cold.start_s / warm.start_s, unit="x",
               how=f"{pictures} images, checks included: cold {seconds(cold.start_s)}, warm {seconds(warm.start_s)}"),
    ]  # fmt: skip


def caching(run: TinyRun) -> Work:
    """A run's start up to the point where both caches are complete."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        trainer = CountingTrainer(run.checked(*CACHED_ON_DISK, f"--vae_batch_size={BATCH}", "--max_train_steps=1"))
        trainer.start_accelerator()
        trainer.create_network()
        trainer.fill_caches()
        trainer.work.start_s = time.perf_counter() - start
    return trainer.work
