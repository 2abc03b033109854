"""Everything that can be checked before a model is loaded, and before torch is imported.

``check_run`` turns parsed options into a :class:`CheckedRun`: the dataset is read and every image decoded once, the headers
of the model files are compared with the architecture, prompts are parsed, the caches are looked through, and it is tried
whether the output folder can be written. What is wrong is reported together.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from library.dataset.image_records import ImageRecords
from library.dataset.items import TrainingSet
from library.dataset.order import batches_per_epoch
from library.dataset.scan import scan
from library.dataset.token_use import lost_text
from library.dataset.toml_config import read_datasets
from library.errors import DatasetError, OptionError, OutputError, ProblemList, os_error_text, user_errors_end_the_script
from library.files.safetensors_file import read_header
from library.files.user_path import dead_link
from library.options.declare import warnings_of
from library.sampling.picture_plan import sample_sizes, sample_warnings, sampler_problems
from library.sampling.pictures import no_picture_warning
from library.sampling.prompts import SamplePrompt, known_values, read_prompts
from library.training.architecture import Architecture
from library.training.files.hub import check_upload, fetch_state, make_repository
from library.training.files.saving_names import OutputNames, SaveSchedule
from library.training.files.state import (
    StateDescription,
    StateSettings,
    check_identity,
    find_state,
    read_description,
    state_settings,
)
from library.training.models.base_weights import with_base_weights
from library.training.models.network_checks import network_notices, network_problems
from library.training.models.networks import check_weights_file, find_network_module
from library.training.optimizing.optimizer_names import optimizer_notices, optimizer_problems, rate_problems, used_rates
from library.training.optimizing.schedule_names import schedule_notices, schedule_problems
from library.training.run_rules import run_problems, run_warnings
from library.training.running.console import progress_bar, set_up_console
from library.training.running.interrupts import watch_launcher
from library.training.running.trackers import tracker_problems
from library.training.steps import Progress, RunLength, initial_progress
from library.training.validating.validated_images import trained_now
from library.training.validating.validation_plan import split_text

if TYPE_CHECKING:
    from library.dataset.caches.latent_cache import LatentCache
    from library.dataset.caches.text_cache import TextCache

Checked = TypeVar("Checked")

MIB = 2**20
DISK_RESERVE_BYTES = 16 * MIB  # left free on the disk of the caches
UNWRITABLE_CACHES = "; give --cache_dir a folder that can be written: all cache files then go there instead of beside the images"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedData:
    """Datasets and caches that passed every check. ``options`` are the architecture's option groups."""

    options: Any
    architecture: Architecture
    layouts: Any
    training_set: TrainingSet
    seed: int
    latent_cache: LatentCache | None
    text_cache: TextCache | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun(CheckedData):
    """A run that passed every check; nothing here changes later."""

    prompts: tuple[SamplePrompt, ...]
    processes: int
    length: RunLength
    saves: SaveSchedule
    names: OutputNames
    start: Progress
    resume_folder: Path | None
    resumed: StateDescription | None
    settings: StateSettings  # of the states that this run saves


def check_run(options: Any, architecture: Architecture) -> CheckedRun:
    """Raises one UserError with all that was found. Needs no torch; loads no model."""
    problems = ProblemList()
    problems.add(*optimizer_problems(options.optimizer), *rate_problems(options))
    problems.add(*schedule_problems(options.schedule, options.optimizer))
    problems.add(*tracker_problems(options.logging), *run_problems(options))
    for flag, folder in (("--output_dir", options.saving.output_dir), ("--logging_dir", options.logging.logging_dir)):
        if folder:
            with problems.collect():
                check_writable(Path(folder), flag)
    problems.add(*thumbnail_problems(options.metadata.metadata_thumbnail))
    lora_files = [("--base_weights", file) for file in options.network.base_weights or ()]
    for flag, file in (("--network_weights", options.network.network_weights), *lora_files):
        with problems.collect():
            check_lora_file(flag, file)
    if options.network.network_module:
        with problems.collect():
            find_network_module(options.network.network_module)
    problems.add(*network_problems(options, architecture.name))
    prompts: tuple[SamplePrompt, ...] = ()
    with problems.collect():
        prompts = checked_prompts(options)
        if architecture.knows_all_samplers:
            problems.add(*sampler_problems(prompts, known_values("sample_sampler", architecture.prompt_settings)))
    with problems.collect():
        check_upload(options.hub)
    layouts, training_set = _models_and_images(options, architecture, problems)
    sizes = [*(item.bucket_wh for item in training_set.all_items), *sample_sizes(prompts, architecture.name)]
    problems.add(*architecture.size_problems(layouts, sizes, options))
    problems.raise_if_any()
    return _complete(options, architecture, layouts, training_set, prompts)


