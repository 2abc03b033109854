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
from library.errors import CheckpointError, OptionError
from library.files.safetensors_file import SafetensorsHeader
from library.options.anima_inference import SAMPLERS, AnimaInferenceOptions
from library.options.command_line import read_options
from library.sampling.inference_checks import InferenceChecks, checked_pictures
from networks.anima_layouts import ANIMA_NAMES
from networks.layout_names import model_of_lora, other_adapter
from networks.lora_names import names_problem

TEXT_TOKENS = 512  # of a prompt that count, as in training by default
FLAG_NAMES = {"--pretrained_model_name_or_path": "--dit", "--qwen3": "--text_encoder"}  # training's -> this script's


def read_layouts(options: AnimaInferenceOptions) -> AnimaLayouts:
    """The checked model files. Raises CheckpointError or OptionError, with this script's names of the flags."""
    files = options.files
    lengths = {"qwen3_max_token_length": TEXT_TOKENS, "t5_max_token_length": TEXT_TOKENS}
    as_in_training = SimpleNamespace(
        model=SimpleNamespace(pretrained_model_name_or_path=files.dit, vae=files.vae),
        anima=SimpleNamespace(
            qwen3=files.text_encoder,
            llm_adapter_path=files.llm_adapter_path,
            t5_tokenizer_path=files.t5_tokenizer_path,
            **lengths,
        ),
        memory=SimpleNamespace(blocks_to_swap=options.compute.blocks_to_swap),
    )
    try:
        return ANIMA.read_layouts(as_in_training, options.parts)
    except (CheckpointError, OptionError) as error:
        raise type(error)(*map(own_flag_names, error.problems)) from error


def own_flag_names(text: str) -> str:
    for training, own in FLAG_NAMES.items():
        text = text.replace(training, own)
    return text


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
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from library.anima.checkpoint import build_denoiser, load_denoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.sampling import TextContext, encode_context, velocity_of
from library.anima.text import AnimaConditioning, build_text_encoder, load_text_encoder
from library.anima.vae import QwenImageVae, load_vae
from library.nn.attention import use_attention
from library.nn.attention_kernels import AttentionKernel
from library.nn.fp8 import check_fp8, quantise, use_fp8
from library.nn.fp8_speed import choose_fp8_products
from library.nn.initial_noise import initial_noises
from library.sampling.flow_samplers import FlowSettings, draw_flow
from library.sampling.inference import PictureMaker, Tick, run_inference
from library.sampling.picture_plan import Picture
from library.training.models.model_memory import arrange_denoiser, denoiser_place
from networks import lora_anima
from networks.merge_files import merges_of

logger = logging.getLogger("library.sampling")  # by name: as a script this module is __main__


