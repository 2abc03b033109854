"""Options that the inference scripts have in common. An architecture's subclass states its defaults and adds what it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.options.declare import opt
from library.options.rules import at_least, device_name
from library.options.run import PRECISION_DTYPES

OUTPUT_TYPES = ("images", "latent", "latent_images")
LONGEST_STEPS, SEED_END = 1000, 2**63
SIDE_RANGE_PX = (64, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """LoRA: files that are merged into the model before it draws, one after the other."""

    FLAG: ClassVar[str] = "--lora_weight"  # what names the files

    include_patterns: list[str] | None = opt(
        None, "regexes, found anywhere in a module's name: of each LoRA file only modules that one of them fits are merged"
    )
    exclude_patterns: list[str] | None = opt(None, "regexes, as --include_patterns: modules that one of them fits are left out")

    @property
    def lycoris(self) -> bool:
        """Whether the LyCORIS package reads the files."""
        return False

    @property
    def merged(self) -> bool:
        """Whether the files become part of the weights: else a prompt may set their strengths."""
        return True

    @property
    def files(self) -> list[tuple[str, float]]:
        """(path, multiplier) of each file."""
        raise NotImplementedError

    def problems(self) -> Iterator[str]:
        for name in ("include_patterns", "exclude_patterns"):
            if getattr(self, name) and not self.files:
                yield f"--{name} needs {self.FLAG}: name the LoRA files, or drop it"
            for pattern in getattr(self, name) or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"--{name}: the regular expression {pattern!r} is not valid: {error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures.

    A subclass has flags, or properties where its flags have other names, for the size, the steps and the guidance.
    """

    USUAL_PROMPT: ClassVar[str | None] = None  # drawn where nothing else is asked for
    STEPS_NAME: ClassVar[str] = "infer_steps"
    SCALE_NAME: ClassVar[str] = "guidance_scale"

    prompt: str | None = opt(None, 'what the picture shows; "" draws one without a prompt', may_be_empty=True)
    negative_prompt: str = opt("", "what it does not show; without effect where --guidance_scale is 1")
    from_file: str | None = opt(None, "file of prompts (.txt, .toml or .json), one after the other", path=True)
    interactive: bool = opt(False, 'read prompts line by line from the console and keep the models loaded; "help" tells more')
    sampler: str = opt("euler", "way from noise to picture")
    seed: int | None = opt(None, "seed of the first picture; further pictures of a prompt count up (not set = random)")
    images_per_prompt: int = opt(1, "pictures of each prompt")
    batch_size: int = opt(1, "pictures of a prompt that are drawn at once; faster and more memory, equal up to rounding")

    @property
    def image_size(self) -> list[int]:
        """Height and width in pixels, as asked for."""
        raise NotImplementedError

    @property
    def infer_steps(self) -> int:
        raise NotImplementedError

    @property
    def guidance_scale(self) -> float:
        raise NotImplementedError

    @property
    def flow_shift(self) -> float | None:
        """None for models without, here and below."""
        return None

    @property
    def cfg_trunc_ratio(self) -> float | None:
        """Share of the way from noise to image on which there is guidance."""
        return None

    @property
    def renorm_cfg(self) -> float | None:
        """Longest guided velocity, in lengths of the one with the prompt; 0 = any."""
        return None

    @property
    def prompt2(self) -> str | None:
        """Another text for the second text encoder."""
        return None

    @property
    def sources(self) -> list[str]:
        """The flags given that say what to draw. Beside another source an empty prompt takes one of the config file back, and the
        usual prompt only stands in for them."""
        prompt = bool(self.prompt) if self.USUAL_PROMPT is None else self.prompt not in (None, self.USUAL_PROMPT)
        given = {"prompt": prompt, "from_file": self.from_file, "interactive": self.interactive}
        return [f"--{name}" for name, value in given.items() if value]

    def problems(self) -> Iterator[str]:
        if len(self.sources) > 1:
            yield f"{' and '.join(self.sources)} are different sources of prompts: keep one"
        yield from self._size_problems()
        if not 1 <= self.infer_steps <= LONGEST_STEPS:
            yield f"--{self.STEPS_NAME} is {self.infer_steps}: give 1 to {LONGEST_STEPS}"
        if self.seed is not None and not 0 <= self.seed < SEED_END:
            yield f"--seed is {self.seed}: give a whole number from 0 to 2^63 - 1"
        yield from at_least(self, 0, self.SCALE_NAME)
        yield from at_least(self, 1, "images_per_prompt", "batch_size")

    def _size_problems(self) -> Iterator[str]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class SizePromptOptions(PromptOptions):
    """Pictures: with the flags that most scripts have."""

    image_size: list[int] = opt((1024, 1024), "height and width in pixels, rounded down to multiples of 8")
    infer_steps: int = opt(50, "steps of the sampler, 1 to 1000")
    guidance_scale: float = opt(7.0, "how strongly the prompt counts (classifier-free guidance; 1 = none, twice as fast)")

    def _size_problems(self) -> Iterator[str]:
        if len(self.image_size) != 2:
            yield f"--image_size has {len(self.image_size)} numbers: give two, HEIGHT WIDTH, for example 1216 832"
        low, high = SIDE_RANGE_PX
        if any(not low <= side <= high for side in self.image_size):
            yield f"--image_size is {' '.join(map(str, self.image_size))}: give sides from {low} to {high} pixels"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Output: what is written. Nothing is overwritten."""

    FOLDER_FLAG: ClassVar[str] = "--save_path"

    output_type: str = opt(
        "images", "pictures, latents that --latent_path makes pictures of later, or both", choices=OUTPUT_TYPES
    )
    no_metadata: bool = opt(False, "leave the prompt and the settings out of the files")
    latent_path: list[str] | None = opt(None, "make pictures of these saved latents; nothing else is done", path=True)

    @property
    def folder(self) -> str:
        """For the files; made if missing."""
        raise NotImplementedError

    @property
    def wants_pictures(self) -> bool:
        return self.output_type != "latent" or bool(self.latent_path)

    @property
    def wants_latents(self) -> bool:
        return self.output_type != "images"

    def problems(self) -> Iterator[str]:
        if not self.folder:
            yield f"{self.FOLDER_FLAG} is missing: name the folder for the pictures"
        if self.latent_path and self.wants_latents:
            yield f"--output_type={self.output_type} cannot be combined with --latent_path, which makes pictures: drop one"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceOptions:
    """Device: where the models work."""

    device: str | None = opt(None, "cpu, cuda, cuda:1, mps, ... (not set = the GPU if there is one)")
    text_encoder_cpu: bool = opt(False, "run the text encoder on the CPU: less GPU memory, slower prompts")
    offload: bool = opt(False, "keep each model on the GPU only while it works: least memory, slower with many prompts")

    @property
    def precision(self) -> str | None:
        """Number format of the denoiser, as --mixed_precision names it; None = bf16 on a GPU, float32 on a CPU."""
        raise NotImplementedError

    def problems(self) -> Iterator[str]:
        yield from device_name(self, "device")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions(PlaceOptions):
    """Device: where and with which numbers the models work."""

    mixed_precision: str | None = opt(
        None, "number format of the models (not set = bf16 on a GPU, no = float32 on a CPU)", choices=tuple(PRECISION_DTYPES)
    )

    @property
    def precision(self) -> str | None:
        return self.mixed_precision


class InferenceRules:
    """What goes together, of an option set with the groups ``prompts``, ``output`` and ``loras``."""

    prompts: PromptOptions
    output: OutputOptions
    loras: MergeOptions

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are needed."""
        drawing = () if self.output.latent_path else ("denoiser", "text")
        return (*drawing, *(("vae",) if self.output.wants_pictures else ()))

    def problems(self) -> Iterator[str]:
        prompts = self.prompts
        if self.output.latent_path and prompts.sources:
            yield "--latent_path makes pictures of saved latents, not of prompts: drop --prompt, --from_file and --interactive"
        elif not self.output.latent_path and not prompts.sources and prompts.prompt is None:
            yield "there is nothing to draw: give --prompt, --from_file or --interactive (or --latent_path with saved latents)"

    def warnings(self) -> Iterator[str]:
        if self.output.latent_path and self.loras.files:
            yield f"{self.loras.FLAG} does nothing with --latent_path: the pictures are drawn already"
