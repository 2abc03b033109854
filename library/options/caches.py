"""Encoding images and captions once instead of at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.options.declare import opt
from library.options.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Caches: encode images and captions once, before training."""

    cache_latents: bool = opt(False, "encode every image once and keep its latents in memory; the VAE then leaves the GPU")
    cache_latents_to_disk: bool = opt(
        False, "keep the latents in files, so that the next run starts with them (implies --cache_latents)"
    )
    vae_batch_size: int = opt(1, "images per VAE call while caching; more is faster and takes more memory")
    cache_text_encoder_outputs: bool = opt(
        False, "encode every caption once and keep the result; the text encoder then leaves the GPU"
    )
    cache_text_encoder_outputs_to_disk: bool = opt(
        False, "keep the encoded captions in files for the next run (implies --cache_text_encoder_outputs)"
    )
    text_encoder_batch_size: int | None = opt(None, "captions per text-encoder call while caching (not set = 1)")
    skip_cache_check: bool = opt(
        False, "trust cache files by their names, without comparing what they were made from; faster start"
    )
    cache_dir: Path | None = opt(None, "folder for cache files (not set = beside the images)")
    import_reference_caches: bool = opt(
        False, "take over .npz caches that kohya-ss/sd-scripts wrote beside the images, where they fit"
    )
    caption_variants: int | None = opt(
        None,
        "versions of each caption to cache where captions vary by shuffling and the like (not set = enough for the settings)",
    )

    @property
    def latents_cached(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text_cached(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    @property
    def text_flag(self) -> str:
        """What caches text, as it was typed."""
        return f"--cache_text_encoder_outputs{'_to_disk' if self.cache_text_encoder_outputs_to_disk else ''}"

    @property
    def any_on_disk(self) -> bool:
        return self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "vae_batch_size", "text_encoder_batch_size", "caption_variants")
        if self.caption_variants is not None and not self.text_cached:
            yield "--caption_variants needs --cache_text_encoder_outputs: give it too, or drop --caption_variants"

    def warnings(self) -> Iterator[str]:
        if self.import_reference_caches and not (self.latents_cached or self.text_cached):
            yield "--import_reference_caches does nothing without --cache_latents or --cache_text_encoder_outputs"
        for name in ("cache_dir", "skip_cache_check"):
            if getattr(self, name) and not self.any_on_disk:
                yield f"--{name} does nothing without --cache_latents_to_disk or --cache_text_encoder_outputs_to_disk"
