"""Trains a LoRA for Anima. The smallest command that works:

    accelerate launch --num_cpu_threads_per_process 1 anima_train_network.py \\
      --pretrained_model_name_or_path anima.safetensors --qwen3 qwen3_06b.safetensors --vae qwen_image_vae.safetensors \\
      --train_data_dir pictures --caption_extension .txt --resolution 1024 --output_dir out --output_name my_lora \\
      --network_module networks.lora_anima --learning_rate 1e-4

See docs/anima_train_network.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from library.anima.architecture import ANIMA
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.preflight import checked_run

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_run(lambda: read_options(AnimaTrainOptions), ANIMA)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.anima.checkpoint import build_denoiser, load_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.memory_use import memory_use
from library.anima.sampling import TextContext, encode_context, velocity_of
from library.anima.text import AnimaConditioning, AnimaTextEncoder, build_text_encoder, load_text_encoder
from library.anima.vae import QwenImageVae, load_vae
from library.dataset.batch import Batch
from library.nn.loading import Place
from library.nn.memory_use import MemoryUse
from library.sampling.flow_samplers import Predict
from library.training.flow_hooks import FlowHooks
from library.training.loss.objective import NoisyLatents
from library.training.models.networks import keeps_zeros
from train_network import NetworkTrainer, run_training


class AnimaNetworkTrainer(FlowHooks, NetworkTrainer):
    """Anima: a Cosmos-Predict2 DiT with an LLM adapter, Qwen3-0.6B text states, the Qwen-Image VAE, rectified flow."""

    def build_denoiser(self) -> AnimaDenoiser:
        denoiser = build_denoiser(self.run.layouts.denoiser.config)
        denoiser.cuts_zero_rows = keeps_zeros(self.options.network.network_module)
        return denoiser

    def fp8_layers(self) -> str:
        return DENOISER_FP8_LAYERS

    def load_denoiser(self, denoiser: Any, *, device: Place, dtype: torch.dtype) -> None:
        load_denoiser(denoiser, self.run.layouts.denoiser, device=device, dtype=dtype)

    def memory_use(self, size_wh: tuple[int, int], images: int) -> MemoryUse:
        return memory_use(self.run.layouts, size_wh, images, self.live_encoders)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> QwenImageVae:
        anima = self.options.anima
        return load_vae(
            self.run.layouts.vae,
            device=device,
            dtype=dtype,
            chunk_size=anima.vae_chunk_size,
            disable_cache=anima.vae_disable_cache,
        )

    def build_text_encoder(self) -> AnimaTextEncoder:
        return build_text_encoder(self.run.layouts.text, self.run.layouts.tokenizers, fp8=self.options.memory.fp8_base)

    def text_models(self, text_encoder: AnimaTextEncoder) -> list[nn.Module]:
        return [text_encoder.model]

    def load_text_encoder(self, text_encoder: AnimaTextEncoder, *, device: torch.device, dtype: torch.dtype) -> None:
        load_text_encoder(text_encoder, self.run.layouts.text, device=device, dtype=dtype)

    def conditioning_type(self) -> type[AnimaConditioning]:
        return AnimaConditioning

    def encode_images(self, vae: QwenImageVae, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(pixels)

    def encode_text(self, text_encoder: AnimaTextEncoder, captions: Sequence[str]) -> AnimaConditioning:
        return text_encoder.encode(captions, self.device)

    def predict(self, denoiser: Any, noisy: NoisyLatents, batch: Batch) -> Tensor:
        text: Any = batch.text
        context = denoiser.encode_context(*text.adapter_inputs)  # (B, 512, C)
        return denoiser(noisy.latents, noisy.sigmas, context, used_rows=text.used_rows)

    def velocity(self) -> Predict:
        return velocity_of(self.denoiser)

    def flow_text(self, text: AnimaConditioning) -> TextContext:
        return encode_context(self.denoiser, text)

    def decode_images(self, vae: QwenImageVae, latents: Tensor) -> Tensor:
        return vae.decode(latents)

    def describe_model(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "anima",
            **self.flow_metadata(),
            "modelspec.architecture": "anima-preview/lora",
            "modelspec.implementation": "https://huggingface.co/circlestone-labs/Anima",
        }


if __name__ == "__main__":
    run_training(AnimaNetworkTrainer, RUN)
