"""What an inference script shall draw: prompts with their settings become pictures with every setting decided. Needs no torch."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from library.errors import OptionError, did_you_mean
from library.sampling.prompts import MAX_STEPS, SamplePrompt, read_prompt_line, read_prompts

# the keys of a prompt that flow models draw by; --l and --g both mean the scale of guidance
FLOW_SETTINGS = frozenset(
    {"negative_prompt", "width", "height", "seed", "sample_steps", "scale", "guidance_scale", "flow_shift", "sample_sampler"}
)
LUMINA_SETTINGS = FLOW_SETTINGS | {"cfg_trunc_ratio", "renorm_cfg"}
DIFFUSION_SETTINGS = FLOW_SETTINGS - {"flow_shift"}  # the same of Stable Diffusion and SDXL
MIN_SIDE_PX = 64
RANDOM_SEED_BITS = 32
EMPTY_PROMPT, EMPTY_NEGATIVE = '""', "-"  # how a typed line writes them
GLUED = re.compile(r"(?<= --)([whsdlgcm])(?=[\d.])")  # a number right behind its letter, as sd-scripts' script for SD3 takes it
LARGE_PX, USUAL_PX = 2048 * 2048, 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDefaults:
    """What counts for a picture of a training where its prompt says nothing. Those of the class are Stable Diffusion's."""

    side: int = 512  # pixels, both ways
    side_step: int = 8  # sides are rounded down to multiples of it
    steps: int = 30
    scale: float = 7.5
    shift: float | None = None  # None for models without, here and below
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None


# name of the architecture -> its defaults, as in the reference
SAMPLE_DEFAULTS: Mapping[str, SampleDefaults] = {
    "anima": SampleDefaults(side_step=16, shift=3.0),
    "sd3": SampleDefaults(side_step=16, shift=3.0),
    "lumina": SampleDefaults(
        side=1024, side_step=16, steps=36, scale=3.5, shift=6.0, cfg_trunc_ratio=0.25, renorm_cfg=1.0
    ),
}  # fmt: skip


def sample_defaults(architecture: str) -> SampleDefaults:
    return SAMPLE_DEFAULTS.get(architecture, SampleDefaults())


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture to draw."""

    prompt: str
    negative_prompt: str
    width: int  # pixels, a multiple of what the model needs
    height: int
    seed: int
    steps: int
    scale: float  # of classifier-free guidance, 1 = none
    sampler: str
    shift: float | None = None  # of the noise levels; None for models without, here and below
    cfg_trunc_ratio: float | None = None  # share of the way from noise to image on which there is guidance
    renorm_cfg: float | None = None  # longest guided velocity, in lengths of the one with the prompt; 0 = any
    prompt2: str | None = None  # another text for the second text encoder
    lora_multipliers: tuple[float, ...] = ()  # strengths of the first LoRA files, in place of those of the command

    @property
    def flow_shift(self) -> float:
        """The shift of a flow model's picture."""
        assert self.shift is not None, "this model has no shift"
        return self.shift

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt acts. With a scale below 1 the picture goes towards it."""
        return self.scale != 1 and self.cfg_trunc_ratio != 0


class PromptDefaults(Protocol):
    """The options that stand in for what a prompt leaves open."""

    @property
    def prompt(self) -> str | None: ...
    @property
    def negative_prompt(self) -> str: ...
    @property
    def from_file(self) -> str | None: ...
    @property
    def image_size(self) -> Sequence[int]: ...  # height, width
    @property
    def infer_steps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def flow_shift(self) -> float | None: ...  # None for models without, here and below
    @property
    def cfg_trunc_ratio(self) -> float | None: ...
    @property
    def renorm_cfg(self) -> float | None: ...
    @property
    def sampler(self) -> str: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def images_per_prompt(self) -> int: ...
    @property
    def prompt2(self) -> str | None: ...


class GivenLoras(Protocol):
    """The options that name LoRA files."""

    @property
    def files(self) -> Sequence[tuple[str, float]]: ...  # path, strength
    @property
    def merged(self) -> bool: ...  # into the weights: each keeps one strength


def given_prompts(
    options: PromptDefaults, samplers: Collection[str], loras: GivenLoras | None = None
) -> tuple[SamplePrompt, ...]:
    """The prompts of --from_file or --prompt; none for a script that asks for them. Raises OptionError with all problems."""
    if not options.from_file:
        return () if options.prompt is None else (SamplePrompt(prompt=options.prompt, index=0),)
    prompts = read_prompts(Path(options.from_file), flag="--from_file")
    problems = [
        f"--from_file {options.from_file}, prompt {prompt.index + 1}: {problem}"
        for prompt in prompts
        for problem in prompt_problems(prompt, samplers, loras)
    ]
    if problems:
        raise OptionError(*problems)
    return tuple(prompts)


def asked_prompt(line: str, samplers: Collection[str], loras: GivenLoras | None = None) -> SamplePrompt:
    """The prompt of a line that someone typed; ``""`` is an empty one, ``--n -`` an empty negative one. Raises OptionError with
    everything that is wrong."""
    if re.match(r"\s*--[A-Za-z]", line):  # in a file it is text, but here a slip
        raise OptionError(f"the line begins with a flag: write the prompt before it, or {EMPTY_PROMPT} to draw without one")
    prompt = read_prompt_line(in_our_letters(line))
    if prompt.prompt.strip() == EMPTY_PROMPT:
        prompt = replace(prompt, prompt="")
    if (prompt.negative_prompt or "").strip() == EMPTY_NEGATIVE:
        prompt = replace(prompt, negative_prompt="")
    if problems := list(prompt_problems(prompt, samplers, loras)):
        raise OptionError(*problems)
    return prompt


def in_our_letters(line: str) -> str:
    """What is typed for sd-scripts' script for SD3: ``--w832`` and ``--c5``, for the scale of guidance."""
    return re.sub(r"(?<= --)c(?= )", "l", GLUED.sub(r"\1 ", line))


