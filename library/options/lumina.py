"""Options of lumina_train_network.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.files.hub_download import is_repo_id
from library.options.attention import AttentionOptions
from library.options.declare import opt
from library.options.flow import LuminaFlowOptions
from library.options.flow_train import FlowTrainOptions, NoClipOptions, NoDdpmOptions
from library.options.models import ModelOptions
from library.options.rules import at_least

GEMMA_TOKENS, LONGEST_GEMMA_TOKENS = 256, 4096  # what the model was trained with; the window of every other layer of Gemma 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaModelOptions(ModelOptions):
    """Model: the checkpoints to train on."""

    vae: str | None = opt(None, "image coder in other scripts (not set = nothing is said); here --ae names it", path=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaOptions:
    """Lumina: its text encoder and tokenizer, its image coder, and the text before every caption."""

    CHANGES_TRAINING: ClassVar[tuple[str, ...]] = ("gemma2_max_token_length", "system_prompt")

    gemma2: str | None = opt(
        None, "text encoder Gemma 2 2B: a .safetensors file or a folder (not set = the one inside the model's checkpoint)",
        path=True,
    )  # fmt: skip
    gemma2_tokenizer: str | None = opt(
        None, "tokenizer of Gemma 2: a folder, a file of it, or OWNER/NAME on the hub (not set = the one that comes with "
        "--gemma2, else google/gemma-2-2b)", path=True,
    )  # fmt: skip
    ae: str | None = opt(
        None, "file of the image coder, the autoencoder of FLUX (not set = the one inside the model's checkpoint)", path=True
    )
    gemma2_max_token_length: int | None = opt(
        None, "Gemma tokens of the system prompt and a caption that count, 1 to 4096; the rest is cut off (not set = 256)"
    )
    system_prompt: str = opt("", "text put before every caption, with a marker between (empty = the caption alone)")
    sample_batch_size: int | None = opt(
        None, "sample pictures of one size and settings that are drawn at once; faster and more memory (not set = 1)"
    )

    @property
    def tokens(self) -> int:
        """Of a text for the model."""
        return GEMMA_TOKENS if self.gemma2_max_token_length is None else self.gemma2_max_token_length

    def problems(self) -> Iterator[str]:
        if not 1 <= self.tokens <= LONGEST_GEMMA_TOKENS:
            yield f"--gemma2_max_token_length is {self.tokens}: give 1 to {LONGEST_GEMMA_TOKENS} tokens"
        yield from at_least(self, 1, "sample_batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaAttentionOptions(AttentionOptions):
    """Attention: the kernel that the denoiser's attention uses. Results differ by rounding only."""

    use_flash_attn: bool = opt(False, "the older way to write --attn_mode=flash")
    use_sage_attn: bool = opt(False, "the older way to write --attn_mode=sageattn, which can draw but not train")

    @property
    def mode(self) -> str:
        if self.attn_mode is None and (self.use_flash_attn or self.use_sage_attn):
            return "flash" if self.use_flash_attn else "sageattn"
        return AttentionOptions.mode.fget(self)  # type: ignore[attr-defined]

    @property
    def flag(self) -> str:
        if self.attn_mode is None and (self.use_flash_attn or self.use_sage_attn):
            return "--use_flash_attn" if self.use_flash_attn else "--use_sage_attn"
        return AttentionOptions.flag.fget(self)  # type: ignore[attr-defined]

    def problems(self) -> Iterator[str]:
        yield from AttentionOptions.problems(self)
        if self.use_flash_attn and self.use_sage_attn:
            yield "--use_flash_attn and --use_sage_attn each name a kernel: keep one of them"
        for name, kernel in (("use_flash_attn", "flash"), ("use_sage_attn", "sageattn")):
            if getattr(self, name) and self.attn_mode not in (None, kernel):
                yield f"--{name} and --attn_mode={self.attn_mode} each name a kernel: keep one of them"


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaDdpmOptions(NoDdpmOptions):
    """Stable Diffusion's noise: for models with a table of noise levels; an error here."""

    MODEL: ClassVar[str] = "Lumina Image 2.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaClipOptions(NoClipOptions):
    """Stable Diffusion's text: for models with CLIP text encoders; an error here, except for --tokenizer_cache_dir."""

    WHY: ClassVar[str] = "it is about Stable Diffusion's CLIP text encoders, and Lumina Image 2.0 has Gemma 2"

    def warnings(self) -> Iterator[str]:
        if self.tokenizer_cache_dir:
            yield (
                "--tokenizer_cache_dir does nothing: the tokenizer comes with Gemma 2's weights, from the folder of "
                "--gemma2_tokenizer, or from the hub's own cache (its folder is set by HF_HOME)"
            )


@dataclass(frozen=True, kw_only=True)
class LuminaTrainOptions(FlowTrainOptions):
    """All options of lumina_train_network.py, in groups."""

    NETWORK_MODULE: ClassVar[str] = "networks.lora_lumina"
    MODEL: ClassVar[str] = "Lumina Image 2.0"

    model: LuminaModelOptions = field(default_factory=LuminaModelOptions)
    lumina: LuminaOptions = field(default_factory=LuminaOptions)
    flow: LuminaFlowOptions = field(default_factory=LuminaFlowOptions)
    attention: LuminaAttentionOptions = field(default_factory=LuminaAttentionOptions)
    ddpm: LuminaDdpmOptions = field(default_factory=LuminaDdpmOptions)
    clip: LuminaClipOptions = field(default_factory=LuminaClipOptions)

    @property
    def pictures_at_once(self) -> int:
        return self.lumina.sample_batch_size or 1

    @property
    def asks_hub(self) -> bool:
        """For the tokenizer, where nothing names it and it is not in the files: only reading them shows that."""
        tokenizer = self.lumina.gemma2_tokenizer
        return tokenizer is None or is_repo_id(tokenizer)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self._diffusers_text_problems()
        vae, ae = self.model.vae, self.lumina.ae
        if vae and not ae:
            yield f"--vae={vae} cannot be used: here the image coder is named by --ae; write --ae={vae}"
        elif vae and vae != ae:
            yield f"--vae={vae} and --ae={ae} name two image coders: keep --ae, which is the one that counts here"

    def warnings(self) -> Iterator[str]:
        yield from super().warnings()
        yield from self._cached_text_warnings(denoiser="denoiser")
