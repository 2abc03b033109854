"""The start of an inference script: everything that can be checked before torch is imported and a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from library.errors import CheckpointError, OptionError, ProblemList, user_errors_end_the_script
from library.files.model_path import LORA, recognise, with_article
from library.files.safetensors_file import SafetensorsHeader, read_header
from library.options.declare import warnings_of
from library.sampling.picture_plan import FLOW_SETTINGS, given_prompts, pictures_of, plan_warnings
from library.sampling.prompts import SamplePrompt
from library.training.models.networks import check_weights_file
from library.training.preflight import check_writable
from library.training.run_rules import attention_problems
from library.training.running.console import set_up_console

LATENT = "latent"  # the tensor's name in a file of latents
Found = TypeVar("Found")

LoraProblem = Callable[[Any, SafetensorsHeader], str | None]  # options, header -> why the file cannot be merged


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPictures:
    """What to draw, or the latents to decode, checked. ``layouts``: the architecture's own, of the model's files."""

    options: Any
    layouts: Any
    prompts: tuple[SamplePrompt, ...]
    latents: tuple[Path, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceChecks:
    """What an architecture says about itself before torch is imported."""

    read_layouts: Callable[[Any], Any]  # options -> layouts of the files of ``options.parts``; raises CheckpointError
    lora_problem: LoraProblem
    latent_channels: Callable[[Any], int | None]  # layouts -> channels of the latents, where the files tell
    side_step: int  # pixels
    samplers: Collection[str]
    settings: Collection[str] = FLOW_SETTINGS  # the keys of a prompt that the model draws by
    model_warnings: Callable[[Any, Any], Iterable[str]] = lambda layouts, options: ()
    size_problems: Callable[[Any, Iterable[tuple[int, int]]], Iterable[str]] = lambda layouts, sizes_wh: ()


def checked_pictures(read: Callable[[], Any], checks: InferenceChecks) -> CheckedPictures:
    """For a script's first lines: reads the command line and checks it, ending the script on a mistake."""
    with user_errors_end_the_script():
        options = read()
        set_up_console(options.console)
        return check_pictures(options, checks)
    raise AssertionError("user_errors_end_the_script does not return after an error")


def check_pictures(options: Any, checks: InferenceChecks) -> CheckedPictures:
    """Raises one UserError with all that was found."""
    problems = ProblemList()
    problems.add(*attention_problems(options.attention))
    if options.loras.lycoris and find_spec("lycoris") is None:
        problems.add("--lycoris needs the package lycoris-lora: pip install lycoris-lora")
    prompts: tuple[SamplePrompt, ...] = ()
    layouts = None
    with problems.collect():
        check_folder(Path(options.output.folder), options.output.FOLDER_FLAG)
    with problems.collect():
        prompts = given_prompts(options.prompts, checks.samplers, options.loras)
    for file, _ in options.loras.files if "denoiser" in options.parts else ():
        with problems.collect():
            check_lora(file, options, checks.lora_problem)
    with problems.collect():
        layouts = checks.read_layouts(options)
    latents = tuple(Path(file) for file in options.output.latent_path or ())
    for path in latents:
        with problems.collect():
            check_latents(path, checks.latent_channels(layouts) if layouts is not None else None)
    if layouts is not None and not latents and not options.prompts.interactive:
        problems.add(*checks.size_problems(layouts, drawn_sizes(prompts, options, checks.side_step)))
    problems.raise_if_any()
    warnings = (*checks.model_warnings(layouts, options), *_warnings(options, prompts, checks))
    return CheckedPictures(options=options, layouts=layouts, prompts=prompts, latents=latents, warnings=warnings)


def drawn_sizes(prompts: Iterable[SamplePrompt], options: Any, side_step: int) -> list[tuple[int, int]]:
    """Width and height of the pictures of each prompt, in pixels."""
    pictures = [pictures_of(prompt, options.prompts, side_step=side_step)[0] for prompt in prompts]
    return [(picture.width, picture.height) for picture in pictures]


def with_own_flags(read: Callable[[], Found], names: Mapping[str, str]) -> Found:
    """What ``read`` gives, its errors with the flags of a script that has other ``names`` for them than training."""
    try:
        return read()
    except (CheckpointError, OptionError) as error:
        raise type(error)(*(own_flag_names(problem, names) for problem in error.problems)) from error


def own_flag_names(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"(?<![\w-])--\w+", lambda flag: names.get(flag[0], flag[0]), text)


def _warnings(options: Any, prompts: tuple[SamplePrompt, ...], checks: InferenceChecks) -> Iterator[str]:
    yield from warnings_of(options)
    if not options.output.latent_path:
        yield from plan_warnings(
            prompts or (SamplePrompt(prompt="", index=0),), options.prompts, checks.side_step, checks.settings
        )


def check_folder(folder: Path, flag: str) -> None:
    """Makes the folder and tries to write into it. Raises OutputError, or OptionError for a file of that name."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{flag} {folder} is a file: name a folder for the pictures")
    check_writable(folder, flag)


def check_lora(file: str, options: Any, problem_of: LoraProblem) -> None:
    """A LoRA file that is missing, damaged or something else; whether it fits the model shows when that is built."""
    path, flag = Path(file), options.loras.FLAG
    if path.is_dir():
        raise CheckpointError(f"{flag} {path} is a folder: give the LoRA file in it")
    check_weights_file(flag, file)
    if path.suffix != ".safetensors":
        return  # a pickle, which only torch reads
    header = read_header(path)
    kind = recognise(header)
    if kind not in (None, LORA):
        raise CheckpointError(f"{flag} {path} is {with_article(str(kind))}, not a LoRA file: give a LoRA file")
    if problem := problem_of(options, header):
        raise CheckpointError(problem)


def check_latents(path: Path, channels: int | None) -> None:
    """A file of latents that is missing, damaged, or for another image coder."""
    if path.is_dir():
        raise CheckpointError(f"--latent_path {path} is a folder: give the files in it that end in _latent.safetensors")
    check_weights_file("--latent_path", path)
    tensors = read_header(path).tensors
    if LATENT not in tensors:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        raise CheckpointError(f"--latent_path {path} holds no tensor {LATENT!r} (it has {names}): give a file that was written "
                              "with --output_type=latent")  # fmt: skip
    shape = tensors[LATENT].shape
    found = picture_shape(shape)
    if found is None or channels not in (None, found[0]):
        wanted = f"({channels or 'channels'}, height / 8, width / 8)"
        raise CheckpointError(f"--latent_path {path} holds latents of shape {shape}; this model's are {wanted}")


def picture_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """(C, h, w) of the latents of one picture, which may have axes of batch and frame: (1, C, h, w), (C, 1, h, w) or
    (1, C, 1, h, w). None for anything else."""
    if len(shape) == 5 and shape[0] == shape[2] == 1:
        return shape[1], *shape[3:]
    if len(shape) == 4 and 1 in shape[:2]:
        return shape[1:] if shape[0] == 1 else (shape[0], *shape[2:])
    return shape if len(shape) == 3 and min(shape) > 0 else None
