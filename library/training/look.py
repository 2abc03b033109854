"""--debug_dataset, --show_captions and --show_timesteps: what would be trained, shown instead of trained. Needs no model, and
only the last one torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.dataset.captions import possible_variants
from library.dataset.clock import Clock, Moments
from library.dataset.items import Item, TrainingSet
from library.dataset.order import batches_per_epoch
from library.dataset.page.facts import Facts, find_duplicates, gather_facts
from library.dataset.page.showings import Showings
from library.dataset.page.text import caption_lines, fact_lines, visible
from library.dataset.prefetch import thread_pool
from library.dataset.token_use import TokenCounter
from library.errors import ProblemList, reader_may_leave
from library.training.architecture import Architecture
from library.training.preflight import check_writable, option_warnings, read_training_set, worker_count
from library.training.running.console import progress_bar
from library.training.steps import RunLength

if TYPE_CHECKING:
    from library.dataset.page.page import PageContent
    from library.dataset.page.pictures import SmallPictures

PAGE, TIMESTEPS = "dataset.html", "timesteps.png"  # behind --output_name
VAE_SCALE = 8  # pixels per latent side
MIB = 2**20
ANY_CAPTION = "a"
NOTABLE = 20  # of each kind of image worth a look: these are on the page whatever else is


def look(options: Any, architecture: Architecture) -> None:
    """Prints and writes what the flags ask for, on the main process only. Raises UserError with all that is wrong."""
    if os.environ.get("RANK", "0") != "0":
        return
    if options.look.show_timesteps:
        look_at_timesteps(options, architecture)
    if options.look.shows_dataset:
        look_at_dataset(options, architecture)


def look_at_timesteps(options: Any, architecture: Architecture) -> None:
    """Draws them for the sizes of the dataset's pictures, where the sampling depends on sizes."""
    path = output_path(options, TIMESTEPS)
    check_writable(path.parent, "--output_dir")
    flow, sizes = getattr(options, "flow", None), {(0, 0): 1.0}
    if flow is not None and flow.depends_on_sizes:
        sizes = latent_sizes(read_training_set(options, architecture))
    from library.files.atomic import write_atomically
    from library.training.timestep_picture import ddpm_shares, draw_timesteps, flow_shares, shares_lines

    shares = ddpm_shares(options.ddpm) if flow is None else flow_shares(flow, sizes)
    picture = draw_timesteps(shares)
    write_atomically(path, lambda file: picture.save(file, "PNG"))
    _say([*shares_lines(shares), f"picture: {path}"])


def latent_sizes(training_set: TrainingSet) -> dict[tuple[int, int], float]:
    """Latent (h, w) -> how many pictures of it an epoch shows."""
    sizes: dict[tuple[int, int], float] = {}
    for item in training_set.items:
        width, height = item.bucket_wh
        size = height // VAE_SCALE, width // VAE_SCALE
        sizes[size] = sizes.get(size, 0) + item.repeats
    return sizes


def look_at_dataset(options: Any, architecture: Architecture) -> None:
    problems = ProblemList()
    if options.look.debug_dataset:
        with problems.collect():
            check_writable(output_path(options, PAGE).parent, "--output_dir")
    count_tokens = training_set = None
    with problems.collect():
        count_tokens = architecture.token_counter(options)
    with problems.collect():
        training_set = read_training_set(options, architecture)
    problems.raise_if_any()
    assert count_tokens is not None and training_set is not None
    showings = showings_of(options, training_set)
    warnings = (*option_warnings(options), *training_set.warnings)
    with reader_may_leave():
        if options.look.show_captions is not None:
            _say(f"before every caption: {visible(text)}\n" for text in before_captions(options, architecture))
            _say(caption_lines(training_set, showings, count_tokens, images=options.look.show_captions))
        if options.look.debug_dataset:
            content = _page_content(options, architecture, training_set, showings, count_tokens)
            _write_page(output_path(options, PAGE), replace(content, warnings=warnings))
        else:
            _say(_warning_lines(warnings))


def before_captions(options: Any, architecture: Architecture) -> Iterator[str]:
    """What the text encoder gets before every caption that is not empty, where it gets anything."""
    if before := architecture.positive_prompt(ANY_CAPTION, options).removesuffix(ANY_CAPTION).rstrip():
        yield before


