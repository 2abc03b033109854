"""The option groups that every training script has, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from library.options.attention import AttentionOptions
from library.options.caches import CacheOptions
from library.options.captions import CaptionOptions
from library.options.compile import CompileOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.ddpm import ClipOptions, DdpmOptions
from library.options.distributed import DistributedOptions
from library.options.hub import HubOptions
from library.options.look import LookOptions
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions
from library.options.metadata import MetadataOptions
from library.options.models import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.resume import ResumeOptions
from library.options.run import RunOptions
from library.options.samples import SampleOptions
from library.options.saving import SavingOptions
from library.options.schedule import ScheduleOptions
from library.options.trackers import LoggingOptions
from library.options.validation import ValidationOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Base of every architecture's options: subclass it, add groups, and set the class variable."""

    NETWORK_MODULE: ClassVar[str] = "networks.lora"  # named when --network_module is missing
    OTHER_NETWORK_MODULES: ClassVar[tuple[str, ...]] = ()  # of ours, that are as good
    MODEL: ClassVar[str] = "this model"  # as messages call it
    TEXT_ENCODERS: ClassVar[int] = 1

    model: ModelOptions = field(default_factory=ModelOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    look: LookOptions = field(default_factory=LookOptions)
    caches: CacheOptions = field(default_factory=CacheOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    run: RunOptions = field(default_factory=RunOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    ddpm: DdpmOptions = field(default_factory=DdpmOptions)
    clip: ClipOptions = field(default_factory=ClipOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)
    resume: ResumeOptions = field(default_factory=ResumeOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that the command cannot do without: whoever only looks needs none, a caching tool one."""
        return () if self.look.only else ("denoiser", "text", "vae")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether a text encoder gets a LoRA that is trained."""
        return any(self.text_rates)

    @property
    def given_text_rates(self) -> list[float] | None:
        """What flags say of the text encoders' learning rates, in the order of the encoders; None = nothing."""
        return self.listed_text_rates or None

    @property
    def listed_text_rates(self) -> list[float]:
        """--text_encoder_lr, one for each encoder: its last rate is for all that follow. Empty if it is not given."""
        listed = (self.optimizer.text_encoder_lr or [])[: self.TEXT_ENCODERS]
        return [*listed, *(listed[-1:] * (self.TEXT_ENCODERS - len(listed)))]

    @property
    def text_rates(self) -> tuple[float, ...]:
        """The learning rate of each text encoder's LoRA. 0 = it gets none: switched off, cached, or that is its rate."""
        if not self.network.trains_text_encoder:
            return (0.0,) * self.TEXT_ENCODERS
        rates = self.given_text_rates or [self.optimizer.learning_rate] * self.TEXT_ENCODERS
        return tuple(rate if trained else 0.0 for rate, trained in zip(rates, self.text_encoders_to_train, strict=True))

    @property
    def text_encoders_to_train(self) -> tuple[bool, ...]:
        """Whether each text encoder gets a LoRA where text encoders are trained: not where its outputs are cached."""
        return (not self.caches.text_cached,) * self.TEXT_ENCODERS

    def not_trained_because(self, encoder: int) -> str:
        """Why text encoder number ``encoder``, from 1, gets no LoRA though text encoders are trained, or might be."""
        return "its learning rate is 0" if self.text_encoders_to_train[encoder - 1] else "its outputs are cached"

    @property
    def trains_denoiser(self) -> bool:
        """Whether the denoiser gets a LoRA that is trained: unless it is switched off, or no part of it has a rate above 0."""
        return self.network.trains_denoiser and (self.denoiser_rate != 0 or self.has_own_rates)

    @property
    def denoiser_rate(self) -> float:
        """The learning rate of the denoiser's modules that have none of their own."""
        own = self.optimizer.unet_lr
        return self.optimizer.learning_rate if own is None else own

    @property
    def has_own_rates(self) -> bool:
        """Whether modules of the denoiser may be trained at other rates than ``denoiser_rate``."""
        return any(argument.strip().startswith("network_reg_lrs") for argument in self.network.network_args or ())

    @property
    def pictures_at_once(self) -> int:
        """How many sample pictures of one size and setting are drawn together."""
        return 1

    @property
    def objective(self) -> str:
        """What the model is trained to predict, for the plan."""
        return self.ddpm.objective

    @property
    def fetches_models(self) -> bool:
        """Whether a model comes from the Hugging Face hub."""
        return False

    @property
    def asks_hub(self) -> bool:
        """Whether the hub may be asked for something that the model needs."""
        return self.fetches_models

    @property
    def needs_dataset(self) -> bool:
        """Whoever only draws noise levels needs none."""
        return not self.look.show_timesteps or self.look.shows_dataset

    def problems(self) -> Iterator[str]:
        """Problems between groups and flags that a run cannot do without; each group tells its own."""
        if self.needs_dataset:
            yield from self.dataset.missing()
        if "denoiser" not in self.parts:
            return
        if not self.saving.output_dir:
            yield "--output_dir is missing: name the folder for the trained files"
        if not self.model.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path is missing: name the model's checkpoint file"
        if not self.network.network_module:
            yield f"--network_module is missing: for this model give --network_module={self.NETWORK_MODULE}"
        elif self.saving.save_format and self.network.network_module not in (ours := self._our_network_modules):
            yield (
                f"--save_format={self.saving.save_format} needs --network_module={' or '.join(ours)}: "
                f"{self.network.network_module} names what is in its files itself; drop --save_format"
            )
        yield from self._rate_problems()
        yield from self._text_encoder_problems()
        yield from self._precision_problems()
        yield from self._fused_problems()
        if self.attention.mode == "sageattn":
            cure = "give --attn_mode=torch" if self.attention.attn_mode else f"drop {self.attention.flag}"
            yield (
                f"{self.attention.flag} cannot train: the kernel has no backward pass; {cure}, and keep sageattn for drawing "
                "images"
            )
        yield from self.hub.resume_problems(self.resume.resume)

    @property
    def _our_network_modules(self) -> tuple[str, ...]:
        return self.NETWORK_MODULE, *self.OTHER_NETWORK_MODULES

    def warnings(self) -> Iterator[str]:
        """What is allowed but probably not meant, between groups."""
        saves_states = self.saving.save_state or self.saving.save_state_on_train_end
        if self.hub.save_state_to_huggingface and not saves_states:
            yield "--save_state_to_huggingface does nothing without --save_state or --save_state_on_train_end"
        if self.network.network_train_text_encoder_only and self.optimizer.unet_lr is not None:
            yield "--unet_lr does nothing with --network_train_text_encoder_only, which leaves the denoiser as it is"
        yield from self.hub.token_warnings(fetches_models=self.asks_hub)
        yield from self._text_rate_warnings()

    def _text_rate_warnings(self) -> Iterator[str]:
        listed = self.optimizer.text_encoder_lr or []
        if self.network.network_train_unet_only:
            for flag in self._wanted_text_rates():
                yield f"{flag.split()[0]} does nothing with --network_train_unet_only, which leaves text encoders as they are"
        if len(listed) > self.TEXT_ENCODERS:
            count = self.TEXT_ENCODERS
            has, counts = (
                ("one text encoder", "rate counts") if count == 1 else (f"{count} text encoders", f"{count} rates count")
            )
            yield f"--text_encoder_lr: {self.MODEL} has {has}: only the first {counts}, {_spaced(listed[:count])}"

    def _cached_text_warnings(self, *, denoiser: str) -> Iterator[str]:
        """Where a cache, and nothing else, keeps text encoders from being trained."""
        switched_off = self.given_text_rates is not None and not any(self.given_text_rates)
        if self.caches.text_cached and self.network.trains_text_encoder and not switched_off:
            yield (
                "--cache_text_encoder_outputs without --network_train_unet_only: a text encoder whose outputs are cached is not "
                f"trained, only the {denoiser} is; add --network_train_unet_only if that is meant, else drop the cache"
            )

    def _wanted_text_rates(self) -> Iterator[str]:
        """The flags, with their values, that ask for a trained text encoder by a rate."""
        counted = (self.optimizer.text_encoder_lr or [])[: self.TEXT_ENCODERS]
        if any(counted):
            yield f"--text_encoder_lr {_spaced(counted)}"

    def _text_encoder_problems(self) -> Iterator[str]:
        of_cache = list(self._cached_text_problems())
        yield from of_cache
        only = self.network.network_train_text_encoder_only and self.network.trains_text_encoder
        if only and not self.trains_text_encoder and not of_cache:
            rates = f"--text_encoder_lr {_spaced(self.given_text_rates)}" if self.given_text_rates else "--learning_rate 0"
            yield f"--network_train_text_encoder_only with {rates} leaves nothing to train: raise the rate"

    def _cached_text_problems(self) -> Iterator[str]:
        """Of text encoders that are to be trained while their outputs come from a cache."""
        only = self.network.network_train_text_encoder_only
        wanted = [*self._wanted_text_rates(), *(["--network_train_text_encoder_only"] if only else [])]
        if self.caches.text_cached and self.network.trains_text_encoder and wanted:
            yield (
                f"{' and '.join(wanted)} cannot be combined with {self.caches.text_flag}: a text encoder that is trained must "
                "run at every step; drop the cache, or train the denoiser alone with --network_train_unet_only"
            )

    def _rate_problems(self) -> Iterator[str]:
        if self.network.trains_denoiser and not self.trains_denoiser and not self.trains_text_encoder:
            flag = "learning_rate" if self.optimizer.unet_lr is None else "unet_lr"
            yield (
                f"--{flag} is 0, so that the denoiser is not trained, and no text encoder is: nothing would be trained; raise "
                f"--{flag}, or train a text encoder"
            )

    def _precision_problems(self) -> Iterator[str]:
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(self.memory, name) and self.run.mixed_precision == "no":
                yield f"--{name} needs --mixed_precision=bf16 or fp16, not no: 8-bit weights are turned into that to compute"

    def _fused_problems(self) -> Iterator[str]:
        """Of --fused_backward_pass, which changes a weight before the gradients of the others are there."""
        if not self.memory.fused_backward_pass:
            return
        if self.optimizer.max_grad_norm:
            yield (
                f"--fused_backward_pass needs --max_grad_norm=0, not {self.optimizer.max_grad_norm}: gradients are gone before "
                "the norm of all of them is known"
            )
        if self.run.gradient_accumulation_steps > 1:
            yield (
                "--fused_backward_pass needs --gradient_accumulation_steps=1, not "
                f"{self.run.gradient_accumulation_steps}: each gradient is used at once and not kept for the next batch"
            )
        if self.run.mixed_precision == "fp16":
            yield (
                "--fused_backward_pass cannot be combined with --mixed_precision=fp16, whose loss scaling must see all gradients "
                "before a weight changes: give --mixed_precision=bf16"
            )


def _spaced(rates: Sequence[float]) -> str:
    """As on a command line."""
    return " ".join(f"{rate:g}" for rate in rates)
