"""Trains a LoRA for Lumina Image 2.0. The smallest command that works:

    accelerate launch --num_cpu_threads_per_process 1 lumina_train_network.py \\
      --pretrained_model_name_or_path lumina_2.safetensors --gemma2 gemma_2_2b.safetensors --ae ae.safetensors \\
      --train_data_dir pictures --caption_extension .txt --resolution 1024 --output_dir out --output_name my_lora \\
      --network_module networks.lora_lumina --learning_rate 1e-4

See docs/lumina_train_network.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from library.lumina.architecture import LUMINA
from library.options.command_line import read_options
from library.options.lumina import LuminaTrainOptions
from library.training.preflight import checked_run

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_run(lambda: read_options(LuminaTrainOptions), LUMINA)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.lumina.checkpoint import build_denoiser, load_denoiser
from library.lumina.denoiser import NextDit
from library.lumina.fp8_layers import DENOISER_FP8_LAYERS
from library.lumina.memory_use import memory_use
from library.lumina.sampling import SCHEDULE, velocity_of
from library.lumina.system_prompt import about_system_prompt
from library.lumina.text import LuminaConditioning, LuminaTextEncoder, build_text_encoder, load_text_encoder, text_models
from library.nn.loading import Place
from library.nn.memory_use import MemoryUse
from library.sampling.flow_samplers import Predict
from library.sd.vae import StableDiffusionVae, load_vae
from library.training.flow_hooks import FlowHooks
from library.training.loss.objective import NoisyLatents
from train_network import NetworkTrainer, run_training


class LuminaNetworkTrainer(FlowHooks, NetworkTrainer):
    """Lumina Image 2.0: a NextDiT, Gemma 2 text states, the FLUX image coder, rectified flow."""

    SCHEDULE = SCHEDULE

    def build_denoiser(self) -> NextDit:
        denoiser = build_denoiser(self.run.layouts.denoiser.config)
        # lengths that change would be compiled again and again; ranks are dropped of each sample, for which a pack has no axis
        denoiser.packs = not self.options.compile.compiles and not drops_ranks(self.options.network.network_args)
        return denoiser

    def fp8_layers(self) -> str:
        return DENOISER_FP8_LAYERS

    def load_denoiser(self, denoiser: Any, *, device: Place, dtype: torch.dtype) -> None:
        load_denoiser(denoiser, self.run.layouts.denoiser, device=device, dtype=dtype)

    def memory_use(self, size_wh: tuple[int, int], images: int) -> MemoryUse:
        return memory_use(self.run.layouts, size_wh, images, self.live_encoders)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> StableDiffusionVae:
        scale, shift = LUMINA.scale_and_shift(self.run.layouts)
        return load_vae(self.run.layouts.vae, device=device, dtype=dtype, scale=scale, shift=shift)

    def build_text_encoder(self) -> LuminaTextEncoder:
        layouts, system_prompt = self.run.layouts, self.options.lumina.system_prompt
        return build_text_encoder(layouts.text, layouts.tokenizer, system_prompt=system_prompt, fp8=self.options.memory.fp8_base)

    def text_models(self, text_encoder: LuminaTextEncoder) -> list[nn.Module]:
        return text_models(text_encoder)

    def load_text_encoder(self, text_encoder: LuminaTextEncoder, *, device: torch.device, dtype: torch.dtype) -> None:
        load_text_encoder(text_encoder, self.run.layouts.text, device=device, dtype=dtype)

    def conditioning_type(self) -> type[LuminaConditioning]:
        return LuminaConditioning

    def encode_images(self, vae: StableDiffusionVae, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(pixels, seeds)

    def encode_text(self, text_encoder: LuminaTextEncoder, captions: Sequence[str]) -> LuminaConditioning:
        return text_encoder.encode(captions, self.device)

    def encode_prompts(self, text_encoder: LuminaTextEncoder, prompts: Sequence[str]) -> LuminaConditioning:
        return text_encoder.encode_prompts(prompts, self.device)

    def predict(self, denoiser: Any, noisy: NoisyLatents, batch: Batch) -> Tensor:
        text: Any = batch.text
        return velocity_of(denoiser)(noisy.latents, noisy.sigmas, text)

    def velocity(self) -> Predict:
        return velocity_of(self.denoiser)

    def flow_text(self, text: LuminaConditioning) -> LuminaConditioning:
        return text

    def decode_images(self, vae: StableDiffusionVae, latents: Tensor) -> Tensor:
        return vae.decode(latents)

    def about_samples(self) -> dict[str, str]:
        return about_system_prompt(self.options.lumina.system_prompt)

    def describe_model(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "lumina2",
            "ss_system_prompt": self.options.lumina.system_prompt,
            "ss_gemma2_max_token_length": str(self.options.lumina.tokens),
            **self.flow_metadata(),
            "modelspec.architecture": "lumina-2/lora",
            "modelspec.implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        }


def drops_ranks(network_args: Sequence[str] | None) -> bool:
    """Whether --network_args ask for rank dropout."""
    pairs = (argument.partition("=") for argument in network_args or ())
    return any(name.strip() == "rank_dropout" and _is_above_zero(value) for name, _, value in pairs)


def _is_above_zero(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False  # None, or a mistake that the network module tells


if __name__ == "__main__":
    run_training(LuminaNetworkTrainer, RUN)
