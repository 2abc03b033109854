"""Options of tools/cache_latents.py and tools/cache_text_encoder_outputs.py: those of a training script, and a few of their own.

People hand these tools the command line of their training, so all of it is taken, and what only training needs may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

from library.options.command_line import read_options
from library.options.declare import opt
from library.options.train import TrainOptions

# part of the model -> the flag of its cache
IMPLIED = {"vae": "--cache_latents_to_disk", "text": "--cache_text_encoder_outputs_to_disk"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheToolOptions:
    """Caching tool: what to cache for. Of the training options those count that say what is in the caches and where they lie."""

    anima: bool = opt(False, "cache for anima_train_network.py (no switch = for train_network.py: Stable Diffusion 1.x, 2.x)")
    sdxl: bool = opt(False, "cache for sdxl_train_network.py")
    sd3: bool = opt(False, "cache for sd3_train_network.py: Stable Diffusion 3 and 3.5")
    lumina: bool = opt(False, "cache for lumina_train_network.py: Lumina Image 2.0")
    skip_existing: bool = opt(
        False, "leave cache files that are there as they are, without looking into them (--skip_cache_check)"
    )

    def problems(self) -> Iterator[str]:
        return iter(())


def cache_tool_options(train_options: type[TrainOptions], part: str) -> type[Any]:
    """The option set of the tool that caches what ``part`` of the model ("vae" or "text") makes."""

    def parts(options: Any) -> tuple[str, ...]:
        return () if options.look.only else (part,)

    return make_dataclass(
        f"{train_options.__name__}_{part}",
        [("tool", CacheToolOptions, field(default_factory=CacheToolOptions))],
        bases=(train_options,),
        namespace={"parts": property(parts)},
        frozen=True,
        kw_only=True,
    )


def read_cache_tool_options(train_options: type[TrainOptions], part: str, argv: Sequence[str]) -> Any:
    """The options of ``argv`` with this part's cache on, on disk, and the other one off. Raises OptionError."""
    options: Any = read_options(cache_tool_options(train_options, part), [*argv, IMPLIED[part]])  # what comes last counts
    caches = replace(
        options.caches,
        cache_latents=part == "vae",
        cache_latents_to_disk=part == "vae",
        cache_text_encoder_outputs=part == "text",
        cache_text_encoder_outputs_to_disk=part == "text",
        skip_cache_check=options.caches.skip_cache_check or options.tool.skip_existing,
    )
    return replace(options, caches=caches)
