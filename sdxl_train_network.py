"""Trains a LoRA for SDXL. The smallest command that works:

    accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py \\
      --pretrained_model_name_or_path sdxl.safetensors --train_data_dir pictures --caption_extension .txt --resolution 1024 \\
      --output_dir out --output_name my_lora --network_module networks.lora --learning_rate 1e-4

See docs/sdxl_train_network.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from library.options.command_line import read_options
from library.options.sd import SdxlTrainOptions
from library.sdxl.architecture import SDXL
from library.training.preflight import checked_run

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_run(lambda: read_options(SdxlTrainOptions), SDXL)

from typing import Any

import torch
from torch import Tensor

from library.dataset.batch import Batch
from library.sampling.picture_plan import Picture
from library.sd.metadata import describe
from library.sd.sampling import TextInputs
from library.sdxl.sampling import prompt_inputs
from library.sdxl.sizes import size_vector
from library.sdxl.text import SdxlConditioning, build_text_encoder
from library.training.loss.objective import NoisyLatents
from train_network import StableDiffusionTrainer, run_training


class SdxlNetworkTrainer(StableDiffusionTrainer):
    """SDXL: two text encoders, and a U-Net that is told the size of the image and where it was cut."""

    def build_text_encoder(self) -> Any:
        clip = self.options.clip
        return build_text_encoder(
            self.run.layouts.text,
            max_token_length=clip.max_token_length,
            weighted_captions=clip.weighted_captions,
            fp8=self.options.memory.fp8_base,
        )

    def conditioning_type(self) -> type[SdxlConditioning]:
        return SdxlConditioning

    def prompt_type(self) -> type[SdxlConditioning]:
        return SdxlConditioning

    def predict(self, denoiser: Any, noisy: NoisyLatents, batch: Batch) -> Tensor:
        text: Any = batch.text
        # fills: numbers copied from the host would make it wait for the device
        target_wh = torch.stack([torch.full_like(batch.original_wh[:, 0], side) for side in batch.target_wh], dim=1)  # (B, 2)
        vector = size_vector(text.pooled, batch.original_wh, batch.crop_left_top, target_wh)  # (B, 2816)
        return denoiser.predict(noisy.latents, noisy.timesteps, text.states, vector)

    def sample_texts(self, picture: Picture, positive: Any, negative: Any | None) -> tuple[TextInputs, TextInputs | None]:
        return prompt_inputs(positive, negative, (picture.width, picture.height))

    def describe_model(self) -> dict[str, str]:
        return describe(self.options, sdxl=True)


if __name__ == "__main__":
    run_training(SdxlNetworkTrainer, RUN)
