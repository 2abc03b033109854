"""Draws pictures with Anima. The smallest command that works:

    python anima_minimal_inference.py --dit anima.safetensors --text_encoder qwen3_06b.safetensors \\
      --vae qwen_image_vae.safetensors --prompt "a lighthouse at dusk" --save_path pictures

With LoRA files: --lora_weight my_lora.safetensors --lora_multiplier 0.8. See docs/anima_train_network.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from types import SimpleNamespace
from typing import Any

from library.anima.architecture import ANIMA, AnimaLayouts
from library.files.safetensors_file import SafetensorsHeader
from library.options.anima_inference import SAMPLERS, AnimaInferenceOptions
from library.options.command_line import read_options
from library.sampling.inference_checks import InferenceChecks, checked_pictures, with_own_flags
from networks.anima_layouts import ANIMA_NAMES
from networks.layout_names import model_of_lora, other_adapter
from networks.lora_names import names_problem

TEXT_TOKENS = 512  # of a prompt that count, as in training by default
FLAG_NAMES = {"--pretrained_model_name_or_path": "--dit", "--qwen3": "--text_encoder"}  # training's -> this script's


def read_layouts(options: AnimaInferenceOptions) -> AnimaLayouts:
    """The checked model files. Raises CheckpointError or OptionError, with this script's names of the flags."""
    return with_own_flags(lambda: ANIMA.read_layouts(as_in_training(options), options.parts), FLAG_NAMES)


def as_in_training(options: AnimaInferenceOptions) -> SimpleNamespace:
    """What the architecture asks of a training's options, of this script's own."""
    files = options.files
    lengths = {"qwen3_max_token_length": TEXT_TOKENS, "t5_max_token_length": TEXT_TOKENS}
    return SimpleNamespace(
        model=SimpleNamespace(pretrained_model_name_or_path=files.dit, vae=files.vae),
        anima=SimpleNamespace(
            qwen3=files.text_encoder,
            llm_adapter_path=files.llm_adapter_path,
            t5_tokenizer_path=files.t5_tokenizer_path,
            **lengths,
        ),
        memory=SimpleNamespace(blocks_to_swap=options.compute.blocks_to_swap, checkpointing=None),
    )


def lora_problem(options: AnimaInferenceOptions, header: SafetensorsHeader) -> str | None:
    """By the names in the file; whether the sizes fit shows when the model is built."""
    file, keys = f"--lora_weight {header.path}", list(header.tensors)
    if options.loras.lycoris:
        other = model_of_lora(keys)
        is_ours = other in (None, ANIMA_NAMES.architecture)
        return None if is_ours else f"{file} is a file for {other}, not for Anima: give one that was made for Anima"
    if other_adapter(header.path, keys):
        return f"{file} is no plain LoRA but of a kind that the LyCORIS package reads: add --lycoris"
    return names_problem(file, keys, ANIMA_NAMES)


def latent_channels(layouts: AnimaLayouts) -> int | None:
    return layouts.vae.config.latent_channels if layouts.vae is not None and layouts.vae.config is not None else None


CHECKS = InferenceChecks(
    read_layouts=read_layouts,
    lora_problem=lora_problem,
    latent_channels=latent_channels,
    side_step=ANIMA.bucket_step,
    samplers=SAMPLERS,
)

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_pictures(lambda: read_options(AnimaInferenceOptions), CHECKS)

import logging
from collections.abc import Iterator, Sequence

from torch import nn

from library.anima.checkpoint import build_denoiser, load_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.sampling import TextContext, encode_context, velocity_of
from library.anima.text import AnimaConditioning, AnimaTextEncoder, build_text_encoder, load_text_encoder
from library.anima.vae import QwenImageVae, load_vae
from library.dataset.token_use import TokenUse
from library.nn.fp8 import check_fp8, quantise, use_fp8
from library.nn.fp8_speed import choose_fp8_products
from library.sampling.flow_inference import FlowPictureMaker
from library.sampling.flow_samplers import Predict
from library.sampling.inference import run_inference
from library.training.models.model_memory import arrange_denoiser, denoiser_place
from networks import lora_anima
from networks.merge_files import FileMerges, merges_of

logger = logging.getLogger("library.sampling")  # by name: as a script this module is __main__


class AnimaPictureMaker(FlowPictureMaker):
    """Anima: a Cosmos-Predict2 DiT with an LLM adapter, Qwen3-0.6B text states, the Qwen-Image VAE, rectified flow."""

    SIDE_STEP_PX = ANIMA.bucket_step
    PARTS = {"Model": "dit", "LLM adapter": "llm_adapter_path", "Text encoder": "text_encoder", "VAE": "vae"}

    def build_denoiser(self) -> AnimaDenoiser:
        options = self.options
        if options.compute.quantises:
            check_fp8(self.device, "--fp8" if options.compute.fp8 else "--fp8_scaled")
        denoiser = build_denoiser(self.run.layouts.denoiser.config)
        if options.compute.quantises and not options.loras.files:  # else what is merged is rounded too, afterwards
            use_fp8(denoiser, DENOISER_FP8_LAYERS)
        return denoiser

    def build_text_encoder(self) -> AnimaTextEncoder:
        return build_text_encoder(self.run.layouts.text, self.run.layouts.tokenizers)

    def text_models(self) -> list[nn.Module]:
        return [self.text_encoder.model]

    def planned_loras(self, text_models: Sequence[nn.Module], denoiser: nn.Module) -> FileMerges:
        return merges_of(self.options.loras, lora_anima, text_encoders=text_models, denoiser=denoiser)

    def load_text_weights(self) -> None:
        load_text_encoder(self.text_encoder, self.run.layouts.text, device=self.text_device, dtype=self.text_dtype)

    def cut_texts(self, texts: Sequence[str]) -> Iterator[tuple[str, TokenUse]]:
        return ANIMA.cut_prompts(texts, as_in_training(self.options))

    def encode_text(self, text: str) -> AnimaConditioning:
        return self.text_encoder.encode([text], "cpu")

    def load_denoiser_weights(self) -> None:
        place = denoiser_place(as_in_training(self.options), self.denoiser, self.device)
        load_denoiser(self.denoiser, self.run.layouts.denoiser, device=place, dtype=self.dtype)

    def load_denoiser(self) -> None:
        super().load_denoiser()
        if self.options.compute.quantises:
            if self.options.loras.files:
                use_fp8(self.denoiser, DENOISER_FP8_LAYERS)
                quantise(self.denoiser)
            logger.info("8-bit layers: %s", choose_fp8_products(self.denoiser, self.device, dtype=self.dtype))
        arrange_denoiser(as_in_training(self.options), self.denoiser, self.device)

    def velocity(self) -> Predict:
        return velocity_of(self.denoiser)

    def flow_text(self, text: AnimaConditioning, images: int) -> TextContext:
        return encode_context(self.denoiser, text).repeated(images)

    def load_vae(self) -> QwenImageVae:
        files = self.options.files
        return load_vae(
            self.run.layouts.vae,
            device=self.device,
            dtype=self.vae_dtype,
            chunk_size=files.vae_chunk_size,
            disable_cache=files.vae_disable_cache,
        )

    @property
    def precision(self) -> str:
        return super().precision + (" with 8-bit weights" if self.options.compute.quantises else "")


def main(run: Any) -> None:
    run_inference(AnimaPictureMaker, run)


if __name__ == "__main__":
    main(RUN)
