"""Draws pictures with Stable Diffusion 3 or 3.5. The smallest command that works:

    python sd3_minimal_inference.py --ckpt_path sd3.5_medium.safetensors --clip_l clip_l.safetensors \\
      --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors --prompt "a lighthouse at dusk" --output_dir pictures

With LoRA files: --lora_weights "my_lora.safetensors;0.8". See docs/making_pictures_flow.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from library.files.safetensors_file import SafetensorsHeader
from library.options.anima_inference import SAMPLERS
from library.options.command_line import read_options
from library.options.sd3_inference import Sd3InferenceOptions
from library.sampling.inference_checks import InferenceChecks, checked_pictures, own_flag_names, with_own_flags
from library.sampling.picture_plan import FLOW_SETTINGS
from library.sd3.architecture import CHANNELS, SD3
from library.sd3.layout import Sd3Layouts
from networks.lora_names import names_problem
from networks.sd3_layouts import SD3_NAMES

# training's flags -> this script's
FLAG_NAMES = {"--pretrained_model_name_or_path": "--ckpt_path", "--t5xxl_max_token_length": "--t5xxl_token_length"}
SETTINGS = FLOW_SETTINGS | {"lora_multipliers"}


def read_layouts(options: Sd3InferenceOptions) -> Sd3Layouts:
    """The checked model files. Raises CheckpointError or OptionError, with this script's names of the flags."""
    return with_own_flags(lambda: SD3.read_layouts(as_in_training(options), options.parts), FLAG_NAMES)


def as_in_training(options: Sd3InferenceOptions) -> SimpleNamespace:
    """What the architecture asks of a training's options, of this script's own."""
    files = options.files
    return SimpleNamespace(
        model=SimpleNamespace(pretrained_model_name_or_path=files.ckpt_path, vae=files.vae),
        sd3=SimpleNamespace(
            clip_l=files.clip_l,
            clip_g=files.clip_g,
            t5xxl=files.t5xxl,
            t5xxl_max_token_length=files.t5xxl_token_length,
            apply_t5_attn_mask=files.apply_t5_attn_mask,
        ),
    )


def lora_problem(options: Sd3InferenceOptions, header: SafetensorsHeader) -> str | None:
    """By the names in the file; whether the sizes fit shows when the model is built."""
    return names_problem(f"--lora_weights {header.path}", list(header.tensors), SD3_NAMES)


def model_warnings(layouts: Sd3Layouts, options: Sd3InferenceOptions) -> Iterator[str]:
    for warning in SD3.warnings_of(layouts, as_in_training(options)):
        yield own_flag_names(warning, FLAG_NAMES)


def size_problems(layouts: Sd3Layouts, sizes_wh: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Pictures that are larger than the model's table of positions."""
    for problem in SD3.size_problems(layouts, sizes_wh, SimpleNamespace(sd3=None)):
        yield f"{problem.partition(';')[0]}: draw smaller pictures"


CHECKS = InferenceChecks(
    read_layouts=read_layouts,
    lora_problem=lora_problem,
    latent_channels=lambda layouts: CHANNELS,
    side_step=SD3.bucket_step,
    samplers=SAMPLERS,
    settings=SETTINGS,
    model_warnings=model_warnings,
    size_problems=size_problems,
)

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_pictures(lambda: read_options(Sd3InferenceOptions), CHECKS)

import logging
import time
from collections.abc import Sequence

from torch import nn

from library.dataset.token_use import TokenUse
from library.sampling.flow_inference import FlowPictureMaker
from library.sampling.flow_samplers import Predict
from library.sampling.inference import run_inference
from library.sampling.picture_plan import Picture
from library.sd.vae import StableDiffusionVae, load_vae
from library.sd3.checkpoint import build_denoiser, load_denoiser
from library.sd3.denoiser import Mmdit
from library.sd3.sampling import SCHEDULE, TextInputs, text_inputs, velocity_of
from library.sd3.text import Sd3Conditioning, Sd3TextEncoder, build_text_encoder, load_text_encoder, text_models
from networks import lora_sd3
from networks.merge_files import FileMerges, merges_of
from networks.network import T5_NAMES

logger = logging.getLogger("library.sampling")  # by name: as a script this module is __main__


class Sd3PictureMaker(FlowPictureMaker):
    """Stable Diffusion 3 and 3.5: an MMDiT, text states of CLIP-L, CLIP-G and T5, a 16-channel VAE, rectified flow."""

    SIDE_STEP_PX = SD3.bucket_step
    SETTINGS = SETTINGS
    SCHEDULE = SCHEDULE
    PARTS = {"Model": "ckpt_path", "CLIP-L": "clip_l", "CLIP-G": "clip_g", "T5": "t5xxl", "VAE": "vae"}

    def build_denoiser(self) -> Mmdit:
        return build_denoiser(self.run.layouts.denoiser.config)

    def build_text_encoder(self) -> Sd3TextEncoder:
        files = self.options.files
        return build_text_encoder(
            self.run.layouts.text,
            t5_tokens=files.t5xxl_token_length,
            mask_clip=files.apply_lg_attn_mask,
            mask_t5=files.apply_t5_attn_mask,
        )

    def text_models(self) -> list[nn.Module]:
        return text_models(self.text_encoder)

    def planned_loras(self, text_models: Sequence[nn.Module], denoiser: nn.Module) -> FileMerges:
        planned = merges_of(self.options.loras, lora_sd3, text_encoders=text_models, denoiser=denoiser)
        if self.run.layouts.text.t5 is None:
            for (file, _), keys in zip(self.options.loras.files, planned.names(), strict=True):
                if any(key.startswith(T5_NAMES) for key in keys):
                    logger.warning("warning: %s changes T5 too, which is left out: there is no T5 (--t5xxl)", file)
        return planned

    def load_text_weights(self) -> None:
        load_text_encoder(self.text_encoder, self.run.layouts.text, device=self.text_device, dtype=self.text_dtype)

    def load_denoiser_weights(self) -> None:
        load_denoiser(self.denoiser, self.run.layouts.denoiser, device=self.device, dtype=self.dtype)

    def load_vae(self) -> StableDiffusionVae:
        scale, shift = SD3.scale_and_shift(self.run.layouts)
        return load_vae(self.run.layouts.vae, device=self.device, dtype=self.vae_dtype, scale=scale, shift=shift)

    def cut_texts(self, texts: Sequence[str]) -> Iterator[tuple[str, TokenUse]]:
        return SD3.cut_prompts(texts, as_in_training(self.options))

    def encode_text(self, text: str) -> Sd3Conditioning:
        return self.text_encoder.encode([text], "cpu")

    def velocity(self) -> Predict:
        return velocity_of(self.denoiser)

    def flow_text(self, text: Sd3Conditioning, images: int) -> TextInputs:
        return text_inputs(self.denoiser, text).repeated(images)

    def problems_of(self, picture: Picture) -> Iterable[str]:
        return size_problems(self.run.layouts, [(picture.width, picture.height)])

    def name_of(self, picture: Picture) -> str:
        """The reference's: date and time."""
        return time.strftime("%Y%m%d_%H%M%S")


def main(run: Any) -> None:
    run_inference(Sd3PictureMaker, run)


if __name__ == "__main__":
    main(RUN)