def line_help(
    options: PromptDefaults, samplers: Collection[str], *, two_prompts: bool = False, strengths: Sequence[float] = ()
) -> str:
    """What a typed line may hold, with what counts where it says nothing. ``strengths``: those of LoRA files that a line can
    change."""
    usual = ",".join(f"{strength:g}" for strength in strengths)
    height, width = options.image_size
    flags = {
        "--n TEXT": f"negative prompt [{options.negative_prompt or 'empty'}]",
        "--w N, --h N": f"width and height in pixels [{width}, {height}]",
        "--d N": f"seed [{'random' if options.seed is None else options.seed}]",
        "--s N": f"steps [{options.infer_steps}]",
        "--l X": f"scale of guidance, 1 = none [{options.guidance_scale:g}]",
        **({} if options.flow_shift is None else {"--fs X": f"shift of the noise levels [{options.flow_shift:g}]"}),
        **_guidance_help(options),
        "--ss NAME": f"sampler: {' or '.join(samplers)} [{options.sampler}]",
        **({"--p2 TEXT": f"prompt of the second text encoder [{options.prompt2 or 'the same'}]"} if two_prompts else {}),
        **({"--m X,X": f"strengths of the LoRA files, in their order [{usual}]"} if strengths else {}),
    }
    return "\n".join([
        f"a prompt, then flags for it, as in: a red house --w 832 --h 1216 --d 42; {EMPTY_PROMPT} is an empty prompt",
        *(f"  {flag:<14}{meaning}" for flag, meaning in flags.items()),
        "help shows this text; quit, exit or the input's end (Ctrl-D; on Windows Ctrl-Z and Enter) ends",
    ])  # fmt: skip


def _guidance_help(options: PromptDefaults) -> dict[str, str]:
    ratio, longest = options.cfg_trunc_ratio, options.renorm_cfg
    return {
        **({} if ratio is None else {"--ctr X": f"part of the way with guidance, 1 or more = all of it [{ratio:g}]"}),
        **({} if longest is None else {"--rcfg X": f"longest guided step, in lengths of an unguided one, 0 = any [{longest:g}]"}),
    }


def prompt_problems(prompt: SamplePrompt, samplers: Collection[str], loras: GivenLoras | None = None) -> Iterator[str]:
    """What is right in a prompt file, but cannot be drawn."""
    name = prompt.sample_sampler
    if name is not None and name not in samplers:
        yield f"--ss {name} is no sampler here{did_you_mean(name, samplers)}: give {' or '.join(samplers)}"
    if prompt.sample_steps is not None and prompt.sample_steps != drawn_steps(prompt.sample_steps):
        yield f"--s (sample_steps) is {prompt.sample_steps}: give 1 to {MAX_STEPS}"
    if prompt.scale is not None and prompt.guidance_scale not in (None, prompt.scale):
        yield f"--l {prompt.scale:g} and --g {prompt.guidance_scale:g} both mean the scale of guidance: give one of them"
    if prompt.lora_multipliers and loras is not None:
        yield from strength_problems(prompt.lora_multipliers, loras)


