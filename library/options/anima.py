"""Options of anima_train_network.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar

from library.options.declare import opt
from library.options.flow import AnimaFlowOptions
from library.options.flow_train import FlowTrainOptions, NoClipOptions, NoDdpmOptions
from library.options.rules import at_least, even

LONGEST_TEXT_TOKENS = 512  # = CONTEXT_ROWS of library/anima/layout.py, which options may not import


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaOptions:
    """Anima: its text encoder, tokenizers and image coder."""

    CHANGES_TRAINING: ClassVar[tuple[str, ...]] = ("qwen3_max_token_length", "t5_max_token_length")

    qwen3: str | None = opt(None, "Qwen3-0.6B text encoder: a .safetensors file or a folder", path=True)
    llm_adapter_path: str | None = opt(None, "file of the LLM adapter (not set = it is inside the model's checkpoint)", path=True)
    t5_tokenizer_path: str | None = opt(
        None, "folder of the T5 tokenizer (not set = the one that comes with the project)", path=True
    )
    qwen3_max_token_length: int = opt(512, "Qwen3 tokens of a caption that count, 1 to 512; the rest is cut off")
    t5_max_token_length: int = opt(512, "T5 tokens of a caption that count, 1 to 512; the rest is cut off")
    vae_chunk_size: int | None = opt(
        None, "rows that a layer of the VAE works on at a time, an even number; less memory (not set = all at once)"
    )
    vae_disable_cache: bool = opt(False, "do not keep VAE features between frames; less memory, same pictures")

    def problems(self) -> Iterator[str]:
        for name in ("qwen3_max_token_length", "t5_max_token_length"):
            tokens = getattr(self, name)
            if not 1 <= tokens <= LONGEST_TEXT_TOKENS:
                yield f"--{name} is {tokens}: give 1 to {LONGEST_TEXT_TOKENS} tokens"
        yield from even(self, "vae_chunk_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRates:
    """Learning rates of parts: of the denoiser, where they differ from --unet_lr."""

    self_attn_lr: float | None = opt(None, "learning rate of self-attention (not set = as the denoiser; 0 = no LoRA there)")
    cross_attn_lr: float | None = opt(None, "learning rate of cross-attention (not set = as the denoiser; 0 = no LoRA there)")
    mlp_lr: float | None = opt(None, "learning rate of the MLPs (not set = as the denoiser; 0 = no LoRA there)")
    mod_lr: float | None = opt(None, "learning rate of the modulation layers (not set or 0 = no LoRA there)")
    llm_adapter_lr: float | None = opt(
        None, "learning rate of the LLM adapter (not set = as the denoiser, with train_llm_adapter; 0 = no LoRA there)"
    )

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, *(field.name for field in fields(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaDdpmOptions(NoDdpmOptions):
    """Stable Diffusion's noise: for models with a table of noise levels; an error here."""

    MODEL: ClassVar[str] = "Anima"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnimaClipOptions(NoClipOptions):
    """Stable Diffusion's text: for models with CLIP text encoders; an error here, except for --tokenizer_cache_dir."""

    WHY: ClassVar[str] = "it is about Stable Diffusion's CLIP text encoders, and Anima has Qwen3 and a T5 tokenizer"


@dataclass(frozen=True, kw_only=True)
class AnimaTrainOptions(FlowTrainOptions):
    """All options of anima_train_network.py, in groups."""

    NETWORK_MODULE: ClassVar[str] = "networks.lora_anima"
    MODEL: ClassVar[str] = "Anima"

    anima: AnimaOptions = field(default_factory=AnimaOptions)
    flow: AnimaFlowOptions = field(default_factory=AnimaFlowOptions)
    rates: ComponentRates = field(default_factory=ComponentRates)
    ddpm: AnimaDdpmOptions = field(default_factory=AnimaDdpmOptions)
    clip: AnimaClipOptions = field(default_factory=AnimaClipOptions)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if "text" in self.parts and not self.anima.qwen3:
            yield "--qwen3 is missing: name the Qwen3-0.6B text encoder, a .safetensors file or a folder"
        if "vae" in self.parts and not self.model.vae:
            yield "--vae is missing: name the file of the Qwen-Image VAE"
        if "denoiser" in self.parts:
            yield from self._component_rate_problems()
        yield from self._diffusers_text_problems()

    @property
    def has_own_rates(self) -> bool:
        own = FlowTrainOptions.has_own_rates.fget(self)  # type: ignore[attr-defined]
        return own or any(getattr(self.rates, rate.name) for rate in fields(self.rates))

    def _component_rate_problems(self) -> Iterator[str]:
        if not self.network.network_train_text_encoder_only:
            return
        given = [field.name for field in fields(self.rates) if getattr(self.rates, field.name) is not None]
        if given:
            yield (
                f"{', '.join(f'--{name}' for name in given)} cannot be combined with --network_train_text_encoder_only, which "
                "trains none of the denoiser's parts: drop one or the other"
            )
