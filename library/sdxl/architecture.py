"""SDXL before torch is imported: what differs from Stable Diffusion 1.x and 2.x (library/sd/architecture.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from library.files.model_path import SDXL as SDXL_KIND
from library.files.weights_source import Part
from library.sd.architecture import StableDiffusionArchitecture, file_text_part
from library.sd.clip_layout import ClipConfig, clip_part
from library.sd.clip_tokenizer import CLIP_L, OPEN_CLIP_G, PIECE, TokenizerKind
from library.sd.layout import SDXL_SCALE, StableDiffusionLayouts
from library.sd.source import MODEL_FLAG, TEXT_ENCODERS, ModelSource

CLIP_L_PREFIX, CLIP_G_PREFIX = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SIZE_NUMBERS = 6 * 256  # of the vector: sinusoids of the six sizes; the rest is the pooled text


class SdxlArchitecture(StableDiffusionArchitecture):
    """See library/training/architecture.py for what each answer means."""

    name: ClassVar[str] = "sdxl"
    bucket_step: ClassVar[int] = 32  # pixels: 8 of the VAE times 2 halvings in the U-Net
    wanted: ClassVar[str] = SDXL_KIND
    latent_scale: ClassVar[float] = SDXL_SCALE
    text_folders: ClassVar[tuple[str, ...]] = TEXT_ENCODERS
    encoder_names: ClassVar[tuple[str, ...]] = ("CLIP-L", "CLIP-G")

    def model_name(self, options: Any) -> str:
        return "SDXL"

    def text_parts(self, model: ModelSource, options: Any) -> tuple[Part[ClipConfig], ...]:
        if model.file is None:
            return tuple(clip_part(model.part(folder), prefix="", layout="hf") for folder in TEXT_ENCODERS)
        return (file_text_part(model.file, CLIP_L_PREFIX, "hf"), file_text_part(model.file, CLIP_G_PREFIX, "open_clip"))

    def check_clip_skip(self, parts: tuple[Part[ClipConfig], ...], options: Any) -> None:
        """It goes into the metadata only, so that any number will do."""

    def text_settings(self, options: Any) -> dict[str, object]:
        """--clip_skip has no say."""
        return {}

    def tokenizer_kinds(self, options: Any) -> tuple[TokenizerKind, ...]:
        return CLIP_L, OPEN_CLIP_G

    def prompt_tokens(self, options: Any) -> int:
        """As of a caption."""
        return options.clip.max_token_length or PIECE

    def fit_problems(self, layouts: StableDiffusionLayouts) -> Iterator[str]:
        yield from super().fit_problems(layouts)
        if layouts.denoiser is None or not layouts.text:
            return
        given, wanted = layouts.text[1].config.projection, layouts.denoiser.config.vector_width - SIZE_NUMBERS
        if given != wanted:
            yield (
                f"{MODEL_FLAG} {layouts.denoiser.source.path}: its U-Net takes a pooled text of {wanted} values, its second text "
                f"encoder gives {given or 'none'}: they belong to different models"
            )


SDXL = SdxlArchitecture()
