"""Options of sd3_train_network.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from library.options.declare import opt
from library.options.flow import Sd3FlowOptions
from library.options.flow_train import FlowTrainOptions, NoClipOptions, NoDdpmOptions
from library.options.models import ModelOptions
from library.options.rules import at_least, device_name, share

FP8_DTYPE = "float8_e4m3fn"
# what --t5xxl_dtype takes -> torch's name
T5_DTYPES = {
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "fp8": FP8_DTYPE,
    FP8_DTYPE: FP8_DTYPE,
}
T5_SWITCH = "train_t5xxl"  # of --network_args
ON = ("true", "1", "yes", "on")  # as networks/arguments.py reads them, which options may not import


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3ModelOptions(ModelOptions):
    """Model: the checkpoints to train on."""

    vae: str | None = opt(None, "file of the image coder (VAE) (not set = the one inside the model's checkpoint)", path=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3Options:
    """SD3: its three text encoders, how often each of them is left out, and its table of positions."""

    CHANGES_TRAINING: ClassVar[tuple[str, ...]] = (
        "t5xxl_max_token_length", "apply_lg_attn_mask", "apply_t5_attn_mask", "clip_l_dropout_rate", "clip_g_dropout_rate",
        "t5_dropout_rate", "pos_emb_random_crop_rate", "enable_scaled_pos_embed",
    )  # fmt: skip

    clip_l: str | None = opt(None, "file of the text encoder CLIP-L (not set = the one inside the model's checkpoint)", path=True)
    clip_g: str | None = opt(None, "file of the text encoder CLIP-G (not set = the one inside the model's checkpoint)", path=True)
    t5xxl: str | None = opt(
        None, "file of the text encoder T5-XXL (not set = the one in the model's checkpoint, or none: zeros take its place)",
        path=True,
    )  # fmt: skip
    save_clip: bool = opt(False, "does nothing: training a LoRA leaves the CLIPs' files as they are")
    save_t5xxl: bool = opt(False, "does nothing: training a LoRA leaves the T5's file as it is")
    t5xxl_device: str | None = opt(
        None, "where T5-XXL runs, such as cpu or cuda:1 (not set = where the other models do); the CPU saves GPU memory"
    )
    t5xxl_dtype: str | None = opt(
        None, "number format of T5-XXL: float16, bfloat16, float32 or fp8 (not set = that of the other models)"
    )
    t5xxl_max_token_length: int = opt(256, "T5 tokens of a caption that count; the rest is cut off")
    apply_lg_attn_mask: bool = opt(False, "hide the padding of a caption from CLIP-L and CLIP-G; the model was trained without")
    apply_t5_attn_mask: bool = opt(False, "hide the padding of a caption from T5-XXL; the model was trained without")
    clip_l_dropout_rate: float = opt(0.0, "share of uses, 0 to 1, in which what CLIP-L says is replaced by zeros (0 = never)")
    clip_g_dropout_rate: float = opt(0.0, "share of uses, 0 to 1, in which what CLIP-G says is replaced by zeros (0 = never)")
    t5_dropout_rate: float = opt(0.0, "share of uses, 0 to 1, in which what T5-XXL says is replaced by zeros (0 = never)")
    pos_emb_random_crop_rate: float = opt(
        0.0, "share of uses, 0 to 1, in which an image takes a random place in the table of positions, not its centre; for SD "
        "3.5 medium (0 = never)",
    )  # fmt: skip
    enable_scaled_pos_embed: bool = opt(
        False, "make a table of positions for each resolution of the dataset instead of one for all; for SD 3.5 medium"
    )

    @property
    def t5_dtype(self) -> str | None:
        """Number format of the T5's weights, as torch names it; None = that of the other models."""
        return None if self.t5xxl_dtype is None else T5_DTYPES.get(self.t5xxl_dtype)

    @property
    def t5_fp8(self) -> bool:
        """Whether the T5's large weights are kept in 8 bits; it computes in the format of the other models then."""
        return self.t5_dtype == FP8_DTYPE

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "t5xxl_max_token_length")
        yield from share(self, "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate")
        yield from device_name(self, "t5xxl_device")
        if self.t5xxl_dtype is not None and self.t5_dtype is None:
            yield f"--t5xxl_dtype is {self.t5xxl_dtype!r}: give float16, bfloat16, float32 or fp8"

    def warnings(self) -> Iterator[str]:
        for name, models in (("save_clip", "CLIP-L and CLIP-G"), ("save_t5xxl", "T5-XXL")):
            if getattr(self, name):
                yield f"--{name} does nothing: training a LoRA leaves {models} as they are in their files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3DdpmOptions(NoDdpmOptions):
    """Stable Diffusion's noise: for models with a table of noise levels; an error here."""

    MODEL: ClassVar[str] = "SD3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3ClipOptions(NoClipOptions):
    """Stable Diffusion's text: for SD 1, 2 and XL; an error here, except for --tokenizer_cache_dir."""

    WHY: ClassVar[str] = (
        "it is about the text of SD 1, 2 and XL; SD3's CLIPs take 75 tokens of a caption without weights and give their last "
        "layer but one, its T5 takes as many as --t5xxl_max_token_length says"
    )


