"""Anima before torch is imported: its files, its bucket step, what its caches depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.anima.layout import DenoiserLayout, read_denoiser_layout
from library.anima.text_layout import TextEncoderLayout, read_text_encoder_layout
from library.anima.vae_layout import VaeLayout, read_vae_layout
from library.dataset.latent_cache import LatentRecipe
from library.dataset.text_cache import TextRecipe
from library.errors import CheckpointError
from library.files.model_path import QWEN3, QWEN_IMAGE_VAE, find_model_file
from library.files.safetensors_file import file_fingerprint

DTYPE_NAMES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # --mixed_precision -> dtype of frozen models


@dataclass(frozen=True, slots=True)
class AnimaLayouts:
    """The checked files of a run."""

    denoiser: DenoiserLayout
    text: TextEncoderLayout
    vae: VaeLayout


class AnimaArchitecture:
    """See library/training/architecture.py for what each answer means."""

    name: ClassVar[str] = "anima"
    bucket_step: ClassVar[int] = 16  # pixels: 8 of the VAE times patches of 2
    prompt_settings: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "width", "height", "seed", "sample_steps", "scale", "flow_shift"}
    )
    caches_text: ClassVar[bool] = True

    def read_layouts(self, options: Any) -> AnimaLayouts:
        model, anima = options.model, options.anima
        problems: list[str] = []
        found: dict[str, Any] = {}
        with _collected(problems):
            found["denoiser"] = read_denoiser_layout(model.pretrained_model_name_or_path, anima.llm_adapter_path)
        with _collected(problems):
            found["text"] = read_text_encoder_layout(find_model_file("--qwen3", anima.qwen3, QWEN3, allow_folder=True))
        with _collected(problems):
            found["vae"] = read_vae_layout(model.vae)
        if problems:
            raise CheckpointError(*problems)
        return AnimaLayouts(**found)

    def latent_recipe(self, layouts: AnimaLayouts, options: Any) -> LatentRecipe:
        dtype = "float32" if options.model.no_half_vae else DTYPE_NAMES[options.run.mixed_precision]
        return LatentRecipe(arch=self.name, vae_fingerprint=file_fingerprint(Path(options.model.vae)), dtype=dtype)

    def text_recipe(self, layouts: AnimaLayouts, options: Any) -> TextRecipe:
        anima = options.anima
        tokenizer = file_fingerprint(Path(anima.t5_tokenizer_path)) if anima.t5_tokenizer_path else "bundled"
        settings = {"qwen3_tokens": anima.qwen3_max_token_length, "t5_tokens": anima.t5_max_token_length, "t5_tokenizer": tokenizer}
        return TextRecipe(
            arch=self.name,
            encoder_fingerprint=file_fingerprint(Path(anima.qwen3)),
            dtype=DTYPE_NAMES[options.run.mixed_precision],
            settings=settings,
        )


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        problems += error.problems


ANIMA = AnimaArchitecture()
