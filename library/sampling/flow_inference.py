"""What the inference scripts of rectified-flow models share: Anima, Stable Diffusion 3, Lumina Image 2.0."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from library.dataset.token_use import TokenUse, lost_text
from library.nn.attention import use_attention
from library.nn.attention_kernels import AttentionKernel
from library.options.anima_inference import SAMPLERS
from library.sampling.flow_pictures import draw_pictures
from library.sampling.flow_samplers import Predict
from library.sampling.inference import PictureMaker, Tick
from library.sampling.picture_plan import Picture

logger = logging.getLogger(__name__)

PROMPT_SHOWN = 24  # characters of its beginning


class FlowText(NamedTuple):
    """A text to encode. What LoRA files make of it depends on their strengths."""

    text: str  # with all that stands before the prompt
    strengths: tuple[float, ...]


class Loras(Protocol):
    """LoRA files that fit the models: FileMerges of networks/merge_files.py."""

    def into(self, models: Sequence[nn.Module], device: torch.device) -> int:
        """Merges their share of ``models``; -> the modules merged."""

    def beside(self, models: Sequence[nn.Module], device: torch.device) -> int:
        """Puts their share of ``models`` beside the weights; -> the modules."""

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Of what is beside the weights, one for each file."""


class FlowPictureMaker(PictureMaker):
    """A DiT that predicts velocities, drawn by the samplers of library/sampling/flow_samplers.py."""

    SAMPLERS = SAMPLERS
    SCHEDULE: ClassVar[str] = "even"  # of the noise levels
    PARTS: ClassVar[dict[str, str]] = {}  # of the model, as label -> name of the option in the group ``files``

    # ------------------------------------------------------------------ what a script answers

    @abstractmethod
    def build_denoiser(self) -> nn.Module:
        """On the meta device."""

    @abstractmethod
    def build_text_encoder(self) -> Any:
        """On the meta device."""

    @abstractmethod
    def text_models(self) -> list[nn.Module]:
        """Those of the text encoder that LoRA files may change, in the order of --text_encoder_lr."""

    @abstractmethod
    def planned_loras(self, text_models: Sequence[nn.Module], denoiser: nn.Module) -> Loras:
        """The LoRA files, compared with the models. Raises UserError."""

    @abstractmethod
    def load_text_weights(self) -> None:
        """To ``text_device``."""

    @abstractmethod
    def load_denoiser_weights(self) -> None:
        """To ``device``, or where they wait."""

    @abstractmethod
    def cut_texts(self, texts: Sequence[str]) -> Iterator[tuple[str, TokenUse]]:
        """Those that are too long for the text encoder; the same as the architecture's ``cut_prompts``."""

    @abstractmethod
    def encode_text(self, text: str) -> Any:
        """The conditioning of one text, on the CPU."""

    @abstractmethod
    def velocity(self) -> Predict:
        """The denoiser as samplers call it, with what ``flow_text`` gives."""

    @abstractmethod
    def flow_text(self, text: Any, images: int) -> Any:
        """The conditioning of one text, for each of ``images``; computed once for a picture, not in each of its steps."""

    # ------------------------------------------------------------------ models

    def build(self) -> None:
        attention = self.options.attention
        self.denoiser: Any = self.build_denoiser()
        kernel = AttentionKernel(attention.mode, attention.split_attn)
        use_attention(self.denoiser, kernel, device=self.device, dtype=self.dtype, trains=False)
        self.text_encoder = self.build_text_encoder()
        self.loras = self.planned_loras(self.text_models(), self.denoiser)

    @property
    def text_model(self) -> nn.Module:
        model: nn.Module = self.text_encoder
        return model

    @property
    def denoiser_model(self) -> nn.Module:
        return self.denoiser

    def load_text_encoder(self) -> None:
        self.load_text_weights()
        self.add_loras("text encoder", self.text_models(), self.text_device)

    def load_denoiser(self) -> None:
        self.load_denoiser_weights()
        self.add_loras("denoiser", [self.denoiser], self.device)

    def add_loras(self, name: str, models: Sequence[nn.Module], device: torch.device) -> None:
        """Into the weights of ``models``, which are loaded, or beside them."""
        add = self.loras.into if self.options.loras.merged else self.loras.beside
        self.tell_loras(name, add(models, device))

    def set_strengths(self, strengths: Sequence[float]) -> None:
        if not self.options.loras.merged:
            self.loras.set_strengths(strengths)

    # ------------------------------------------------------------------ texts

    def texts_of(self, picture: Picture) -> Sequence[FlowText]:
        texts = [self.positive_text(picture), *([self.negative_text(picture)] if picture.is_guided else [])]
        return [FlowText(text, self.strengths_of(picture)) for text in texts]

    def positive_text(self, picture: Picture) -> str:
        """What the text encoder gets."""
        return picture.prompt

    def negative_text(self, picture: Picture) -> str:
        return picture.negative_prompt

    def encode_texts(self, texts: Sequence[Hashable]) -> None:
        for text, use in self.cut_texts([text.text for text in texts if isinstance(text, FlowText)]):
            logger.warning("warning: the prompt %r %s", f"{text[:PROMPT_SHOWN]}...", lost_text(text, use))
        super().encode_texts(texts)

    def encode(self, text: FlowText) -> Any:
        self.set_strengths(text.strengths)
        return self.encode_text(text.text)

    # ------------------------------------------------------------------ pictures

    def draw(self, pictures: Sequence[Picture], positive: Any, negative: Any | None, tick: Tick) -> Tensor:
        self.set_strengths(self.strengths_of(pictures[0]))
        with_prompt = self.flow_text(positive, len(pictures))
        velocity = self.velocity()

        def predict(latents: Tensor, sigmas: Tensor, text: Any) -> Tensor:
            if text is with_prompt:
                tick()
            return velocity(latents, sigmas, text)

        return draw_pictures(
            predict,
            pictures,
            with_prompt,
            None if negative is None else self.flow_text(negative, len(pictures)),
            channels=self.run.layouts.denoiser.config.in_channels,
            schedule=self.SCHEDULE,
            device=self.device,
        )

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents)
        return pixels

    def about(self, picture: Picture) -> dict[str, str]:
        named = {label: getattr(self.options.files, name) for label, name in self.PARTS.items()}
        models = {label: Path(path).name for label, path in named.items() if path}
        return {**models, **self.about_loras(picture), "Precision": self.precision}

    @property
    def precision(self) -> str:
        """The number format of the denoiser, in words."""
        return str(self.dtype).removeprefix("torch.")
