"""Trains a LoRA for Stable Diffusion 3 or 3.5. The smallest command that works:

    accelerate launch --num_cpu_threads_per_process 1 sd3_train_network.py \\
      --pretrained_model_name_or_path sd3.5_medium.safetensors --clip_l clip_l.safetensors --clip_g clip_g.safetensors \\
      --t5xxl t5xxl_fp16.safetensors --train_data_dir pictures --caption_extension .txt --resolution 1024 \\
      --output_dir out --output_name my_lora --network_module networks.lora_sd3 --learning_rate 1e-4

See docs/sd3_train_network.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from library.options.command_line import read_options
from library.options.sd3 import Sd3TrainOptions
from library.sd3.architecture import SD3
from library.training.preflight import checked_run

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_run(lambda: read_options(Sd3TrainOptions), SD3)

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.dataset.items import TrainingSet
from library.nn.loading import Place
from library.nn.memory_use import MemoryUse
from library.nn.transfer import sent
from library.sampling.flow_samplers import Predict
from library.sampling.picture_plan import sample_sizes
from library.sd.vae import StableDiffusionVae, load_vae
from library.sd3.checkpoint import build_denoiser, load_denoiser
from library.sd3.denoiser import Mmdit
from library.sd3.fp8_layers import DENOISER_FP8_LAYERS
from library.sd3.layout import PIXELS_PER_LATENT, Sd3Layouts, Sd3TextParts, with_centre_of_positions
from library.sd3.memory_use import T5Use, memory_use
from library.sd3.sampling import SCHEDULE, TextInputs, text_inputs, velocity_of
from library.sd3.text import ROWS_WITHOUT_T5, Sd3Conditioning, Sd3TextEncoder, build_text_encoder, load_text_encoder, text_models
from library.training.flow_hooks import FlowHooks
from library.training.loss.noise import Draws
from library.training.loss.objective import NoisyLatents
from train_network import NetworkTrainer, run_training

T5_NUMBER = 3  # among the text encoders, from 1


class Sd3NetworkTrainer(FlowHooks, NetworkTrainer):
    """Stable Diffusion 3 and 3.5: an MMDiT, text states of CLIP-L, CLIP-G and T5, a 16-channel VAE, rectified flow."""

    SCHEDULE = SCHEDULE

    @property
    def has_t5(self) -> bool:
        text = self.run.layouts.text
        return text is not None and text.t5 is not None

    def devices_apart(self) -> dict[str, str]:
        place = self.options.sd3.t5xxl_device
        return {"--t5xxl_device": place} if self.has_t5 and place is not None else {}

    def build_denoiser(self) -> Mmdit:
        sd3, config = self.options.sd3, self.run.layouts.denoiser.config
        if sd3.pos_emb_random_crop_rate and not sd3.enable_scaled_pos_embed:
            return build_denoiser(config)
        sizes = [item.bucket_wh for item in self.run.training_set.all_items]
        drawn = sample_sizes(self.run.prompts, SD3.name)
        return build_denoiser(with_centre_of_positions(config, () if sd3.enable_scaled_pos_embed else [*sizes, *drawn]))

    def fp8_layers(self) -> str:
        return DENOISER_FP8_LAYERS

    def load_denoiser(self, denoiser: Any, *, device: Place, dtype: torch.dtype) -> None:
        load_denoiser(denoiser, self.run.layouts.denoiser, device=device, dtype=dtype)
        if self.options.sd3.enable_scaled_pos_embed:
            denoiser.use_scaled_positions(latent_sides(self.run.training_set))

    def memory_use(self, size_wh: tuple[int, int], images: int) -> MemoryUse:
        sd3 = self.options.sd3
        t5 = T5Use(
            runs=self.has_t5 and self.run.text_cache is None and sd3.t5xxl_device is None,
            is_trained=self.options.trains_t5,
            tokens=sd3.t5xxl_max_token_length if self.has_t5 else ROWS_WITHOUT_T5,
        )
        return memory_use(self.run.layouts, size_wh, images, self.live_encoders, t5)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> StableDiffusionVae:
        scale, shift = SD3.scale_and_shift(self.run.layouts)
        return load_vae(self.run.layouts.vae, device=device, dtype=dtype, scale=scale, shift=shift)

    @property
    def live_layouts(self) -> Sd3Layouts:
        """Without T5 where its outputs come from the cache."""
        layouts: Sd3Layouts = self.run.layouts
        if self.run.text_cache is None or layouts.text is None:
            return layouts
        return replace(layouts, text=replace(layouts.text, t5=None))

    def build_text_encoder(self) -> Sd3TextEncoder:
        return self._encoder(self.run.layouts.text)

    def build_live_encoder(self) -> Sd3TextEncoder:
        return self._encoder(self.live_layouts.text)

    def _encoder(self, parts: Sd3TextParts | None) -> Sd3TextEncoder:
        assert parts is not None
        sd3 = self.options.sd3
        return build_text_encoder(
            parts,
            t5_tokens=sd3.t5xxl_max_token_length,
            mask_clip=sd3.apply_lg_attn_mask,
            mask_t5=sd3.apply_t5_attn_mask,
            fp8=self.options.memory.fp8_base,
            t5_fp8=sd3.t5_fp8,
        )

    def text_models(self, text_encoder: Sd3TextEncoder) -> list[nn.Module]:
        return text_models(text_encoder)

    def absent_text_encoders(self) -> dict[int, str]:
        return {} if self.has_t5 else {T5_NUMBER: "there is no T5"}

    def load_text_encoder(self, text_encoder: Sd3TextEncoder, *, device: torch.device, dtype: torch.dtype) -> None:
        sd3 = self.options.sd3
        parts = self.run.layouts.text
        load_text_encoder(
            text_encoder,
            parts,
            device=device,
            dtype=dtype,
            t5_device=sd3.t5xxl_device,
            t5_dtype=None if sd3.t5_dtype is None or sd3.t5_fp8 else getattr(torch, sd3.t5_dtype),
        )

    def conditioning_type(self) -> type[Sd3Conditioning]:
        return Sd3Conditioning

    def encode_images(self, vae: StableDiffusionVae, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(pixels, seeds)

    def encode_text(self, text_encoder: Sd3TextEncoder, captions: Sequence[str]) -> Sd3Conditioning:
        return text_encoder.encode(captions, self.device)

    def completed_text(self, live: Sd3Conditioning, cached: Sd3Conditioning) -> Sd3Conditioning:
        return live.with_t5(cached)

    def predict(self, denoiser: Any, noisy: NoisyLatents, batch: Batch) -> Tensor:
        text: Any = batch.text
        corners = None
        if noisy.draws is not None:
            text = self.with_dropped_encoders(text, noisy.draws)
            corners = self.position_corners(denoiser, noisy)
        inputs = text_inputs(denoiser, text)
        return denoiser(noisy.latents, noisy.timesteps, inputs.context, inputs.pooled, corners=corners)

    def with_dropped_encoders(self, text: Sd3Conditioning, draws: Draws) -> Sd3Conditioning:
        """In training, each encoder's share is zero now and then, each with its rate."""
        sd3 = self.options.sd3
        rates = {"clip_l": sd3.clip_l_dropout_rate, "clip_g": sd3.clip_g_dropout_rate, "t5": sd3.t5_dropout_rate}
        if not any(rates.values()):
            return text
        return text.dropped(*(draws.uniform(f"{name} dropout") < rate for name, rate in rates.items()))

    def position_corners(self, denoiser: Any, noisy: NoisyLatents) -> Tensor | None:
        """(B, 2), where each sample's window into the position table begins: with --pos_emb_random_crop_rate anywhere now and
        then, else in the middle. None = all in the middle."""
        rate = self.options.sd3.pos_emb_random_crop_rate
        if not rate or noisy.draws is None:
            return None
        free = free_places(denoiser, noisy.latents)
        anywhere = (noisy.draws.uniform("position corner", 2) * (free + 1)).long().clamp_max(free)  # a draw of 1 rounds up
        is_cropped = noisy.draws.uniform("position crop", 1) < rate
        return torch.where(is_cropped, anywhere, free // 2)

    def velocity(self) -> Predict:
        return velocity_of(self.denoiser)

    def flow_text(self, text: Sd3Conditioning) -> TextInputs:
        return text_inputs(self.denoiser, text)

    def decode_images(self, vae: StableDiffusionVae, latents: Tensor) -> Tensor:
        return vae.decode(latents)

    def describe_model(self) -> dict[str, str]:
        sd3, kind = self.options.sd3, self.run.layouts.denoiser.config.kind
        return {
            "ss_base_model_version": kind,
            **self.flow_metadata(),
            "ss_apply_lg_attn_mask": str(sd3.apply_lg_attn_mask),
            "ss_apply_t5_attn_mask": str(sd3.apply_t5_attn_mask),
            "modelspec.architecture": f"stable-diffusion-3-{kind}/lora",
            "modelspec.implementation": "diffusers",
        }


def free_places(denoiser: Any, latents: Tensor) -> Tensor:
    """(2,), how many rows and columns of the position table a window for these latents can be moved by."""
    side, patch = denoiser.position_side(*latents.shape[-2:]), denoiser.config.patch
    return sent(torch.tensor([side - length // patch for length in latents.shape[-2:]]), latents.device)


def latent_sides(training_set: TrainingSet) -> list[int]:
    """Of a square image as large as each dataset's resolution, in latents."""
    areas = {math.prod(dataset.resolution_wh) for dataset in training_set.datasets}
    return sorted({round(math.sqrt(area)) // PIXELS_PER_LATENT for area in areas})


if __name__ == "__main__":
    run_training(Sd3NetworkTrainer, RUN)
