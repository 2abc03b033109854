"""The frozen models and the network of a run: made without weights, checked, told in the plan, and loaded.

``NetworkTrainer`` goes on from here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from library.dataset.batch import Batch
from library.dataset.conditioning import Conditioning
from library.errors import OptionError
from library.nn.attention import use_attention
from library.nn.attention_kernels import AttentionKernel
from library.nn.compiling import check_backend, compile_blocks
from library.nn.memory_use import LiveEncoders
from library.randomness import derive_seed, seed_default_generators
from library.training.caching import CacheFilling
from library.training.files.room import check_room
from library.training.files.saving import check_save_format, save_dtype
from library.training.models import networks
from library.training.models.base_weights import text_base_weights
from library.training.models.fp8_models import arrange_fp8, prepare_fp8, wait_for_merging
from library.training.models.memory_estimate import estimate_lines, estimate_memory, largest_batch, saved_state_bytes
from library.training.models.model_memory import arrange_denoiser, arrange_text_encoders, denoiser_place
from library.training.models.strength import strength_problems
from library.training.models.trained_parts import check_denoiser_is_there, trained_line
from library.training.plan import NetworkSize, memory_warnings, plan_lines
from library.training.preflight import CheckedRun, cached_prompt

logger = logging.getLogger("train_network")  # whatever the run has to say comes from there


class ModelPreparation(CacheFilling):
    """Creates the network, then loads what it is trained on."""

    run: CheckedRun
    network: Any
    objective: Any
    vae: Any = None  # stays None while latents are cached and no samples are drawn
    text_encoder: Any = None  # stays None where its outputs are cached
    trained_encoders: Sequence[nn.Module] = ()  # those that the network is made for

    def create_network(self) -> None:
        """Creates the network for a denoiser without weights, so that its mistakes show before anything is loaded."""
        self.denoiser: Any = self.build_denoiser()
        self.choose_kernels()
        prepare_fp8(self.options, self.denoiser, self.fp8_layers(), device=self.device)
        encoders: list[nn.Module | None] = []
        if self.options.trains_text_encoder:
            self.text_encoder = self.build_live_encoder()
            models, rates = list(self.text_models(self.text_encoder)), self.options.text_rates
            encoders = networks.with_gaps(self.options.network.network_module, models, rates)
            self.trained_encoders = [encoder for encoder in encoders if encoder is not None]
        self.check_base_weights()
        seed_default_generators(derive_seed(self.seed, "network"), self.device)
        self.network = networks.create_network(
            self.options.network,
            self.denoiser,
            encoders,
            rates=getattr(self.options, "rates", None),
            others_are_trained=self.options.denoiser_rate != 0,
        )
        if self.options.network.scale_weight_norms and not hasattr(self.network, "apply_max_norm_regularization"):
            raise OptionError(f"--scale_weight_norms: {self.options.network.network_module} cannot do that; drop the flag")
        if problems := list(strength_problems(self.network, self.options.network.network_module, self.run.training_set)):
            raise OptionError(*problems)
        networks.prepare_network(self.network, self.options)
        trains_text, trains_denoiser = bool(self.trained_encoders), self.options.trains_denoiser
        self.network.apply_to(self.trained_encoders, self.denoiser, trains_text, trains_denoiser)
        check_denoiser_is_there(self.network, self.options)
        check_save_format(self.network, self.options.saving.save_format)
        if self.options.network.network_weights:
            self.say(networks.load_network_weights(self.network, self.options.network.network_weights))

    def check_base_weights(self) -> None:
        encoders = self.text_models(self.text_encoder) if self.trained_encoders else []
        all_are_here = encoders and self.run.text_cache is None
        if not all_are_here and text_base_weights(self.options.network):  # into what is cached they are merged, too
            encoders = self.text_models(self.build_text_encoder())
        networks.check_base_weights(self.options.network, self.denoiser, encoders)

    def choose_kernels(self) -> None:
        """Tries what depends on this machine's packages and device, before anything is loaded."""
        attention, compiling = self.options.attention, self.options.compile
        kernel = AttentionKernel(attention.mode, attention.split_attn)
        use_attention(self.denoiser, kernel, device=self.device, dtype=self.weight_dtype, trains=True)
        if compiling.compiles:
            check_backend(compiling.dynamo_backend, self.device)

    def print_plan(self, groups: tuple[list[dict[str, Any]], list[str]]) -> None:
        """``groups``: networks.optimizer_groups()."""
        parameters = sum(p.numel() for p in self.network.parameters())
        dtype = save_dtype(self.options.saving.save_precision) or self.trained_dtype
        modules = len(getattr(self.network, "unet_loras", [])) + len(getattr(self.network, "text_encoder_loras", []))
        in_file = values_in_file(self.network) or parameters
        trained = trained_line(self.network, groups, self.options, self.absent_text_encoders())
        size = NetworkSize(modules, parameters, in_file * dtype.itemsize, trained)
        self.say(*plan_lines(self.run, size), *self.memory_lines(parameters))
        for warning in (*self.run.warnings, *memory_warnings(self.run), *self.room_warnings(size)):
            logger.warning("warning: %s", warning)

    def room_warnings(self, size: NetworkSize) -> Iterator[str]:
        """Of the disk that is written to; an error where it has no room at all."""
        if self.accelerator.is_main_process:
            state = saved_state_bytes(size.parameters, self.trained_dtype, self.options.optimizer)
            yield from check_room(self.run, lora_bytes=size.file_bytes, state_bytes=state)

    def memory_lines(self, parameters: int) -> Iterator[str]:
        size_wh, images = largest_batch(self.run.training_set)
        use, dtypes = self.memory_use(size_wh, images), (self.weight_dtype, self.trained_dtype)
        estimate = estimate_memory(
            self.options, self.denoiser, parameters=parameters, dtypes=dtypes, use=use, batch=(size_wh, images)
        )
        on_gpu = self.device.type == "cuda"
        return estimate_lines(estimate, torch.cuda.mem_get_info(self.device)[1] if on_gpu else None, self.options)

    @property
    def live_encoders(self) -> LiveEncoders:
        return LiveEncoders(
            text=self.run.text_cache is None or self.options.trains_text_encoder,
            vae=self.run.latent_cache is None,
            text_in_fp8=self.options.memory.fp8_base,
            text_is_trained=self.options.trains_text_encoder,
        )

    @property
    def trained_dtype(self) -> torch.dtype:
        """LoRA weights stay float32 unless --full_bf16 or --full_fp16 is given."""
        run = self.options.run
        return self.weight_dtype if run.full_bf16 or run.full_fp16 else torch.float32

    def load_models(self) -> None:
        """Loads the denoiser and what must encode at every step, and merges --base_weights into them."""
        if self.run.text_cache is None:
            self.text_encoder = self.text_encoder or self.build_live_encoder()
        encoders = self.text_models(self.text_encoder) if self.text_encoder is not None else []
        wait_for_merging(self.options, self.denoiser, *encoders)
        place = denoiser_place(self.options, self.denoiser, self.device)
        self.load_denoiser(self.denoiser, device=place, dtype=self.weight_dtype)
        if self.text_encoder is not None:
            self.load_text_encoder(self.text_encoder, device=self.device, dtype=self.weight_dtype)
        networks.merge_base_weights(self.options.network, self.denoiser, encoders, self.weight_dtype)
        self.say(*arrange_fp8(self.options, self.denoiser, self.device, dtype=self.weight_dtype, gather=self.group.gather))
        if self.options.memory.checkpointing is not None:
            self.network.enable_gradient_checkpointing()
        self.network.to(device=self.device, dtype=self.trained_dtype)
        arrange_denoiser(self.options, self.denoiser, self.device)
        if self.options.compile.compiles:
            compile_blocks(self.denoiser, self.options.compile.dynamo_backend)
        arrange_text_encoders(self.options, self.trained_encoders)
        self.network.prepare_grad_etc(self.trained_encoders, self.denoiser)
        self.network.train()
        if self.run.latent_cache is None:
            self.vae = self.load_vae(device=self.device, dtype=self.vae_dtype)
        self.objective = self.create_objective()

    def text_of(self, batch: Batch) -> Conditioning:
        """The batch's text: as the encoders make it now, from the cache, or of both, where only some encoders are cached."""
        cached = None if self.run.text_cache is None else batch.text
        if cached is not None and not self.trained_encoders:
            return cached
        live = self.encoded_text(batch.captions)
        return live if cached is None else self.completed_text(live, cached)

    def encoded_text(self, captions: Sequence[str], *, as_prompts: bool = False) -> Conditioning:
        """With gradients for a network on the text encoder, where there is one, and in autocast: a network of somebody else's may
        be float32 throughout."""
        trained = bool(self.trained_encoders)
        precision = self.accelerator.autocast() if trained else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained), precision:
            encode = self.encode_prompts if as_prompts else self.encode_text
            return encode(self.text_encoder, captions)

    def prompt_conditioning(self, text: str) -> Conditioning:
        """Of a text for sample pictures, on the device."""
        cache = self.run.text_cache
        cached = None if cache is None else cache.load_text(cached_prompt(text, self.run.architecture), kind=self.prompt_type())
        if cached is not None and not self.trained_encoders:
            return cached.to(self.device)
        live = self.encoded_text([text], as_prompts=True).to(self.device)
        return live if cached is None else self.completed_text(live, cached.to(self.device))

    @contextmanager
    def vae_on_device(self) -> Iterator[None]:
        """The VAE, loaded when the first samples are drawn; between samples it waits in CPU memory."""
        if self.vae is None:
            self.vae = self.load_vae(device=self.device, dtype=self.vae_dtype)
        self.vae.to(self.device)
        try:
            yield
        finally:
            if self.run.latent_cache is not None:
                self.vae.to("cpu")

    def say(self, *lines: str) -> None:
        """Lines for people, shown by the main process above the progress bar."""
        for line in lines:
            logger.info("%s", line)


def values_in_file(network: Any) -> int:
    """Of a network of this project, whose files may hold more than is trained; 0 for others."""
    return sum(tensor.numel() for tensor in network.file_tensors().values()) if hasattr(network, "file_tensors") else 0
