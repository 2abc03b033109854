"""What the inference scripts of Stable Diffusion 1.x, 2.x and SDXL share: all but the text and the names in LoRA files."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.dataset.token_use import lost_text
from library.nn.attention import use_attention
from library.nn.attention_kernels import AttentionKernel
from library.sampling.inference import PictureMaker, Tick
from library.sampling.inference_checks import CheckedPictures
from library.sampling.picture_plan import DIFFUSION_SETTINGS, Picture
from library.sampling.sd_inference_checks import SIDE_STEP_PX, as_in_training, prediction_of
from library.sd.architecture import SAMPLERS, StableDiffusionArchitecture
from library.sd.denoiser import build_unet, load_unet
from library.sd.layout import VELOCITY
from library.sd.model_kind import prediction_problem
from library.sd.sampling import TextInputs, draw_latents, passes
from library.sd.text import load_text_encoder, text_models
from library.sd.vae import StableDiffusionVae, load_vae

logger = logging.getLogger(__name__)

PROMPT_SHOWN = 24  # characters of its beginning


class Merges(Protocol):
    """LoRA files that fit the models: FileMerges of networks/merge_files.py."""

    def into(self, models: Sequence[nn.Module], device: torch.device) -> int:
        """Merges their share of ``models``; -> the modules merged."""


class StableDiffusionPictureMaker(PictureMaker):
    """A U-Net that denoises latents under CLIP text, with the samplers of diffusers."""

    SIDE_STEP_PX = SIDE_STEP_PX
    SAMPLERS = SAMPLERS
    SETTINGS = DIFFUSION_SETTINGS
    ARCHITECTURE: StableDiffusionArchitecture

    def __init__(self, run: CheckedPictures):
        super().__init__(run)
        self.prediction = prediction_of(run.layouts.marks, v_parameterization=self.options.files.v_parameterization)

    # ------------------------------------------------------------------ what a script answers

    @abstractmethod
    def build_text_encoder(self) -> Any:
        """On the meta device."""

    @abstractmethod
    def planned_merges(self, text_models: Sequence[nn.Module], unet: nn.Module) -> Merges:
        """The LoRA files, compared with the models. Raises UserError."""

    @abstractmethod
    def inputs_of(self, picture: Picture, positive: Any, negative: Any | None) -> tuple[TextInputs, TextInputs | None]:
        """What ``encode`` gave for the two texts, as the U-Net takes it."""

    # ------------------------------------------------------------------ models

    def build(self) -> None:
        self.tell_prediction()
        attention = self.options.attention
        self.unet = build_unet(self.run.layouts.denoiser.config)
        kernel = AttentionKernel(attention.mode, attention.split_attn)
        use_attention(self.unet, kernel, device=self.device, dtype=self.dtype, trains=False)
        self.text_encoder = self.build_text_encoder()
        self.merges = self.planned_merges(text_models(self.text_encoder), self.unet)

    def tell_prediction(self) -> None:
        marks, given = self.run.layouts.marks, self.options.files.v_parameterization
        if self.prediction == VELOCITY and not given:
            logger.info("the model predicts velocity (v), as %s says", marks.where)
        elif problem := prediction_problem(marks, velocity=self.prediction == VELOCITY):
            logger.warning("warning: the model %s, if its pictures look wrong", problem)

    @property
    def text_model(self) -> nn.Module:
        return self.text_encoder

    @property
    def denoiser_model(self) -> nn.Module:
        return self.unet

    def load_text_encoder(self) -> None:
        load_text_encoder(self.text_encoder, self.run.layouts.text, device=self.text_device, dtype=self.dtype)
        self.tell_loras("text encoders", self.merges.into(text_models(self.text_encoder), self.text_device))

    def load_denoiser(self) -> None:
        load_unet(self.unet, self.run.layouts.denoiser, device=self.device, dtype=self.dtype)
        self.tell_loras("U-Net", self.merges.into([self.unet], self.device))

    def load_vae(self) -> StableDiffusionVae:
        return load_vae(self.run.layouts.vae, device=self.device, dtype=self.vae_dtype, scale=self.ARCHITECTURE.latent_scale)

    # ------------------------------------------------------------------ pictures

    def encode_texts(self, texts: Sequence[Hashable]) -> None:
        written = [part for text in texts for part in (text if isinstance(text, tuple) else (text,)) if part is not None]
        for prompt, use in self.ARCHITECTURE.cut_prompts(written, as_in_training(self.options)):
            logger.warning("warning: the prompt %r %s", f"{prompt[:PROMPT_SHOWN]}...", lost_text(prompt, use))
        super().encode_texts(texts)

    def draw(self, pictures: Sequence[Picture], positive: Any, negative: Any | None, tick: Tick) -> Tensor:
        with_prompt, without = self.inputs_of(pictures[0], positive, negative)
        return draw_latents(self.unet, pictures, with_prompt, without, prediction=self.prediction, device=self.device, tick=tick)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)

    def passes(self, picture: Picture) -> int:
        return passes(picture.sampler, picture.steps)

    def name_of(self, picture: Picture) -> str:
        """The reference's: date, time, and the number of the picture in this run."""
        return f"image_{time.strftime('%Y%m%d-%H%M%S')}_{self.drawn:03d}"

    def about(self, picture: Picture) -> dict[str, str]:
        files = self.options.files
        about = {label: Path(path).name for label, path in {"Model": files.ckpt_path, "VAE": files.vae}.items() if path}
        return {**about, **self.about_loras(picture), "Precision": str(self.dtype).removeprefix("torch.")}