@dataclass(frozen=True, kw_only=True)
class Sd3TrainOptions(FlowTrainOptions):
    """All options of sd3_train_network.py, in groups."""

    NETWORK_MODULE: ClassVar[str] = "networks.lora_sd3"
    OTHER_NETWORK_MODULES: ClassVar[tuple[str, ...]] = ("networks.lora",)
    MODEL: ClassVar[str] = "SD3"
    TEXT_ENCODERS: ClassVar[int] = 3  # CLIP-L, CLIP-G, T5-XXL

    model: Sd3ModelOptions = field(default_factory=Sd3ModelOptions)
    sd3: Sd3Options = field(default_factory=Sd3Options)
    flow: Sd3FlowOptions = field(default_factory=Sd3FlowOptions)
    ddpm: Sd3DdpmOptions = field(default_factory=Sd3DdpmOptions)
    clip: Sd3ClipOptions = field(default_factory=Sd3ClipOptions)

    @property
    def wants_t5_trained(self) -> bool:
        """Whether --network_args ask for a LoRA of the T5: without, only the CLIPs get one."""
        pairs = [argument.partition("=") for argument in self.network.network_args or ()]
        return any(name.strip() == T5_SWITCH and value.strip().lower() in ON for name, _, value in pairs)

    @property
    def trains_t5(self) -> bool:
        return bool(self.text_rates[2])

    @property
    def text_encoders_to_train(self) -> tuple[bool, ...]:
        """The CLIPs run at every step where they are trained, and only the T5's outputs come from the cache then."""
        return True, True, self.wants_t5_trained and not self.caches.text_cached

    def not_trained_because(self, encoder: int) -> str:
        if encoder == self.TEXT_ENCODERS and not self.wants_t5_trained and not self.caches.text_cached:
            return f"--network_args {T5_SWITCH}=true trains it"
        return super().not_trained_because(encoder)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if "denoiser" not in self.parts or not self.trains_t5:
            return
        if self.sd3.t5xxl_device is not None:
            yield (
                f"--t5xxl_device={self.sd3.t5xxl_device} cannot be combined with --network_args {T5_SWITCH}=true: a T5 that is "
                "trained stands where the other models do; drop one of them"
            )
        if self.saving.save_format == "diffusers":
            yield (
                "--save_format=diffusers cannot hold the T5's LoRA, which diffusers does not load for SD3: drop --network_args "
                f"{T5_SWITCH}=true, or give --save_format=comfy"
            )

    def warnings(self) -> Iterator[str]:
        yield from super().warnings()
        if self.network.network_train_unet_only and self.wants_t5_trained:
            yield (
                f"--network_args {T5_SWITCH}=true does nothing with --network_train_unet_only, which leaves text encoders as "
                "they are"
            )
        if self.network.trains_text_encoder and self.wants_t5_trained and self.given_text_rates and not self.given_text_rates[2]:
            yield (
                f"--text_encoder_lr: the third rate is 0: the T5 gets no LoRA, and --network_args {T5_SWITCH}=true does nothing"
            )
        listed = self.optimizer.text_encoder_lr or []
        if len(listed) >= self.TEXT_ENCODERS and listed[2] and not self.wants_t5_trained:
            yield (
                f"--text_encoder_lr: the third rate, {listed[2]:g}, does nothing without --network_args {T5_SWITCH}=true: the T5 "
                "gets no LoRA"
            )

    def _cached_text_problems(self) -> Iterator[str]:
        rate = (self.given_text_rates or [self.optimizer.learning_rate] * self.TEXT_ENCODERS)[2]
        if self.caches.text_cached and self.network.trains_text_encoder and self.wants_t5_trained and rate:
            yield (
                f"--network_args {T5_SWITCH}=true cannot be combined with {self.caches.text_flag}: a T5 that is trained must run "
                f"at every step; drop the cache, or {T5_SWITCH}, and only the CLIPs are trained"
            )

    def _precision_problems(self) -> Iterator[str]:
        yield from super()._precision_problems()
        if self.sd3.t5_fp8 and self.run.mixed_precision == "no":
            yield (
                f"--t5xxl_dtype={self.sd3.t5xxl_dtype} needs --mixed_precision=bf16 or fp16, not no: 8-bit weights are turned "
                "into that to compute"
            )