def output_path(options: Any, ending: str) -> Path:
    """Where a page or picture is written."""
    name = options.saving.output_name
    return Path(options.saving.output_dir or ".") / (f"{name}-{ending}" if name else ending)


def run_length(options: Any, training_set: TrainingSet) -> RunLength:
    return RunLength.of(options.run, batches_per_epoch(training_set, processes=_processes()))


def showings_of(options: Any, training_set: TrainingSet) -> Showings:
    """Draws as the run with these options would; without --seed as one with seed 0."""
    length, seed = run_length(options, training_set), options.run.seed or 0
    variants = None
    if options.caches.text_cached:
        from library.dataset.caches.text_cache import default_variants

        variants = options.caches.caption_variants or default_variants(training_set, length.epochs)
    return Showings(
        seed=seed,
        variants=variants,
        moments=Moments(training_set, Clock(length.accumulation, length.total_steps), seed=seed, processes=_processes()),
        validation_from=len(training_set.items),
        steps_per_epoch=length.steps_per_epoch,
        epochs=length.epochs,
        total_steps=length.total_steps,
    )


def _page_content(
    options: Any, architecture: Architecture, training_set: TrainingSet, showings: Showings, count_tokens: TokenCounter
) -> PageContent:
    from library.dataset.page.page import PageContent

    facts = _facts(training_set, showings, count_tokens)
    return PageContent(
        title=f"{options.saving.output_name or 'dataset'}: what will be trained",
        architecture=architecture.name,
        facts=facts,
        showings=showings,
        count_tokens=count_tokens,
        pictures=_pictures(training_set, showings, facts, workers=max(worker_count(options), 1)),
        warnings=(),
        notes=(
            *(f"Before every caption: {text}" for text in before_captions(options, architecture)),
            *_notes(options, training_set, showings),
        ),
    )


def _write_page(path: Path, content: PageContent) -> None:
    """Writes it, and says in short what is in it."""
    from library.dataset.page.page import write_page
    from library.dataset.page.pictures import shown_words

    size = write_page(path, content)
    _say([*fact_lines(content.facts, content.showings), *_warning_lines(content.warnings)])
    _say([f"page: {path} ({size / MIB:.1f} MiB, {shown_words(len(content.pictures), content.facts.images)})"])


def _warning_lines(warnings: Sequence[str]) -> Iterator[str]:
    return (f"warning: {visible(warning)}" for warning in warnings)


def _facts(training_set: TrainingSet, showings: Showings, count_tokens: TokenCounter) -> Facts:
    duplicates = find_duplicates(training_set)
    with progress_bar("counting tokens", "caption") as progress:
        return gather_facts(
            training_set,
            showings,
            processes=_processes(),
            count_tokens=count_tokens,
            duplicates=duplicates,
            progress=progress,
        )


def _pictures(training_set: TrainingSet, showings: Showings, facts: Facts, *, workers: int) -> dict[int, SmallPictures]:
    """Of the images that the page shows, by Item.index."""
    from library.dataset.page.pictures import choose, draw

    items = choose(training_set.all_items, always=_notable(facts))
    pictures: dict[int, SmallPictures] = {}
    with progress_bar("drawing thumbnails", "image") as progress, thread_pool(workers) as pool:
        for item, drawn in zip(items, draw(items, showings, pool=pool), strict=True):
            pictures[item.index] = drawn
            progress(len(pictures), len(items))
    return pictures


def _notes(options: Any, training_set: TrainingSet, showings: Showings) -> Iterator[str]:
    if options.run.seed is None:
        yield "No --seed is given: these are examples of seed 0; a run draws its own seed, and other crops, sides and captions."
    variants = showings.variants or 1
    counts = [count for item in training_set.items if (count := possible_variants(item, limit=variants)) > 1]
    if counts:
        yield (
            f"Captions that change ({len(counts):,} of {len(training_set.items):,}) are cached in up to {max(counts)} variants "
            "each; every showing takes one of them."
        )


def _notable(facts: Facts) -> list[Item]:
    """The images that the lists of the page begin with."""
    copies = [item for group in facts.duplicates[:NOTABLE] for item in group.items[:NOTABLE]]
    cut = [cut.item for cut in facts.cut[:NOTABLE]]
    lists = (copies, facts.with_empty_mask, facts.enlarged, facts.cropped, cut, facts.without_caption)
    return [item for items in lists for item in items[:NOTABLE]]


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