def _models_and_images(options: Any, architecture: Architecture, problems: ProblemList) -> tuple[Any, TrainingSet]:
    """Raises ``problems`` and those found here together; but before gigabytes are fetched from a hub, what is known then."""
    layouts = training_set = None
    with problems.collect():
        training_set = read_training_set(options, architecture)
    if options.fetches_models:
        problems.raise_if_any()
    with problems.collect():
        layouts = architecture.read_layouts(options)
    problems.raise_if_any()
    assert training_set is not None
    return layouts, training_set


def _complete(options: Any, architecture: Architecture, layouts: Any, training_set: TrainingSet,
              prompts: tuple[SamplePrompt, ...]) -> CheckedRun:  # fmt: skip
    """The part of the checks that needs the dataset: counts, resuming, caches."""
    processes = process_count()
    length = RunLength.of(options.run, batches_per_epoch(training_set, processes=processes))
    names = OutputNames.of(options.saving)
    begin = _beginning(options, length, names)
    settings = state_settings(
        options,
        architecture.name,
        batches_per_epoch=length.batches_per_epoch,
        datasets=training_set.datasets,
        validation_split=split_text(training_set, options),
        processes=processes,
    )
    changes = list(_changes(options, begin, settings, training_set))
    latent_cache, text_cache = make_caches(options, architecture, layouts, training_set, prompts, length)
    check_disk(training_set, (latent_cache, text_cache), options)
    if not options.run.dry_run:
        make_repository(options.hub)
    return CheckedRun(
        options=options,
        architecture=architecture,
        layouts=layouts,
        training_set=training_set,
        prompts=prompts,
        seed=run_seed(options, begin.resumed),
        processes=processes,
        length=length,
        saves=SaveSchedule.of(options.saving, length.epochs),
        names=names,
        start=begin.progress,
        resume_folder=begin.folder,
        resumed=begin.resumed,
        settings=settings,
        latent_cache=latent_cache,
        text_cache=text_cache,
        warnings=(
            *changes,
            *option_warnings(options),
            *run_warnings(options, total_steps=length.total_steps),
            *_input_warnings(options, architecture, layouts, training_set),
            *no_picture_warning(options.samples, *length.ended_by(begin.progress)),
            *prompt_warnings(prompts, architecture, options),
        ),
    )


def _input_warnings(options: Any, architecture: Architecture, layouts: Any, training_set: TrainingSet) -> Iterator[str]:
    """About the files that the run reads: LoRAs, models, images, captions."""
    yield from network_notices(options, architecture.name)
    yield from architecture.warnings_of(layouts, options)
    yield from training_set.warnings
    yield from architecture.caption_warnings(training_set, options)


class _Beginning(NamedTuple):
    """Where the run begins, and the state that it goes on from, if any."""

    progress: Progress
    folder: Path | None
    resumed: StateDescription | None


def _beginning(options: Any, length: RunLength, names: OutputNames) -> _Beginning:
    folder = _resume_folder(options, names)
    resumed = read_description(folder) if folder else None
    start = initial_progress(options.resume, length, resumed.progress if resumed else None)
    if start.step >= length.total_steps:
        raise OptionError(
            f"the state {folder} has done {start.step} steps and the run ends at {length.total_steps}: "
            "nothing is left to train; raise --max_train_steps or --max_train_epochs to go on"
        )
    return _Beginning(start, folder, resumed)


def _resume_folder(options: Any, names: OutputNames) -> Path | None:
    resume = options.resume.resume
    if resume and options.hub.resume_from_huggingface:
        return fetch_state(options.hub, resume, names.folder)
    return find_state(resume, names.states()) if resume else None


