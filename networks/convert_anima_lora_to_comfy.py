"""Gives an Anima LoRA the names of another program: ComfyUI's, diffusers', or with --reverse those of this project again.

    python networks/convert_anima_lora_to_comfy.py my_lora.safetensors my_lora_comfy.safetensors
    python networks/convert_anima_lora_to_comfy.py my_lora.safetensors my_lora_diffusers.safetensors --format diffusers
    python networks/convert_anima_lora_to_comfy.py somebodys_lora.safetensors ours.safetensors --reverse

Newer versions of ComfyUI take this project's files as they are. Between those two nothing but names changes, so that --reverse
gives the file back; what diffusers' layout loses is told. See docs/anima_train_network.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import CheckpointError, OptionError, ProblemList, did_you_mean, user_errors_end_the_script
from library.files.model_path import find_model_file
from library.files.user_path import PathProblem, user_path
from networks.anima_layouts import ANIMA_NAMES
from networks.layout_names import COMFY, DIFFUSERS, OURS, TITLES, Key, understood

if TYPE_CHECKING:
    from networks.lora_formats import Converted

ENDING = ".safetensors"
DENOISER = "denoiser"
FLAGS = ("--reverse", "--format", "--overwrite", "--denoiser_only", "--help")


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors_end_the_script():
        options = read_command(argv)
        layout = OURS if options.reverse else options.format or COMFY
        source, target = checked_paths(options)
        for line in convert_file(source, target, layout, only=DENOISER if options.denoiser_only else None):
            print(line)


class Parser(argparse.ArgumentParser):
    """Errors are told like those of all other scripts."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        near = did_you_mean(unknown, FLAGS) if unknown.startswith("-") else ""
        raise OptionError(f"{message}{near}; --help shows how the command is written")


def read_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Give an Anima LoRA the names of another program.", allow_abbrev=False)
    parser.add_argument("src_path", metavar="SRC", help="the LoRA file to convert")
    parser.add_argument("dst_path", metavar="DST", help="the .safetensors file to write; its folder must exist")
    parser.add_argument("--reverse", action="store_true", help="from ComfyUI's or diffusers' names to this project's")
    parser.add_argument("--format", choices=(COMFY, DIFFUSERS), help="whose names the new file has (default: comfy)")
    parser.add_argument(
        "--denoiser_only", action="store_true", help="leave out the text encoder's part, which diffusers cannot load"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    options = parser.parse_args(argv)
    if options.reverse and options.format:
        raise OptionError(f"--reverse and --format={options.format} say opposite things: --reverse alone reads both layouts")
    return options


def checked_paths(options: argparse.Namespace) -> tuple[Path, Path]:
    """(source, target). Raises one error with all that is wrong with either."""
    problems = ProblemList()
    source = target = Path()
    with problems.collect():
        source = find_model_file("SRC", written_path("SRC", options.src_path), "LoRA to convert")
    with problems.collect():
        target = written_path("DST", options.dst_path)
        problems.add(*target_problems(target))
    if not problems and target.exists() and target.samefile(source):
        problems.add(f"DST {target} is the file to convert itself: choose another name for the new one")
    elif not problems and target.exists() and not options.overwrite:
        problems.add(f"DST {target} is there already: choose another name, or give --overwrite to replace it")
    problems.raise_if_any()
    return source, target


def written_path(what: str, text: str) -> Path:
    try:
        return Path(user_path(text))
    except PathProblem as problem:
        raise OptionError(f"{what} {problem}") from problem


def target_problems(target: Path) -> Iterator[str]:
    if target.is_dir():
        yield f"DST {target} is a folder: add the name of the new file, such as {target / 'my_lora_comfy.safetensors'}"
    elif target.suffix != ENDING:
        yield f"DST {target}: the new file is a safetensors file: let its name end in {ENDING}"
    elif not target.parent.is_dir():
        yield f"DST {target}: there is no folder {target.parent}: make it first, or choose another"


def convert_file(source: Path, target: Path, layout: str, *, only: str | None = None) -> Iterator[str]:
    """Writes ``source`` as ``target`` in ``layout``; yields what there is to say about it.

    Raises CheckpointError, with nothing written, for a file that is damaged, no Anima LoRA, or not of the layout that is
    converted.
    """
    from networks.lora_formats import ADAPTER_METADATA, by_our_name, convert
    from networks.weights_file import read_tensors_of, write_lora_file

    tensors, metadata = read_tensors_of(source)
    keys = understood(source, tensors, ANIMA_NAMES)
    if problem := direction_problem(source, keys, layout):
        raise CheckpointError(problem)
    modules = by_our_name(source, tensors, keys, metadata)
    try:
        converted = convert(source, modules, layout, only=only)
    except CheckpointError as error:
        if layout == DIFFUSERS and any(key.module.part != DENOISER for key, _ in modules.values()):
            raise CheckpointError(*(f"{problem}; --denoiser_only leaves them out" for problem in error.problems)) from error
        raise
    if not converted.tensors:
        raise CheckpointError(
            f"{source} has only modules of the text encoder ({len(modules)}), and --denoiser_only leaves them all out: nothing "
            "would be left to write; drop --denoiser_only, or choose a LoRA that changes the denoiser"
        )
    # what it says about the strength is in the tensors by now
    kept = {key: value for key, value in metadata.items() if key != ADAPTER_METADATA}
    write_lora_file(target, converted.tensors, kept or None)
    yield from report(target, len(modules), converted, layout)


def direction_problem(source: Path, keys: Mapping[str, Key], layout: str) -> str | None:
    """A problem if the file is not of the layout that the command converts from; else None."""
    counts = Counter(key.layout for key in keys.values())
    if layout == OURS:
        if set(counts) == {OURS}:
            return f"{source} has {TITLES[OURS]}, this project's, already: leave out --reverse to convert it"
        return None
    if set(counts) == {OURS}:
        return None
    if len(counts) > 1:
        mixed = " and ".join(f"{TITLES[name]} ({count} tensors)" for name, count in counts.items())
        return f"{source} mixes {mixed}: --reverse gives all of it this project's names, which can then be converted"
    (found,) = counts
    if found == layout:
        return f"{source} has {TITLES[found]} already: --reverse gives it this project's names"
    return f"{source} has {TITLES[found]}: --reverse gives it this project's, which can then be converted to {TITLES[layout]}"


def report(target: Path, modules: int, converted: Converted, layout: str) -> Iterator[str]:
    yield f"wrote {target}: {modules - converted.left_out} modules under {TITLES[layout]}"
    if converted.left_out:
        yield f"left out: {converted.left_out} modules of the text encoder"
    if converted.folded:
        rounded = f"rounding changed no weight by more than {converted.rounding:.1g} of its module's largest"
        change = rounded if converted.rounding else "without rounding"
        yield (
            f"alpha / rank is multiplied into lora_B of {converted.folded} modules ({change}); this layout has no alpha, "
            "and --reverse gives the same LoRA with alpha = rank"
        )


if __name__ == "__main__":
    main()
