"""Draws pictures with Stable Diffusion 1.x or 2.x. The smallest command that works:

    python sd_minimal_inference.py --ckpt_path sd15.safetensors --prompt "a lighthouse at dusk" --output_dir pictures

With LoRA files: --lora_weights "my_lora.safetensors;0.8". See docs/making_pictures.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from typing import Any

from library.files.safetensors_file import SafetensorsHeader
from library.options.command_line import read_options
from library.options.sd_inference import SdInferenceOptions
from library.sampling.inference_checks import checked_pictures
from library.sampling.sd_inference_checks import checks_of
from library.sd.architecture import STABLE_DIFFUSION
from networks.lora_names import names_problem
from networks.sd_layouts import SD1_NAMES, SD2_NAMES


def lora_problem(options: Any, header: SafetensorsHeader) -> str | None:
    """By the names in the file; whether the sizes fit shows when the model is built."""
    names = SD2_NAMES if options.files.v2 else SD1_NAMES
    return names_problem(f"--lora_weights {header.path}", list(header.tensors), names)


CHECKS = checks_of(STABLE_DIFFUSION, lora_problem)

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_pictures(lambda: read_options(SdInferenceOptions), CHECKS)

import logging
from collections.abc import Sequence

from torch import nn

from library.sampling.inference import run_inference
from library.sampling.picture_plan import Picture
from library.sampling.sd_inference import StableDiffusionPictureMaker
from library.sd.sampling import TextInputs, prompt_inputs
from library.sd.text import SdPrompts, SdTextEncoder, build_text_encoder
from networks import lora
from networks.merge_files import FileMerges, merges_of

logger = logging.getLogger("library.sampling")  # by name: as a script this module is __main__


class SdPictureMaker(StableDiffusionPictureMaker):
    """Stable Diffusion 1.x and 2.x."""

    ARCHITECTURE = STABLE_DIFFUSION

    def build_text_encoder(self) -> SdTextEncoder:
        files = self.options.files
        return build_text_encoder(self.run.layouts.text, v2=files.v2, clip_skip=files.clip_skip)

    def planned_merges(self, text_models: Sequence[nn.Module], unet: nn.Module) -> FileMerges:
        return merges_of(self.options.loras, lora, text_encoders=text_models, denoiser=unet)

    def encode(self, text: str) -> SdPrompts:
        return self.text_encoder.encode_prompts([text], "cpu")

    def inputs_of(
        self, picture: Picture, positive: SdPrompts, negative: SdPrompts | None
    ) -> tuple[TextInputs, TextInputs | None]:
        return prompt_inputs(positive, negative)

    def about(self, picture: Picture) -> dict[str, str]:
        clip_skip = self.options.files.clip_skip
        return {**({"Clip skip": str(clip_skip)} if clip_skip else {}), **super().about(picture)}


def main(run: Any) -> None:
    run_inference(SdPictureMaker, run)


if __name__ == "__main__":
    main(RUN)