def _changes(options: Any, begin: _Beginning, settings: StateSettings, training_set: TrainingSet) -> Iterator[str]:
    """What is allowed but not as it was when the state was saved. Raises OptionError for what must be equal."""
    if begin.folder is None or begin.resumed is None:
        return
    yield from check_identity(begin.folder, begin.resumed, settings)
    if warning := trained_now(begin.resumed.validation.images, training_set):
        yield warning
    seed = begin.resumed.seed
    if options.run.seed not in (None, seed):
        yield f"--seed was {seed} when the state was saved and is {options.run.seed} now: other random numbers"


def check_lora_file(flag: str, file: str | None) -> None:
    """A LoRA file that is missing or damaged; whether it fits the model shows once the network is made."""
    if file is not None:
        check_weights_file(flag, file)
        if Path(file).suffix == ".safetensors":
            read_header(Path(file))


def option_warnings(options: Any) -> Iterator[str]:
    """What is allowed but does not do what one may think."""
    yield from warnings_of(options)
    yield from optimizer_notices(options.optimizer, used_rates(options))
    yield from schedule_notices(options.schedule, options.optimizer)


def run_seed(options: Any, resumed: StateDescription | None) -> int:
    """--seed, else the seed of the resumed state, else a random one (the main process's counts)."""
    if options.run.seed is not None:
        return options.run.seed
    return resumed.seed if resumed is not None else secrets.randbits(32)


def thumbnail_problems(value: str | None) -> list[str]:
    if not value or value.startswith("data:") or Path(value).is_file():
        return []
    return [f"--metadata_thumbnail {value}: there is no such file; give a picture or a data: URL"]


def check_writable(folder: Path, what: str, cure: str = "") -> None:
    """Makes the folder and tries to write into it. ``cure`` ends the message of the OutputError."""
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        if folder.is_file():
            raise OutputError(f"{what} {folder} is a file, not a folder: name a folder{cure}") from error
        why = dead_link(folder) or os_error_text(error)
        cure = cure or "; name a folder on a disk that can be written to"
        raise OutputError(f"{what} {folder}: the folder cannot be made or written to: {why}{cure}") from error
    finally:
        with suppress(OSError):  # where the folder is no folder, the error above says so
            probe.unlink(missing_ok=True)


def checked_prompts(options: Any) -> tuple[SamplePrompt, ...]:
    samples = options.samples
    return tuple(read_prompts(Path(samples.sample_prompts))) if samples.sample_prompts else ()


def prompt_warnings(prompts: tuple[SamplePrompt, ...], architecture: Architecture, options: Any) -> Iterator[str]:
    texts = list(_encoded_texts(prompts, architecture, options))
    cut = dict(architecture.cut_prompts([text for _, text in texts], options))
    lost = (f"prompt {index + 1} {lost_text(text, cut[text])}" for index, text in texts if text in cut)
    for warning in (*sample_warnings(prompts, architecture.prompt_settings, architecture.name, title=options.MODEL), *lost):
        yield f"--sample_prompts: {warning}"


def read_training_set(options: Any, architecture: Architecture) -> TrainingSet:
    """Every image verified and placed. What is found out about the files is remembered beside them, or in --cache_dir."""
    datasets = read_datasets(options, bucket_step=architecture.bucket_step)
    cache_dir = Path(options.caches.cache_dir) if options.caches.cache_dir else None
    records = ImageRecords(cache_dir, writes=os.environ.get("RANK", "0") == "0")
    with progress_bar("checking images", "image") as progress:
        training_set = scan(
            datasets,
            skip_bad_images=options.dataset.skip_bad_images,
            workers=max(worker_count(options), 1),
            progress=progress,
            records=records,
            seed=options.run.seed,
            processes=process_count(),
        )
    if all(item.subset.is_reg for item in training_set.items):
        raise DatasetError("there are only regularisation images: add a subset of images to train")
    return training_set