def strength_problems(given: Sequence[float], loras: GivenLoras) -> Iterator[str]:
    """Why LoRA files cannot have the strengths that one prompt gives them."""
    written = f"--m {','.join(f'{strength:g}' for strength in given)} (lora_multipliers)"
    if loras.merged and loras.files:
        yield f"{written}: LoRA files that are merged into the weights have one strength for all pictures: give it with each file"
    elif len(given) > len(loras.files):
        yield f"{written}: there are more numbers than LoRA files ({len(loras.files)}): give at most one for each"


def pictures_of(prompt: SamplePrompt, options: PromptDefaults, *, side_step: int) -> list[Picture]:
    """The pictures of a prompt, seeds counting up. Sides are rounded down to multiples of ``side_step`` pixels.

    Without any seed the first one is random.
    """
    height, width = options.image_size
    seed = next((seed for seed in (prompt.seed, options.seed) if seed is not None), None)
    first = secrets.randbits(RANDOM_SEED_BITS) if seed is None else seed
    scales = (prompt.scale, prompt.guidance_scale, options.guidance_scale)
    return [
        Picture(
            prompt=prompt.prompt,
            negative_prompt=options.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt,
            width=rounded_side(prompt.width or width, side_step),
            height=rounded_side(prompt.height or height, side_step),
            seed=(first + number) % 2**63,
            steps=options.infer_steps if prompt.sample_steps is None else prompt.sample_steps,
            scale=next(scale for scale in scales if scale is not None),
            shift=given_or(prompt.flow_shift, options.flow_shift),
            cfg_trunc_ratio=given_or(prompt.cfg_trunc_ratio, options.cfg_trunc_ratio),
            renorm_cfg=given_or(prompt.renorm_cfg, options.renorm_cfg),
            sampler=prompt.sample_sampler or options.sampler,
            prompt2=options.prompt2 if prompt.prompt2 is None else prompt.prompt2,
            lora_multipliers=prompt.lora_multipliers or (),
        )
        for number in range(options.images_per_prompt)
    ]


def given_or(given: float | None, default: float | None) -> float | None:
    """What a prompt says, else the default; None for models that do not have the setting."""
    return default if default is None or given is None else given


def sample_picture(prompt: SamplePrompt, seed: int, *, sampler: str, defaults: SampleDefaults) -> Picture:
    """A picture of a training: what the prompt says, then the model's defaults."""
    width, height = sample_size(prompt, defaults)
    return Picture(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt or "",
        width=rounded_side(width, defaults.side_step),
        height=rounded_side(height, defaults.side_step),
        seed=seed,
        steps=defaults.steps if prompt.sample_steps is None else drawn_steps(prompt.sample_steps),
        scale=max(defaults.scale if prompt.scale is None else prompt.scale, 1.0),  # below 1 there is no guidance either
        shift=given_or(prompt.flow_shift, defaults.shift),
        cfg_trunc_ratio=given_or(prompt.cfg_trunc_ratio, defaults.cfg_trunc_ratio),
        renorm_cfg=given_or(prompt.renorm_cfg, defaults.renorm_cfg),
        sampler=sampler,
    )


def sample_size(prompt: SamplePrompt, defaults: SampleDefaults) -> tuple[int, int]:
    """Width and height that are asked for, before they are rounded."""
    return prompt.width or defaults.side, prompt.height or defaults.side


def sample_sizes(prompts: Sequence[SamplePrompt], architecture: str) -> list[tuple[int, int]]:
    """Width and height of the pictures of a training, as they are drawn."""
    defaults = sample_defaults(architecture)
    asked = (sample_size(prompt, defaults) for prompt in prompts)
    return [(rounded_side(width, defaults.side_step), rounded_side(height, defaults.side_step)) for width, height in asked]


def sampler_problems(prompts: Sequence[SamplePrompt], samplers: Collection[str]) -> Iterator[str]:
    """Prompts of a training whose model knows all samplers that there are, so that another name is a slip."""
    for prompt in prompts:
        name = prompt.sample_sampler
        if name is not None and name not in samplers:
            near = did_you_mean(name, samplers)
            yield (
                f"--sample_prompts, prompt {prompt.index + 1}: --ss {name} is no sampler{near}: give one of {', '.join(samplers)}"
            )


def drawn_steps(steps: int) -> int:
    """Within the range that can be drawn. The reference cuts the steps of a prompt in the same way."""
    return min(max(steps, 1), MAX_STEPS)


