"""Draws pictures with Lumina Image 2.0. The smallest command that works:

    python lumina_minimal_inference.py --pretrained_model_name_or_path lumina_2.safetensors \\
      --gemma2_path gemma_2_2b.safetensors --ae_path ae.safetensors --prompt "a lighthouse at dusk" --output_dir pictures

With LoRA files: --lora_weights "my_lora.safetensors;0.8". See docs/making_pictures_flow.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from library.files.safetensors_file import SafetensorsHeader
from library.lumina.architecture import LUMINA
from library.lumina.layout import LuminaLayouts
from library.lumina.source import LATENT_CHANNELS
from library.lumina.system_prompt import about_system_prompt, with_system_prompt
from library.options.anima_inference import SAMPLERS
from library.options.command_line import read_options
from library.options.lumina_inference import LuminaInferenceOptions
from library.sampling.inference_checks import InferenceChecks, checked_pictures, own_flag_names, with_own_flags
from library.sampling.picture_plan import LUMINA_SETTINGS
from networks.lora_names import names_problem
from networks.lumina_layouts import LUMINA_NAMES

FLAG_NAMES = {"--gemma2": "--gemma2_path", "--ae": "--ae_path"}  # training's -> this script's
SETTINGS = LUMINA_SETTINGS | {"lora_multipliers"}


def read_layouts(options: LuminaInferenceOptions) -> LuminaLayouts:
    """The checked model files. Raises CheckpointError or OptionError, with this script's names of the flags."""
    return with_own_flags(lambda: LUMINA.read_layouts(as_in_training(options), options.parts), FLAG_NAMES)


def as_in_training(options: LuminaInferenceOptions) -> SimpleNamespace:
    """What the architecture asks of a training's options, of this script's own."""
    files = options.files
    return SimpleNamespace(
        model=SimpleNamespace(pretrained_model_name_or_path=files.pretrained_model_name_or_path),
        lumina=SimpleNamespace(
            gemma2=files.gemma2_path,
            gemma2_tokenizer=files.gemma2_tokenizer,
            gemma2_max_token_length=files.gemma2_max_token_length,
            ae=files.ae_path,
            system_prompt=options.prompts.system_prompt,
        ),
        caches=SimpleNamespace(import_reference_caches=False),
    )


def lora_problem(options: LuminaInferenceOptions, header: SafetensorsHeader) -> str | None:
    """By the names in the file; whether the sizes fit shows when the model is built."""
    return names_problem(f"--lora_weights {header.path}", list(header.tensors), LUMINA_NAMES)


def model_warnings(layouts: LuminaLayouts, options: LuminaInferenceOptions) -> Iterator[str]:
    for warning in LUMINA.warnings_of(layouts, as_in_training(options)):
        yield own_flag_names(warning, FLAG_NAMES)


CHECKS = InferenceChecks(
    read_layouts=read_layouts,
    lora_problem=lora_problem,
    latent_channels=lambda layouts: LATENT_CHANNELS,
    side_step=LUMINA.bucket_step,
    samplers=SAMPLERS,
    settings=SETTINGS,
    model_warnings=model_warnings,
)

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_pictures(lambda: read_options(LuminaInferenceOptions), CHECKS)

import time
from collections.abc import Sequence

from torch import nn

from library.dataset.token_use import TokenUse
from library.lumina.checkpoint import build_denoiser, load_denoiser
from library.lumina.denoiser import NextDit
from library.lumina.sampling import SCHEDULE, repeated, velocity_of
from library.lumina.text import LuminaConditioning, LuminaTextEncoder, build_text_encoder, load_text_encoder, text_models
from library.sampling.flow_inference import FlowPictureMaker
from library.sampling.flow_samplers import Predict
from library.sampling.inference import run_inference
from library.sampling.inference_checks import CheckedPictures
from library.sampling.picture_plan import Picture
from library.sd.vae import StableDiffusionVae, load_vae
from library.training.models.precision import WEIGHT_DTYPES
from networks import lora_lumina
from networks.merge_files import FileMerges, merges_of


class LuminaPictureMaker(FlowPictureMaker):
    """Lumina Image 2.0: a NextDiT, Gemma 2 text states, the FLUX image coder, rectified flow."""

    SIDE_STEP_PX = LUMINA.bucket_step
    SETTINGS = SETTINGS
    SCHEDULE = SCHEDULE
    PARTS = {"Model": "pretrained_model_name_or_path", "Text encoder": "gemma2_path", "VAE": "ae_path"}

    def __init__(self, run: CheckedPictures):
        super().__init__(run)
        compute = self.options.compute
        self.text_dtype = WEIGHT_DTYPES[compute.text_precision]
        self.vae_dtype = WEIGHT_DTYPES[compute.vae_precision]

    def build_denoiser(self) -> NextDit:
        return build_denoiser(self.run.layouts.denoiser.config)

    def build_text_encoder(self) -> LuminaTextEncoder:
        return build_text_encoder(self.run.layouts.text, self.run.layouts.tokenizer)

    def text_models(self) -> list[nn.Module]:
        return text_models(self.text_encoder)

    def planned_loras(self, text_models: Sequence[nn.Module], denoiser: nn.Module) -> FileMerges:
        return merges_of(self.options.loras, lora_lumina, text_encoders=text_models, denoiser=denoiser)

    def load_text_weights(self) -> None:
        load_text_encoder(self.text_encoder, self.run.layouts.text, device=self.text_device, dtype=self.text_dtype)

    def load_denoiser_weights(self) -> None:
        load_denoiser(self.denoiser, self.run.layouts.denoiser, device=self.device, dtype=self.dtype)

    def load_vae(self) -> StableDiffusionVae:
        scale, shift = LUMINA.scale_and_shift(self.run.layouts)
        return load_vae(self.run.layouts.vae, device=self.device, dtype=self.vae_dtype, scale=scale, shift=shift)

    def positive_text(self, picture: Picture) -> str:
        return with_system_prompt(picture.prompt, self.options.prompts.system_prompt)

    def negative_text(self, picture: Picture) -> str:
        prompts = self.options.prompts
        before = prompts.system_prompt if prompts.add_system_prompt_to_negative_prompt else ""
        return with_system_prompt(picture.negative_prompt, before)

    def cut_texts(self, texts: Sequence[str]) -> Iterator[tuple[str, TokenUse]]:
        return LUMINA.cut_prompts(texts, as_in_training(self.options))

    def encode_text(self, text: str) -> LuminaConditioning:
        return self.text_encoder.encode_prompts([text], "cpu")

    def velocity(self) -> Predict:
        return velocity_of(self.denoiser)

    def flow_text(self, text: LuminaConditioning, images: int) -> LuminaConditioning:
        return repeated(text, images, dtype=self.dtype)

    def name_of(self, picture: Picture) -> str:
        """The reference's: date, time and seed."""
        return f"image_{time.strftime('%Y%m%d%H%M%S')}_{picture.seed}"

    def about(self, picture: Picture) -> dict[str, str]:
        return {**about_system_prompt(self.options.prompts.system_prompt), **super().about(picture)}


def main(run: Any) -> None:
    run_inference(LuminaPictureMaker, run)


if __name__ == "__main__":
    main(RUN)
