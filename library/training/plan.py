"""What a run is going to do, in lines: printed at the start of every run and by --dry_run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.dataset.caches.size import memory_warning
from library.dataset.captions import possible_variants
from library.dataset.items import DatasetSettings, Item, TrainingSet
from library.dataset.page.facts import counted, dataset_facts
from library.dataset.page.text import dataset_lines
from library.training.loss.preservation import is_preserved
from library.training.optimizing.optimizer_names import chosen_name, optimizer_kind
from library.training.optimizing.schedule_names import schedule_name
from library.training.preflight import CheckedRun
from library.training.validating.validation_plan import ValidationSchedule, validation_batch_count, validation_timesteps

if TYPE_CHECKING:
    from library.dataset.caches.latent_cache import LatentCache
    from library.dataset.caches.text_cache import TextCache

MIB = 2**20


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """What the network module would train: modules, parameters, the file's size in bytes, and the line of trained_parts.py."""

    modules: int
    parameters: int
    file_bytes: int
    trained: str = ""


def plan_lines(run: CheckedRun, size: NetworkSize) -> list[str]:
    """The whole plan. One fact a line, with its numbers and units."""
    return [
        f"plan for {run.names.last_file()}",
        *(f"  {line}" for line in run.architecture.model_lines(run.layouts, run.options)),
        *_dataset_lines(run),
        *_validation_lines(run),
        *_step_lines(run),
        *_cache_lines(run),
        *_output_lines(run, size),
    ]


def _dataset_lines(run: CheckedRun) -> Iterator[str]:
    for dataset in dataset_facts(run.training_set, processes=run.processes):
        if dataset.items:  # else all of its images validate
            yield from (f"  {line}" for line in dataset_lines(dataset))
            yield from _weight_lines(dataset.settings, dataset.items)
    if run.training_set.skipped:
        yield f"  left out: {len(run.training_set.skipped)} bad images (--skip_bad_images)"


def _weight_lines(dataset: DatasetSettings, items: Sequence[Item]) -> Iterator[str]:
    """What does not count as plain images do."""
    weights = Counter(item.subset.loss_weight for item in items)
    yield from (f"    loss weight {weight:g}: {weights[weight]} images" for weight in sorted(weights) if weight != 1)
    if dataset.network_multiplier != 1:
        yield f"    the network is trained at {dataset.network_multiplier:g} times its strength (network_multiplier)"
    preserved = sum(is_preserved(item.custom_attributes) for item in items)
    if preserved:
        yield f"    {preserved} images stay as the model makes them without the network (diff_output_preservation)"


def _validation_lines(run: CheckedRun) -> Iterator[str]:
    items, options = run.training_set.validation, run.options.validation
    if not items:
        return
    masked = sum(item.is_masked for item in items)
    masks = f" ({masked} with masks)" if masked else ""
    every = validation_batch_count(run.training_set, None)
    used = validation_batch_count(run.training_set, options.max_validation_steps)
    batches = counted(every, "batch", "batches") if used == every else f"{used} of {every} batches"
    noise_levels = getattr(run.options, "flow", run.options.ddpm)
    levels = len(validation_timesteps(*noise_levels.timestep_bounds))
    schedule = ValidationSchedule.of(options)
    yield (
        f"  validation: {counted(len(items), 'image')}{masks}, {batches} at {counted(levels, 'timestep')} each: "
        f"the base model once before training, the LoRA {schedule}: {counted_times(schedule.times(run.length))}"
    )
    if options.save_best:
        yield f"    the LoRA with the lowest validation loss is kept in {run.names.best_file()}"


def _step_lines(run: CheckedRun) -> Iterator[str]:
    length = run.length
    processes = f" over {run.processes} processes" if run.processes > 1 else ""
    accumulation = f", {length.accumulation} batches a step" if length.accumulation > 1 else ""
    yield (
        f"  steps: {counted(length.batches_per_epoch, 'batch', 'batches')} per epoch{processes}{accumulation}, "
        f"{counted(length.steps_per_epoch, 'step')} per epoch, {counted(length.epochs, 'epoch')}, "
        f"{length.total_steps} steps in all"
    )
    if run.start.step:
        source = f" (state {run.resume_folder})" if run.resume_folder else ""
        yield f"  starts after step {run.start.step}{source}: {length.total_steps - run.start.step} steps are left"
    yield f"  seed: {run.seed}"


