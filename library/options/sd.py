"""Options of train_network.py and sdxl_train_network.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.files.hub_download import is_repo_id
from library.options.ddpm import ClipOptions, DdpmTrainingOptions
from library.options.declare import opt
from library.options.models import ModelOptions
from library.options.rules import at_least
from library.options.train import TrainOptions

CHUNK_TOKENS = 75  # of a caption in one row of CLIP's 77, beside its first and last token


@dataclass(frozen=True, slots=True, kw_only=True)
class SdModelOptions(ModelOptions):
    """Model: the checkpoints to train on."""

    pretrained_model_name_or_path: str | None = opt(
        None,
        "frozen model that the LoRA is for: a .safetensors or .ckpt file, a diffusers folder, or OWNER/NAME of one on the hub",
        path=True,
    )
    vae: str | None = opt(
        None, "another image coder (VAE): a file, a diffusers folder or OWNER/NAME (not set = the one of the model)", path=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SdClipOptions(ClipOptions):
    """Stable Diffusion's text: its CLIP encoders and tokenizers."""

    CHANGES_TRAINING: ClassVar[tuple[str, ...]] = ("v2", "clip_skip", "max_token_length", "weighted_captions")

    max_token_length: int | None = opt(None, "CLIP tokens of a caption that count; the rest is cut off (not set = 75)",
                                       choices=(2 * CHUNK_TOKENS, 3 * CHUNK_TOKENS, CHUNK_TOKENS))  # fmt: skip

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "clip_skip")

    def warnings(self) -> Iterator[str]:
        if self.tokenizer_cache_dir:
            yield "--tokenizer_cache_dir does nothing: the tokenizers come with this project, and nothing is downloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class SdxlClipOptions(SdClipOptions):
    """Stable Diffusion's text: its CLIP encoders and tokenizers."""

    CHANGES_TRAINING: ClassVar[tuple[str, ...]] = ("max_token_length", "weighted_captions")

    v2: bool = opt(False, "the checkpoint is Stable Diffusion 2.x; an error here")
    clip_skip: int | None = opt(
        None, "for the metadata only: SDXL always takes the last layer but one of its text encoders (not set = nothing is said)"
    )

    def problems(self) -> Iterator[str]:
        yield from SdClipOptions.problems(self)
        if self.v2:
            yield "--v2 cannot be used: it says that a checkpoint is Stable Diffusion 2.x, which train_network.py trains; drop it"

    def warnings(self) -> Iterator[str]:
        yield from SdClipOptions.warnings(self)
        if self.clip_skip is not None:
            yield (
                f"--clip_skip={self.clip_skip} goes into the metadata only: SDXL is trained, and its sample pictures are drawn, "
                "with the last layer but one of its text encoders whatever it says"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRates:
    """Learning rates of parts: of the two text encoders, each by a flag of its own."""

    text_encoder_lr1: float | None = opt(
        None, "learning rate of the first text encoder (CLIP-L), as the first of --text_encoder_lr (not set = --learning_rate)"
    )
    text_encoder_lr2: float | None = opt(
        None,
        "learning rate of the second text encoder (CLIP-G), as the second of --text_encoder_lr (not set = --learning_rate)",
    )

    @property
    def both(self) -> tuple[float | None, float | None]:
        return self.text_encoder_lr1, self.text_encoder_lr2

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "text_encoder_lr1", "text_encoder_lr2")


@dataclass(frozen=True, kw_only=True)
class StableDiffusionTrainOptions(TrainOptions):
    """All options of train_network.py (Stable Diffusion 1.x and 2.x), in groups."""

    NETWORK_MODULE: ClassVar[str] = "networks.lora"
    MODEL: ClassVar[str] = "Stable Diffusion"

    model: SdModelOptions = field(default_factory=SdModelOptions)
    clip: SdClipOptions = field(default_factory=SdClipOptions)
    ddpm: DdpmTrainingOptions = field(default_factory=DdpmTrainingOptions)

    def warnings(self) -> Iterator[str]:
        yield from super().warnings()
        yield from self._cached_text_warnings(denoiser="U-Net")

    @property
    def fetches_models(self) -> bool:
        return any(value and is_repo_id(value) for value in (self.model.pretrained_model_name_or_path, self.model.vae))


@dataclass(frozen=True, kw_only=True)
class SdxlTrainOptions(StableDiffusionTrainOptions):
    """All options of sdxl_train_network.py, in groups."""

    MODEL: ClassVar[str] = "SDXL"
    TEXT_ENCODERS: ClassVar[int] = 2

    clip: SdxlClipOptions = field(default_factory=SdxlClipOptions)
    encoder_rates: EncoderRates = field(default_factory=EncoderRates)

    @property
    def given_text_rates(self) -> list[float] | None:
        """--text_encoder_lr1 and 2 where they are given, else --text_encoder_lr, else --learning_rate; None = none is given."""
        if self.encoder_rates.both == (None, None):
            return super().given_text_rates
        listed = self.listed_text_rates or [self.optimizer.learning_rate] * 2
        return [rate if own is None else own for rate, own in zip(listed, self.encoder_rates.both, strict=True)]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for number, (rate, own) in enumerate(zip(self.listed_text_rates, self.encoder_rates.both, strict=False), start=1):
            if own is not None and own != rate:
                yield (
                    f"--text_encoder_lr{number} is {own:g}, but --text_encoder_lr gives that text encoder {rate:g}: they say "
                    "the same thing; keep one of them"
                )

    def warnings(self) -> Iterator[str]:
        yield from super().warnings()
        if self.run.mixed_precision == "fp16" and not self.model.no_half_vae and not self.model.vae:
            yield (
                "--mixed_precision=fp16 runs SDXL's VAE in fp16, where its values overflow: latents become NaN, pictures black; "
                "add --no_half_vae, or name a VAE that is made for fp16 with --vae"
            )

    def _wanted_text_rates(self) -> Iterator[str]:
        yield from super()._wanted_text_rates()
        for number, rate in enumerate(self.encoder_rates.both, start=1):
            if rate:
                yield f"--text_encoder_lr{number} {rate:g}"
