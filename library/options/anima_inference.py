"""Options of anima_minimal_inference.py. Names and defaults are those of kohya-ss/sd-scripts where it has the option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.options.attention import AttentionOptions
from library.options.console import ConsoleOptions
from library.options.declare import opt
from library.options.rules import above_zero, at_least, even
from library.options.run import PRECISION_DTYPES

OUTPUT_TYPES = ("images", "latent", "latent_images")
SAMPLERS = ("euler", "er_sde")  # those of library/sampling/flow_samplers.py, which options may not import
LONGEST_STEPS, SEED_END = 1000, 2**63
SIDE_RANGE_PX = (64, 16384)
DEVICE = re.compile(r"(cpu|mps|(cuda|xpu|npu)(:\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaFileOptions:
    """Model: the files of Anima, and how its image coder works."""

    dit: str | None = opt(None, "checkpoint of the denoiser (DiT) with its LLM adapter", path=True)
    llm_adapter_path: str | None = opt(None, "file of the LLM adapter (not set = it is inside the checkpoint)", path=True)
    text_encoder: str | None = opt(None, "Qwen3-0.6B text encoder: a .safetensors file or a folder", path=True)
    t5_tokenizer_path: str | None = opt(
        None, "folder of the T5 tokenizer (not set = the one that comes with the project)", path=True
    )
    vae: str | None = opt(None, "file of the Qwen-Image VAE; not needed with --output_type=latent", path=True)
    vae_chunk_size: int | None = opt(
        None, "rows that a layer of the VAE works on at a time, an even number; less memory (not set = all at once)"
    )
    vae_disable_cache: bool = opt(False, "do not keep VAE features between frames; less memory, same pictures")
    no_half_vae: bool = opt(False, "run the VAE in float32 whatever --mixed_precision says; cures black pictures")

    def problems(self) -> Iterator[str]:
        yield from even(self, "vae_chunk_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """LoRA: files that are merged into the model before it draws, one after the other."""

    lora_weight: list[str] | None = opt(None, "LoRA files for the denoiser, the text encoder or both; any layout", path=True)
    lora_multiplier: list[float] | None = opt(None, "strength of each LoRA file, in their order; 1.0 where there is none")
    include_patterns: list[str] | None = opt(
        None, "regexes, found anywhere in a module's name: of each LoRA file only modules that one of them fits are merged"
    )
    exclude_patterns: list[str] | None = opt(None, "regexes, as --include_patterns: modules that one of them fits are left out")
    lycoris: bool = opt(False, "read the LoRA files with the LyCORIS package: LoKr, LoHa and its other kinds")

    @property
    def files(self) -> list[tuple[str, float]]:
        """(path, multiplier) of each file."""
        paths = self.lora_weight or []
        return list(zip(paths, [*(self.lora_multiplier or []), *[1.0] * len(paths)], strict=False))

    def problems(self) -> Iterator[str]:
        files, strengths = len(self.lora_weight or ()), len(self.lora_multiplier or ())
        if strengths and not files:
            yield "--lora_multiplier needs --lora_weight: name the LoRA files, or drop it"
        elif strengths > files:
            yield f"--lora_multiplier has {strengths} numbers, but --lora_weight has {files}: give at most one each"
        for name in ("include_patterns", "exclude_patterns"):
            if getattr(self, name) and not files:
                yield f"--{name} needs --lora_weight: name the LoRA files, or drop it"
            for pattern in getattr(self, name) or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"--{name}: the regular expression {pattern!r} is not valid: {error}"
        if self.lycoris and not files:
            yield "--lycoris needs --lora_weight: name the LyCORIS files, or drop it"

    def warnings(self) -> Iterator[str]:
        strengths = len(self.lora_multiplier or ())
        if 0 < strengths < len(self.lora_weight or ()):
            others = ", ".join(Path(file).name for file, _ in self.files[strengths:])
            yield f"--lora_multiplier says nothing of {others}: merged with strength 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures."""

    prompt: str | None = opt(None, 'what the picture shows; "" draws one without a prompt', may_be_empty=True)
    negative_prompt: str = opt("", "what it does not show; without effect where --guidance_scale is 1")
    from_file: str | None = opt(None, "file of prompts (.txt, .toml or .json), one after the other", path=True)
    interactive: bool = opt(False, 'read prompts line by line from the console and keep the models loaded; "help" tells more')
    image_size: list[int] = opt((1024, 1024), "height and width in pixels, rounded down to multiples of 16")
    infer_steps: int = opt(50, "steps of the sampler, 1 to 1000")
    guidance_scale: float = opt(3.5, "how strongly the prompt counts (classifier-free guidance; 1 = none, twice as fast)")
    flow_shift: float = opt(5.0, "above 1 = more of the steps at high noise; samples of a training have 3.0")
    sampler: str = opt("euler", "er_sde adds fresh noise on the way, as ComfyUI does for Anima by default", choices=SAMPLERS)
    seed: int | None = opt(None, "seed of the first picture; further pictures of a prompt count up (not set = random)")
    images_per_prompt: int = opt(1, "pictures of each prompt")
    batch_size: int = opt(1, "pictures of a prompt that are drawn at once; faster and more memory, equal up to rounding")

    def problems(self) -> Iterator[str]:
        # beside another source an empty prompt takes one of the config file back
        given = [f"--{name}" for name in ("prompt", "from_file", "interactive") if getattr(self, name)]
        if len(given) > 1:
            yield f"{' and '.join(given)} are different sources of prompts: keep one"
        if len(self.image_size) != 2:
            yield f"--image_size has {len(self.image_size)} numbers: give two, HEIGHT WIDTH, for example 1216 832"
        low, high = SIDE_RANGE_PX
        if any(not low <= side <= high for side in self.image_size):
            yield f"--image_size is {' '.join(map(str, self.image_size))}: give sides from {low} to {high} pixels"
        if not 1 <= self.infer_steps <= LONGEST_STEPS:
            yield f"--infer_steps is {self.infer_steps}: give 1 to {LONGEST_STEPS}"
        if self.seed is not None and not 0 <= self.seed < SEED_END:
            yield f"--seed is {self.seed}: give a whole number from 0 to 2^63 - 1"
        yield from at_least(self, 0, "guidance_scale")
        yield from above_zero(self, "flow_shift")
        yield from at_least(self, 1, "images_per_prompt", "batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFileOptions:
    """Output: what is written. Names are DATE-TIME_SEED.png and DATE-TIME_SEED_latent.safetensors; nothing is overwritten."""

    save_path: str | None = opt(None, "folder for the files; made if missing", path=True)
    output_type: str = opt(
        "images", "pictures, latents that --latent_path makes pictures of later, or both", choices=OUTPUT_TYPES
    )
    no_metadata: bool = opt(False, "leave the prompt and the settings out of the files")
    latent_path: list[str] | None = opt(None, "make pictures of these saved latents; nothing else is done", path=True)

    @property
    def wants_pictures(self) -> bool:
        return self.output_type != "latent" or bool(self.latent_path)

    @property
    def wants_latents(self) -> bool:
        return self.output_type != "images"

    def problems(self) -> Iterator[str]:
        if not self.save_path:
            yield "--save_path is missing: name the folder for the pictures"
        if self.latent_path and self.wants_latents:
            yield f"--output_type={self.output_type} cannot be combined with --latent_path, which makes pictures: drop one"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Device: where and with which numbers the models work."""

    device: str | None = opt(None, "cpu, cuda, cuda:1, mps, ... (not set = the GPU if there is one)")
    mixed_precision: str | None = opt(
        None, "number format of the models (not set = bf16 on a GPU, no = float32 on a CPU)", choices=tuple(PRECISION_DTYPES)
    )
    fp8: bool = opt(False, "keep the denoiser's weights in 8 bits with a scale for each row: the same as --fp8_scaled")
    fp8_scaled: bool = opt(False, "keep the denoiser's weights in 8 bits: half the memory of bf16, slightly other pictures")
    text_encoder_cpu: bool = opt(False, "run the text encoder on the CPU: less GPU memory, slower prompts")
    offload: bool = opt(False, "keep each model on the GPU only while it works: least memory, slower with many prompts")
    blocks_to_swap: int | None = opt(
        None, "transformer blocks whose weights wait in CPU memory until they are needed, at most all but 2 (not set or 0 = none)"
    )

    @property
    def quantises(self) -> bool:
        return self.fp8 or self.fp8_scaled

    def problems(self) -> Iterator[str]:
        if self.device is not None and not DEVICE.fullmatch(self.device):
            yield f"--device is {self.device!r}: give cpu, cuda, cuda:1 (the second GPU), mps or xpu"
        yield from at_least(self, 0, "blocks_to_swap")
        if self.blocks_to_swap and self.offload:
            yield "--blocks_to_swap and --offload are two ways to save the denoiser's memory: keep one"

    def warnings(self) -> Iterator[str]:
        if self.fp8 and not self.fp8_scaled:
            yield "--fp8 keeps a scale for each row of a weight, as --fp8_scaled does: unscaled 8-bit weights are only less exact"


@dataclass(frozen=True, kw_only=True)
class AnimaInferenceOptions:
    """All options of anima_minimal_inference.py, in groups."""

    files: AnimaFileOptions = field(default_factory=AnimaFileOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    loras: MergeOptions = field(default_factory=MergeOptions)
    output: PictureFileOptions = field(default_factory=PictureFileOptions)
    compute: DeviceOptions = field(default_factory=DeviceOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are needed."""
        drawing = () if self.output.latent_path else ("denoiser", "text")
        return (*drawing, *(("vae",) if self.output.wants_pictures else ()))

    def problems(self) -> Iterator[str]:
        prompts = self.prompts
        source = prompts.prompt or prompts.from_file or prompts.interactive
        if self.output.latent_path and source:
            yield "--latent_path makes pictures of saved latents, not of prompts: drop --prompt, --from_file and --interactive"
        elif not self.output.latent_path and not source and prompts.prompt is None:
            yield "there is nothing to draw: give --prompt, --from_file or --interactive (or --latent_path with saved latents)"

    def warnings(self) -> Iterator[str]:
        if self.output.latent_path and self.loras.lora_weight:
            yield "--lora_weight does nothing with --latent_path: the pictures are drawn already"
