"""The questions that an architecture answers: what differs between one trainer script and the next, and nothing else.

``train_network.NetworkTrainer`` owns order, devices, autocast, gradient mode and logging, and asks these. An answer is named
for what it gives, takes typed values and returns a named type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.dataset.conditioning import Conditioning
from library.nn.loading import Place
from library.nn.memory_use import MemoryUse
from library.sampling.picture_plan import Picture
from library.sampling.prompts import SamplePrompt
from library.training.loss.objective import NoisyLatents, Objective
from library.training.preflight import CheckedData


class ArchitectureHooks(ABC):
    """Subclassed by NetworkTrainer, answered by ``<arch>_train_network.py``."""

    run: CheckedData
    options: Any
    device: torch.device
    weight_dtype: torch.dtype
    denoiser: Any
    vae: Any

    def devices_apart(self) -> Mapping[str, str]:
        """{flag: name} of the devices that models of their own stand on. Asked first of all, so that they can be looked for."""
        return {}

    @abstractmethod
    def build_denoiser(self) -> nn.Module:
        """The denoiser without weights (on the meta device). Called once, before anything is loaded.

        It calls its transformer blocks (``blocks``) through ``run_block``, a BlockRunner of library/nn/blocks.py.
        """

    @abstractmethod
    def fp8_layers(self) -> str:
        """Which of the denoiser's Linears may be kept in 8 bits (--fp8_base): a regular expression of their whole paths."""

    @abstractmethod
    def load_denoiser(self, denoiser: Any, *, device: Place, dtype: torch.dtype) -> None:
        """Streams the checkpoint's weights into ``denoiser``, frozen. Called once the caches are filled."""

    @abstractmethod
    def memory_use(self, size_wh: tuple[int, int], images: int) -> MemoryUse:
        """What a step keeps for a batch of ``images`` of ``size_wh`` pixels, for the plan."""

    @abstractmethod
    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The image coder. Called only if latents must be encoded or samples drawn."""

    @abstractmethod
    def build_text_encoder(self) -> Any:
        """The text encoders with tokenizers, without weights (on the meta device). Called only if some text must be encoded."""

    def build_live_encoder(self) -> Any:
        """The same for what runs at every step: without encoders whose outputs come from the cache (``completed_text``)."""
        return self.build_text_encoder()

    @abstractmethod
    def text_models(self, text_encoder: Any) -> Sequence[nn.Module]:
        """The text encoders as the modules that a network may be made for, in the order of --text_encoder_lr."""

    def absent_text_encoders(self) -> Mapping[int, str]:
        """{number from 1: why} of text encoders that the model may have and this one lacks, for the plan."""
        return {}

    @abstractmethod
    def load_text_encoder(self, text_encoder: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        """Streams the weights of the text encoders in, frozen. Called once for each that was built."""

    @abstractmethod
    def conditioning_type(self) -> type[Conditioning]:
        """The class that ``encode_text`` returns."""

    def prompt_type(self) -> type[Conditioning]:
        """The class that ``encode_prompts`` returns."""
        return self.conditioning_type()

    @abstractmethod
    def encode_images(self, vae: Any, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, H/8, W/8). The caller sets gradient mode.

        What is drawn at random for an image depends on its one of the B ``seeds`` alone: neither on its batch nor on the time.
        """

    @abstractmethod
    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> Conditioning:
        """Conditioning of the captions. The caller sets gradient mode."""

    def completed_text(self, live: Any, cached: Any) -> Conditioning:
        """Where text is cached and a text encoder is trained: what the live encoders give, and the cache for all others."""
        return live

    def encode_prompts(self, text_encoder: Any, prompts: Sequence[str]) -> Conditioning:
        """The same for prompts of sample pictures. An architecture that takes them another way (``prompts_apart``) answers this
        too, and is asked for one prompt at a time where it is going to be cached."""
        return self.encode_text(text_encoder, prompts)

    @abstractmethod
    def create_objective(self) -> Objective:
        """How latents are corrupted, what the target is, and the loss."""

    @abstractmethod
    def predict(self, denoiser: Any, noisy: NoisyLatents, batch: Batch) -> Tensor:
        """Runs the denoiser once: noisy.latents (B, C, h, w), noisy.sigmas (B,) in [0, 1] -> (B, C, h, w) like noisy.target.

        ``batch`` has the text, and what else a denoiser may be told: the sizes of the images and where they were cut.
        What training alone draws at random comes from noisy.draws. Used for training and validation; the caller sets autocast and
        gradient mode.
        """

    @abstractmethod
    def plan_sample(self, prompt: SamplePrompt, seed: int) -> Picture:
        """The sample picture of a prompt with every setting decided, as it is drawn and told in the file."""

    @abstractmethod
    def draw_sample(self, picture: Picture, positive: Conditioning, negative: Conditioning | None) -> Tensor:
        """Scaled latents (1, C, h, w) of one sample picture; ``negative``: None where it does not act.

        The caller sets autocast and gradient mode.
        """

    def draw_samples(
        self, pictures: Sequence[Picture], positives: Sequence[Conditioning], negatives: Sequence[Conditioning] | None
    ) -> Tensor:
        """Scaled latents (B, C, h, w) of pictures that differ in nothing but texts and seeds."""
        others = [None] * len(pictures) if negatives is None else negatives
        return torch.cat([self.draw_sample(*parts) for parts in zip(pictures, positives, others, strict=True)])

    @abstractmethod
    def decode_images(self, vae: Any, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1]. Called outside autocast: the VAE's dtype counts."""

    def about_samples(self) -> dict[str, str]:
        """What is written into sample pictures besides the settings of their prompts, as label -> text."""
        return {}

    @abstractmethod
    def describe_model(self) -> dict[str, str]:
        """Metadata that only the architecture knows: ss_base_model_version, modelspec.architecture and the like."""