def process_count() -> int:
    """Of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def worker_count(options: Any) -> int:
    """Threads that read and decode: --max_data_loader_n_workers, at most one for each core."""
    return min(options.dataset.max_data_loader_n_workers, os.cpu_count() or 1)


def make_caches(options: Any, architecture: Architecture, layouts: Any, training_set: TrainingSet,
                prompts: tuple[SamplePrompt, ...], length: RunLength) -> tuple[LatentCache | None, TextCache | None]:  # fmt: skip
    from library.dataset.caches.latent_cache import LatentCache
    from library.dataset.caches.text_cache import TextCache, default_variants

    caches = options.caches
    latent_cache = text_cache = None
    where: dict[str, Any] = {"cache_dir": caches.cache_dir, "skip_check": caches.skip_cache_check}
    if caches.latents_cached:
        recipe = architecture.latent_recipe(layouts, options)
        latent_cache = LatentCache(training_set, recipe, on_disk=caches.cache_latents_to_disk, **where)
    if caches.text_cached:
        variants = caches.caption_variants or default_variants(training_set, length.epochs)
        text_cache = TextCache(
            training_set,
            with_base_weights(architecture.text_recipe(layouts, options), options.network),
            variants=variants,
            extra_texts=prompt_texts(prompts, architecture, options),
            on_disk=caches.cache_text_encoder_outputs_to_disk,
            **where,
        )
    return latent_cache, text_cache


def prompt_texts(prompts: tuple[SamplePrompt, ...], architecture: Architecture, options: Any) -> tuple[str, ...]:
    """Texts besides captions whose conditioning a run needs; the empty one, for dropout, every cache has by itself."""
    return tuple(cached_prompt(text, architecture) for _, text in _encoded_texts(prompts, architecture, options))


def _encoded_texts(prompts: tuple[SamplePrompt, ...], architecture: Architecture, options: Any) -> Iterator[tuple[int, str]]:
    """(the prompt's number, text) of what is encoded for sample pictures."""
    for prompt in prompts:
        yield prompt.index, architecture.positive_prompt(prompt.prompt, options)
        yield prompt.index, prompt.negative_prompt or ""


def cached_prompt(text: str, architecture: Architecture) -> str:
    """What a sample prompt is called in the cache of texts."""
    from library.dataset.caches.text_files import PROMPT_MARK

    return PROMPT_MARK + text if architecture.prompts_apart else text


def check_disk(training_set: TrainingSet, caches: Sequence[LatentCache | TextCache | None], options: Any) -> None:
    """Raises OutputError when the disk of the caches has less room than they still need."""
    needed = sum(cache.state().bytes_needed for cache in caches if cache is not None and cache.on_disk)
    if not needed:
        return
    for folder in cache_folders(training_set, options):
        check_writable(folder, "the caches cannot be written to", UNWRITABLE_CACHES)
        place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed + DISK_RESERVE_BYTES > free:
            raise OutputError(
                f"the caches still need about {needed / MIB:,.0f} MiB, and {DISK_RESERVE_BYTES // MIB} MiB should stay free, but "
                f"{place} has {free / MIB:,.0f} MiB free: free some space, or choose another disk with --cache_dir"
            )


def cache_folders(training_set: TrainingSet, options: Any) -> set[Path]:
    """Where cache files lie: --cache_dir, else beside the images."""
    if options.caches.cache_dir:
        return {Path(options.caches.cache_dir)}
    return {item.path.parent for item in training_set.all_items}


def checked_run(read: Callable[[], Any], architecture: Architecture) -> CheckedRun:
    """For a script's first lines: reads the command line and checks the run, ending the script on a mistake."""
    return checked_start(read, architecture, lambda options: check_run(options, architecture))


def checked_start(read: Callable[[], Any], architecture: Architecture, check: Callable[[Any], Checked]) -> Checked:
    """Reads the command line and gives what ``check`` makes of its options; ends the script on a mistake, and after a look.

    The garbage collector is off from then on: it would look through every module of torch while that is imported, which takes
    a good part of the start. ``run_training`` switches it on again.
    """
    with user_errors_end_the_script():
        options = read()
        set_up_console(options.console)
        watch_launcher()
        if options.look.only:
            from library.training.look import look

            look(options, architecture)
            raise SystemExit
        checked = check(options)
        gc.disable()
        return checked
    raise AssertionError("user_errors_end_the_script does not return after an error")
