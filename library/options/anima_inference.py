"""Options of anima_minimal_inference.py. Names and defaults are those of kohya-ss/sd-scripts where it has the option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.options.attention import AttentionOptions
from library.options.console import ConsoleOptions
from library.options.declare import opt
from library.options.inference import DeviceOptions, InferenceRules, MergeOptions, OutputOptions, SizePromptOptions
from library.options.rules import above_zero, at_least, even

SAMPLERS = ("euler", "er_sde")  # those of library/sampling/flow_samplers.py, which options may not import


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
class AnimaMergeOptions(MergeOptions):
    """LoRA: files that are merged into the model before it draws, one after the other."""

    lora_weight: list[str] | None = opt(None, "LoRA files for the denoiser, the text encoder or both; any layout", path=True)
    lora_multiplier: list[float] | None = opt(None, "strength of each LoRA file, in their order; 1.0 where there is none")
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
        yield from MergeOptions.problems(self)
        if self.lycoris and not files:
            yield "--lycoris needs --lora_weight: name the LyCORIS files, or drop it"

    def warnings(self) -> Iterator[str]:
        strengths = len(self.lora_multiplier or ())
        if 0 < strengths < len(self.lora_weight or ()):
            others = ", ".join(Path(file).name for file, _ in self.files[strengths:])
            yield f"--lora_multiplier says nothing of {others}: merged with strength 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaPromptOptions(SizePromptOptions):
    """Pictures: what is drawn. A prompt file and the lines of --interactive may set everything but the number of pictures."""

    image_size: list[int] = opt((1024, 1024), "height and width in pixels, rounded down to multiples of 16")
    guidance_scale: float = opt(3.5, "how strongly the prompt counts (classifier-free guidance; 1 = none, twice as fast)")
    flow_shift: float = opt(5.0, "above 1 = more of the steps at high noise; samples of a training have 3.0")
    sampler: str = opt("euler", "er_sde adds fresh noise on the way, as ComfyUI does for Anima by default", choices=SAMPLERS)

    def problems(self) -> Iterator[str]:
        yield from SizePromptOptions.problems(self)
        yield from above_zero(self, "flow_shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaOutputOptions(OutputOptions):
    """Output: what is written. Names are DATE-TIME_SEED.png and DATE-TIME_SEED_latent.safetensors; nothing is overwritten."""

    save_path: str | None = opt(None, "folder for the files; made if missing", path=True)

    @property
    def folder(self) -> str:
        """For the files; made if missing."""
        return self.save_path or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaDeviceOptions(DeviceOptions):
    """Device: where and with which numbers the models work."""

    fp8: bool = opt(False, "keep the denoiser's weights in 8 bits with a scale for each row: the same as --fp8_scaled")
    fp8_scaled: bool = opt(False, "keep the denoiser's weights in 8 bits: half the memory of bf16, slightly other pictures")
    blocks_to_swap: int | None = opt(
        None, "transformer blocks whose weights wait in CPU memory until they are needed, at most all but 2 (not set or 0 = none)"
    )

    @property
    def quantises(self) -> bool:
        return self.fp8 or self.fp8_scaled

    def problems(self) -> Iterator[str]:
        yield from DeviceOptions.problems(self)
        yield from at_least(self, 0, "blocks_to_swap")
        if self.blocks_to_swap and self.offload:
            yield "--blocks_to_swap and --offload are two ways to save the denoiser's memory: keep one"

    def warnings(self) -> Iterator[str]:
        if self.fp8 and not self.fp8_scaled:
            yield "--fp8 keeps a scale for each row of a weight, as --fp8_scaled does: unscaled 8-bit weights are only less exact"


@dataclass(frozen=True, kw_only=True)
class AnimaInferenceOptions(InferenceRules):
    """All options of anima_minimal_inference.py, in groups."""

    files: AnimaFileOptions = field(default_factory=AnimaFileOptions)
    prompts: AnimaPromptOptions = field(default_factory=AnimaPromptOptions)
    loras: AnimaMergeOptions = field(default_factory=AnimaMergeOptions)
    output: AnimaOutputOptions = field(default_factory=AnimaOutputOptions)
    compute: AnimaDeviceOptions = field(default_factory=AnimaDeviceOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
