"""Caching without training: what tools/cache_latents.py and tools/cache_text_encoder_outputs.py do.

``checked_job`` does everything that needs no torch, as ``preflight`` does for a run; ``fill`` does the rest.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from library.dataset.order import batches_per_epoch
from library.errors import ProblemList, TrainingError, UserError, user_errors_end_the_script
from library.options.cache_tool import IMPLIED
from library.training.architecture import Architecture
from library.training.plan import cache_lines, variant_lines
from library.training.preflight import (
    CheckedData,
    check_disk,
    checked_prompts,
    checked_start,
    make_caches,
    process_count,
    read_training_set,
    run_seed,
)
from library.training.steps import RunLength

if TYPE_CHECKING:
    from library.dataset.caches.cache_file import CacheState
    from library.dataset.caches.latent_cache import LatentCache
    from library.dataset.caches.text_cache import TextCache
    from library.training.caching import CacheFilling

NAMES = {"vae": "latents", "text": "text outputs"}  # of what a part of the model makes

logger = logging.getLogger(__name__)


def checked_job(
    read: Callable[[], Any], architecture: Architecture, part: str, *, reworded: Callable[[str], str] = str
) -> CheckedData:
    """For a tool's first lines: reads the command line, checks the data and the files of ``part`` ("vae" or "text"), and tells
    what is to be done. Ends the tool on a mistake, after --dry_run, and after a look. ``reworded``: messages about the data and
    the files as the tool says them."""
    return checked_start(read, architecture, lambda options: _told_job(options, architecture, part, reworded))


def _told_job(options: Any, architecture: Architecture, part: str, reworded: Callable[[str], str]) -> CheckedData:
    try:
        data = check_job(options, architecture, part)
    except UserError as error:
        raise type(error)(*map(reworded, error.problems)) from error
    for line in job_lines(data, part):
        logger.info("%s", line)
    for warning in data.warnings:
        logger.warning("warning: %s", warning)
    if options.run.dry_run or is_done(data, part):
        raise SystemExit
    return data


def check_job(options: Any, architecture: Architecture, part: str) -> CheckedData:
    """Raises one UserError with all that was found. Needs no torch; loads no model.

    The epochs of the run, which decide how many variants of a caption there are, are counted as training counts them.
    """
    problems = ProblemList()
    layouts = training_set = None
    prompts: tuple[Any, ...] = ()
    with problems.collect():
        prompts = checked_prompts(options) if part == "text" else ()
    with problems.collect():
        training_set = read_training_set(options, architecture)
    if options.fetches_models:  # gigabytes: only when nothing else is wrong
        problems.raise_if_any()
    with problems.collect():
        layouts = architecture.read_layouts(options, options.parts)
    problems.raise_if_any()
    assert training_set is not None
    length = RunLength.of(options.run, batches_per_epoch(training_set, processes=process_count()))
    latent_cache, text_cache = make_caches(options, architecture, layouts, training_set, prompts, length)
    check_disk(training_set, (latent_cache, text_cache), options)
    return CheckedData(
        options=options,
        architecture=architecture,
        layouts=layouts,
        training_set=training_set,
        seed=run_seed(options, None),
        latent_cache=latent_cache,
        text_cache=text_cache,
        warnings=(
            *options.dataset.warnings(),
            *options.caches.warnings(),
            *training_set.warnings,
            *architecture.warnings_of(layouts, options),
            *(architecture.caption_warnings(training_set, options) if part == "text" else ()),
        ),
    )


def job_lines(data: CheckedData, part: str) -> Iterator[str]:
    """What is there, and what will be made."""
    images = len(data.training_set.all_items)
    where = data.options.caches.cache_dir or "beside the images"
    yield f"caching {NAMES[part]} of {images:,} images for {data.options.MODEL} ({where})"
    yield from cache_lines(NAMES[part], job_cache(data))
    if data.text_cache is not None:
        yield from variant_lines(data.training_set, data.text_cache.variants)


def job_cache(data: CheckedData) -> LatentCache | TextCache:
    cache = data.latent_cache or data.text_cache
    assert cache is not None
    return cache


def is_done(data: CheckedData, part: str) -> bool:
    """Nothing is missing: said, and torch need not be imported. Several processes ask each other in ``fill`` instead, since one
    may look when another has already begun."""
    cache = job_cache(data)
    if process_count() > 1 or not cache.state().is_complete:
        return False
    say_done(cache.state(refresh=True), part)
    return True


def say_done(before: CacheState, part: str) -> None:
    made = before.total - before.valid
    now = f"{made:,} of them made now" if made else "nothing was missing"
    logger.info("%s", f"all {before.total:,} {NAMES[part]} are on disk, {now}; train with {IMPLIED[part]}")


def fill(trainer_class: Callable[[CheckedData], CacheFilling], data: CheckedData, part: str) -> None:
    """Makes what the cache lacks, with as many processes as were started, and ends the tool with one message for what a user can
    mend."""
    import torch

    from library.training.running.processes import ends_of_others_are_told

    gc.freeze()  # what was imported stays: the collector, off since the first checks, need not look at it again
    gc.enable()
    with user_errors_end_the_script(all_processes=True):
        try:
            with ends_of_others_are_told():
                _fill(trainer_class(data), data, part)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU is out of memory ({str(error).splitlines()[0]}). What saves memory: --vae_batch_size 1, "
                "--text_encoder_batch_size 1, a smaller resolution, --mixed_precision bf16, and for Anima --vae_chunk_size 64"
            ) from error


def _fill(filling: CacheFilling, data: CheckedData, part: str) -> None:
    before = job_cache(data).state()
    filling.start_accelerator()
    filling.fill_caches()
    filling.group.wait()
    say_done(before, part)
    filling.accelerator.end_training()