def _cache_lines(run: CheckedRun) -> Iterator[str]:
    for kind, cache in (("latents", run.latent_cache), ("text outputs", run.text_cache)):
        if cache is None:
            yield f"  {kind}: not cached, encoded at every step"
        else:
            yield from cache_lines(kind, cache)
    yield from _variant_lines(run)


def cache_lines(kind: str, cache: LatentCache | TextCache) -> Iterator[str]:
    """What is there of a cache, and why some of it must be made again."""
    state = cache.state()
    contents = f" ({cache.contents})" if cache.contents else ""
    if not cache.on_disk:
        yield f"  {kind}: {state.total} to be cached in memory{contents}, about {state.bytes_needed / MIB:,.1f} MiB"
        return
    stale = len(state.stale)
    yield f"  {kind}: {state.valid} of {state.total} cached on disk, {state.missing} missing, {stale} to be made again{contents}"
    reasons = Counter(reason for _, reason in state.stale)
    yield from (f"    {reason}: {count}" for reason, count in reasons.most_common())


def memory_warnings(run: CheckedRun) -> Iterator[str]:
    """Caches in memory that take much of it."""
    warning = memory_warning([cache.state() for cache in (run.latent_cache, run.text_cache) if cache is not None])
    if warning:
        yield warning


def _variant_lines(run: CheckedRun) -> Iterator[str]:
    if run.text_cache is None:
        return
    yield from variant_lines(run.training_set, run.text_cache.variants)
    returning = [
        showings
        for item in run.training_set.items
        if (showings := item.repeats * run.length.epochs) > run.text_cache.variants
        and possible_variants(item, limit=showings) > run.text_cache.variants
    ]
    if returning:
        yield (
            f"    {counted(len(returning), 'image')} would have more: shown up to {max(returning)} times, so that variants come "
            "back; a larger --caption_variants needs more room and time to cache"
        )


def variant_lines(training_set: TrainingSet, variants: int) -> Iterator[str]:
    """How many captions are cached in more than one variant; those that never change have one."""
    counts = [count for item in training_set.items if (count := possible_variants(item, limit=variants)) > 1]
    if not counts and variants > 1:
        yield "  captions: none of them ever changes, so one variant of each is cached (--caption_variants does nothing)"
    if counts:
        yield f"  captions: up to {max(counts)} variants of {counted(len(counts), 'caption')} are cached (--caption_variants)"


def counted_times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _optimizer_line(options: Any) -> str:
    named = options.schedule.lr_scheduler_type or schedule_name(options.schedule)
    schedule = named if optimizer_kind(options.optimizer) == "plain" else "the optimizer's own"
    warmup = f", lr_warmup_steps={options.schedule.lr_warmup_steps}" if options.schedule.lr_warmup_steps else ""
    trained = next((f", trained weights {name}" for name in ("bf16", "fp16") if getattr(options.run, f"full_{name}")), "")
    return (
        f"  optimizer: {chosen_name(options.optimizer)}; learning rate schedule: {schedule}{warmup}; "
        f"precision: {options.run.weight_dtype}{trained}"
    )


def _output_lines(run: CheckedRun, size: NetworkSize) -> Iterator[str]:
    if size.trained:
        yield size.trained
    yield f"  objective: {run.options.objective}"
    yield _optimizer_line(run.options)
    yield f"  LoRA: {size.modules} modules, {size.parameters:,} parameters, a file of about {size.file_bytes / MIB:.2f} MiB"
    epochs = [epoch for epoch in range(1, run.length.epochs + 1) if run.saves.saves_epoch(epoch)]
    steps = run.length.total_steps // run.saves.every_n_steps if run.saves.every_n_steps else 0
    yield f"  saves: {len(epochs)} at epochs, {steps} at steps, 1 at the end, in {run.names.folder}"
    if run.prompts:
        yield f"  samples: {len(run.prompts)} prompts, in {run.names.folder / 'sample'}"