def rounded_side(side: int, step: int) -> int:
    """Pixels, down to a multiple of ``step``."""
    return max(MIN_SIDE_PX, side - side % step)


def plan_warnings(
    prompts: Sequence[SamplePrompt], options: PromptDefaults, side_step: int, settings: Collection[str] = FLOW_SETTINGS
) -> Iterator[str]:
    """What an inference script draws otherwise than the prompts seem to say. ``settings``: the keys that its model draws by."""
    yield from size_warnings(prompts, options, side_step)
    yield from idle_negative_warnings(prompts, options)
    yield from unused_warnings(prompts, settings)


def size_warnings(prompts: Sequence[SamplePrompt], options: PromptDefaults, side_step: int) -> Iterator[str]:
    """One line about all sizes that are rounded, and one about very large ones."""
    height, width = options.image_size
    asked = [(prompt.width or width, prompt.height or height) for prompt in prompts]
    yield from rounded_size_warnings(asked, side_step)
    yield from large_size_warnings(asked)


def rounded_size_warnings(sizes_wh: Sequence[tuple[int, int]], side_step: int) -> Iterator[str]:
    drawn = {size: (rounded_side(size[0], side_step), rounded_side(size[1], side_step)) for size in sizes_wh}
    changed = [f"{size[0]}x{size[1]} to {new[0]}x{new[1]}" for size, new in drawn.items() if size != new]
    if changed:
        yield f"sizes are rounded down to multiples of {side_step} pixels (width x height): {', '.join(changed)}"


def large_size_warnings(sizes_wh: Sequence[tuple[int, int]]) -> Iterator[str]:
    large = [f"{w}x{h} has {w * h / USUAL_PX:.0f} times" for w, h in dict.fromkeys(sizes_wh) if w * h > LARGE_PX]
    if large:
        yield (
            f"very large pictures: {', '.join(large)} the pixels of 1024x1024, and attention's work grows with their square: "
            "drawing takes long, and memory may run out"
        )


def idle_negative_warnings(prompts: Sequence[SamplePrompt], options: PromptDefaults) -> Iterator[str]:
    first = [pictures_of(prompt, options, side_step=1)[0] for prompt in prompts]
    idle = [picture for picture in first if picture.negative_prompt and not picture.is_guided]
    if idle:
        which = f"of {len(idle)} of {len(first)} prompts " if len(first) > 1 else ""
        causes = {picture.scale == 1: "scale of 1" if picture.scale == 1 else "trunc ratio of 0" for picture in idle}
        yield f"the negative prompt {which}does nothing with a guidance {' or '.join(causes.values())}: set another, or drop it"


def unused_warnings(prompts: Sequence[SamplePrompt], settings: Collection[str] = FLOW_SETTINGS) -> Iterator[str]:
    unused = sorted({name for prompt in prompts for name in prompt.unused(settings)})
    if unused:
        yield f"the model does not use {', '.join(unused)} of a prompt: without effect"


def sample_warnings(prompts: Sequence[SamplePrompt], supported: Collection[str], model: str, *, title: str) -> Iterator[str]:
    """What pictures of a training show otherwise than their prompts seem to say. ``supported``: see ``SamplePrompt.unused``;
    ``model``: the architecture's name; ``title``: as people call it."""
    unused = sorted({name for prompt in prompts for name in prompt.unused(supported)})
    if unused:
        yield f"{title} does not use {', '.join(unused)}; the pictures ignore it"
    other = sorted({text for prompt in prompts for text in prompt.unknown_values(supported)})
    if other:
        yield f"{title} does not know {', '.join(other)}; the pictures are drawn as if it were not there"
    for steps in sorted({prompt.sample_steps for prompt in prompts if prompt.sample_steps is not None}):
        if steps != drawn_steps(steps):
            yield f"--s {steps} (sample_steps) is cut to {drawn_steps(steps)}: a picture takes 1 to {MAX_STEPS} steps"
    defaults = sample_defaults(model)
    sizes = [sample_size(prompt, defaults) for prompt in prompts]
    yield from rounded_size_warnings(sizes, defaults.side_step)
    yield from large_size_warnings(sizes)
    for prompt in prompts:
        picture = sample_picture(prompt, 0, sampler="", defaults=defaults)
        if prompt.negative_prompt and not picture.is_guided:
            cause = f"--l {prompt.scale:g}" if picture.scale == 1 else f"--ctr {prompt.cfg_trunc_ratio:g}"
            yield f"prompt {prompt.index + 1}: --n does nothing with {cause}, which draws without guidance"
