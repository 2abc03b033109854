"""Draws pictures with SDXL. The smallest command that works:

    python sdxl_minimal_inference.py --ckpt_path sd_xl_base_1.0.safetensors --prompt "a lighthouse at dusk" --output_dir pictures

With LoRA files: --lora_weights "my_lora.safetensors;0.8". See docs/making_pictures.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from typing import Any

from library.files.safetensors_file import SafetensorsHeader
from library.options.command_line import read_options
from library.options.sd_inference import SdxlInferenceOptions
from library.sampling.inference_checks import checked_pictures
from library.sampling.sd_inference_checks import SDXL_SETTINGS, checks_of
from library.sdxl.architecture import SDXL
from networks.lora_names import names_problem
from networks.sd_layouts import SDXL_NAMES


def lora_problem(options: Any, header: SafetensorsHeader) -> str | None:
    """By the names in the file; whether the sizes fit shows when the model is built."""
    return names_problem(f"--lora_weights {header.path}", list(header.tensors), SDXL_NAMES)


CHECKS = checks_of(SDXL, lora_problem, settings=SDXL_SETTINGS)

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_pictures(lambda: read_options(SdxlInferenceOptions), CHECKS)

import logging
from collections.abc import Sequence

import torch
from torch import nn

from library.sampling.inference import run_inference
from library.sampling.inference_checks import CheckedPictures
from library.sampling.picture_plan import Picture
from library.sampling.sd_inference import StableDiffusionPictureMaker
from library.sd.sampling import TextInputs
from library.sdxl.sampling import prompt_inputs
from library.sdxl.text import SdxlConditioning, SdxlTextEncoder, build_text_encoder
from networks import lora
from networks.merge_files import FileMerges, merges_of

logger = logging.getLogger("library.sampling")  # by name: as a script this module is __main__

Texts = tuple[str, str | None]  # a prompt, and another one for the second text encoder


class SdxlPictureMaker(StableDiffusionPictureMaker):
    """SDXL: two text encoders, and a U-Net that is told the picture's size."""

    ARCHITECTURE = SDXL
    SETTINGS = SDXL_SETTINGS

    def __init__(self, run: CheckedPictures):
        super().__init__(run)
        if self.dtype == torch.float16 and not self.options.files.vae:
            self.vae_dtype = torch.float32  # in float16 the published VAE overflows; another one may be made for it

    def build_text_encoder(self) -> SdxlTextEncoder:
        return build_text_encoder(self.run.layouts.text, max_token_length=self.options.files.max_token_length)

    def planned_merges(self, text_models: Sequence[nn.Module], unet: nn.Module) -> FileMerges:
        return merges_of(self.options.loras, lora, text_encoders=text_models, denoiser=unet)

    def texts_of(self, picture: Picture) -> list[Texts]:
        """The negative prompt is one for both encoders."""
        return [(picture.prompt, picture.prompt2), *([(picture.negative_prompt, None)] if picture.is_guided else [])]

    def encode(self, text: Texts) -> SdxlConditioning:
        first, second = text
        return self.text_encoder.encode_prompts([first], "cpu", second=None if second is None else [second])

    def inputs_of(
        self, picture: Picture, positive: SdxlConditioning, negative: SdxlConditioning | None
    ) -> tuple[TextInputs, TextInputs | None]:
        return prompt_inputs(positive, negative, (picture.width, picture.height))


def main(run: Any) -> None:
    run_inference(SdxlPictureMaker, run)


if __name__ == "__main__":
    main(RUN)