class AnimaPictureMaker(PictureMaker):
    """Anima: a Cosmos-Predict2 DiT with an LLM adapter, Qwen3-0.6B text states, the Qwen-Image VAE, rectified flow."""

    SIDE_STEP_PX = ANIMA.bucket_step
    SAMPLERS = SAMPLERS

    def build(self) -> None:
        options, layouts = self.options, self.run.layouts
        self.denoiser = build_denoiser(layouts.denoiser.config)
        attention = options.attention
        kernel = AttentionKernel(attention.mode, attention.split_attn)
        use_attention(self.denoiser, kernel, device=self.device, dtype=self.dtype, trains=False)
        if options.compute.quantises:
            check_fp8(self.device, "--fp8" if options.compute.fp8 else "--fp8_scaled")
            if not options.loras.files:  # else what is merged is rounded too, afterwards
                use_fp8(self.denoiser, DENOISER_FP8_LAYERS)
        self.text_encoder = build_text_encoder(layouts.text, layouts.tokenizers)
        self.merges = merges_of(options.loras, lora_anima, text_encoders=[self.text_encoder.model], denoiser=self.denoiser)

    @property
    def text_model(self) -> nn.Module:
        return self.text_encoder.model

    @property
    def denoiser_model(self) -> nn.Module:
        return self.denoiser

    def load_text_encoder(self) -> None:
        load_text_encoder(self.text_encoder, self.run.layouts.text, device=self.text_device, dtype=self.dtype)
        merged = self.merges.into([self.text_encoder.model], self.text_device)
        self.tell_merged("text encoder", merged)

    def encode(self, text: str) -> AnimaConditioning:
        for name, length in zip(("Qwen3", "T5"), self.text_encoder.tokenizers.lengths(text), strict=True):
            if length.cut_at is not None:
                logger.warning("warning: the prompt has %d %s tokens; what follows %r is cut off", length.tokens, name,
                               text[max(0, length.cut_at - 20) : length.cut_at])  # fmt: skip
        return self.text_encoder.encode([text], "cpu")

    def load_denoiser(self) -> None:
        as_in_training = SimpleNamespace(
            memory=SimpleNamespace(checkpointing=None, blocks_to_swap=self.options.compute.blocks_to_swap)
        )
        place = denoiser_place(as_in_training, self.denoiser, self.device)
        load_denoiser(self.denoiser, self.run.layouts.denoiser, device=place, dtype=self.dtype)
        self.tell_merged("denoiser", self.merges.into([self.denoiser], self.device))
        if self.options.compute.quantises:
            if self.options.loras.files:
                use_fp8(self.denoiser, DENOISER_FP8_LAYERS)
                quantise(self.denoiser)
            logger.info("8-bit layers: %s", choose_fp8_products(self.denoiser, self.device, dtype=self.dtype))
        arrange_denoiser(as_in_training, self.denoiser, self.device)

    def draw(
        self, pictures: Sequence[Picture], positive: AnimaConditioning, negative: AnimaConditioning | None, tick: Tick
    ) -> Tensor:
        first, seeds = pictures[0], [picture.seed for picture in pictures]
        texts = [encode_context(self.denoiser, text).repeated(len(pictures)) for text in (positive, negative) if text is not None]
        config, velocity = self.run.layouts.denoiser.config, velocity_of(self.denoiser)

        def predict(latents: Tensor, sigmas: Tensor, text: TextContext) -> Tensor:
            if text is texts[0]:
                tick()
            return velocity(latents, sigmas, text)

        return draw_flow(
            predict,
            initial_noises(seeds, (first.width, first.height), config.in_channels).to(self.device),
            positive=texts[0],
            negative=texts[1] if negative is not None else None,
            settings=FlowSettings(steps=first.steps, shift=first.flow_shift, scale=first.scale, sampler=first.sampler),
            seeds=seeds,
        )

    def load_vae(self) -> QwenImageVae:
        files = self.options.files
        return load_vae(
            self.run.layouts.vae,
            device=self.device,
            dtype=self.vae_dtype,
            chunk_size=files.vae_chunk_size,
            disable_cache=files.vae_disable_cache,
        )

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)

    def about(self) -> dict[str, str]:
        files, compute = self.options.files, self.options.compute
        named = {"Model": files.dit, "LLM adapter": files.llm_adapter_path, "Text encoder": files.text_encoder, "VAE": files.vae}
        precision = str(self.dtype).removeprefix("torch.") + (" with 8-bit weights" if compute.quantises else "")
        about = {label: Path(path).name for label, path in named.items() if path}
        loras = [f"{Path(file).name} ({strength:g})" for file, strength in self.options.loras.files]
        patterns = {
            "LoRA modules": self.options.loras.include_patterns,
            "LoRA modules left out": self.options.loras.exclude_patterns,
        }
        about |= {"LoRA": "; ".join(loras)} if loras else {}
        about |= {label: "; ".join(regexes) for label, regexes in patterns.items() if regexes}
        return {**about, "Precision": precision}


def main(run: Any) -> None:
    run_inference(AnimaPictureMaker, run)


if __name__ == "__main__":
    main(RUN)
