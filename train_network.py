"""NetworkTrainer: the training algorithm that every architecture shares; and Stable Diffusion 1.x and 2.x, which it trains as a
script. The smallest command that works:

    accelerate launch --num_cpu_threads_per_process 1 train_network.py \\
      --pretrained_model_name_or_path sd15.safetensors --train_data_dir pictures --caption_extension .txt --resolution 512 \\
      --output_dir out --output_name my_lora --network_module networks.lora --learning_rate 1e-4

Read ``NetworkTrainer.train()`` first, then ``update()`` and ``compute_loss()``. An architecture subclasses it and answers
library/training/hooks.py, as ``StableDiffusionTrainer`` does at the end; see docs/architecture.md and docs/train_network.md.
"""

from __future__ import annotations

from library.errors import ctrl_c_ends_quietly

if __name__ == "__main__":  # first of all: the imports take a while
    ctrl_c_ends_quietly()

from library.options.command_line import read_options
from library.options.sd import StableDiffusionTrainOptions
from library.sd.architecture import STABLE_DIFFUSION
from library.training.preflight import CheckedRun, checked_run, worker_count

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    RUN = checked_run(lambda: read_options(StableDiffusionTrainOptions), STABLE_DIFFUSION)

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.dataset.clock import Clock
from library.dataset.conditioning import Conditioning
from library.dataset.loader import BatchSource, ValidationBatches
from library.errors import CheckpointError, DatasetError, TrainingError, user_errors_end_the_script
from library.nn.compiling import COMPILING, CompilerError, compile_errors_are_told
from library.nn.loading import Place
from library.nn.memory_use import MemoryUse
from library.randomness import derive_seed, seed_default_generators
from library.sampling.picture_plan import Picture, SampleDefaults, sample_picture
from library.sampling.prompts import SamplePrompt
from library.sd.denoiser import build_unet, load_unet
from library.sd.fp8_layers import UNET_FP8_LAYERS
from library.sd.layout import EPSILON, VELOCITY
from library.sd.memory_use import memory_use
from library.sd.metadata import describe
from library.sd.sampling import TextInputs, draw_latents, prompt_inputs
from library.sd.text import SdConditioning, SdPrompts, build_text_encoder, load_text_encoder, text_models
from library.sd.vae import load_vae
from library.sd.vae_layout import STRIDE
from library.training.files.hub import HubUploads
from library.training.files.metadata import LoraMetadata
from library.training.files.run_files import RunFiles, remove_left_over_files
from library.training.files.state import StateDescription, load_network_tensors, load_training_tensors
from library.training.loss.ddpm import DdpmObjective
from library.training.loss.objective import NoisyLatents
from library.training.loss.preservation import preserved_rows
from library.training.models import networks
from library.training.models.memory_estimate import advice
from library.training.optimizing.deepspeed import DeepSpeedLearner
from library.training.optimizing.divergence import DivergenceGuard
from library.training.optimizing.learner import MAX_NORM_CURVES, Learner, try_optimizer
from library.training.preparing import ModelPreparation
from library.training.running import trackers
from library.training.running.interrupts import StopRequest, resume_command
from library.training.running.meters import Arrived, DelayedNumbers, HostFacts, LossAverage, StepNumbers
from library.training.running.processes import OtherProcessEnded, ends_of_others_are_told
from library.training.running.report import Report
from library.training.sample_pictures import SamplePictures
from library.training.steps import Progress
from library.training.validating.validation import FixedLosses, Validation
from library.training.validating.validation_plan import noise_seed

logger = logging.getLogger("train_network")  # by name: as a script this module is __main__


class NetworkTrainer(ModelPreparation):
    """Trains a network (LoRA) on a frozen model. One object, one run."""

    stop_agreed = False  # by all processes
    last_lora_is_saved = False

    def train(self) -> None:
        """The whole run. Leaves with SystemExit(130 or 143) after a signal, having saved the LoRA and a state."""
        self.set_up()
        if self.options.run.dry_run:
            return
        with StopRequest() as self.stop, self.nothing_is_lost():
            self.before_training()
            while self.progress.step < self.run.length.total_steps and not self.must_stop():
                numbers = self.update()
                self.report(numbers)
                self.run_due_events()
            self.finish()

    @contextmanager
    def nothing_is_lost(self) -> Iterator[None]:
        """An image or a cache file that turns out bad in mid-training ends the run, in this process or in another one, as does a
        size of image that memory is too small for or that cannot be compiled for, but the main process saves the steps done
        before."""
        try:
            with ends_of_others_are_told(), compile_errors_are_told():
                yield
        except (DatasetError, CheckpointError, CompilerError, OtherProcessEnded, torch.OutOfMemoryError) as error:
            half_updated = self.options.memory.fused_backward_pass and isinstance(error, (CompilerError, torch.OutOfMemoryError))
            if self.accelerator.is_main_process and self.progress.step > self.run.start.step and not half_updated:
                self.save_alone()
            raise
        finally:
            self.reporter.close()

    def save_alone(self) -> None:
        """Asks nothing of other processes, which may be gone."""
        state = self.run.names.step_state(self.progress.step)
        self.files.save_lora(self.run.names.step_file(self.progress.step), self.progress, in_haste=True)
        if not self.learner.can_save_alone:
            self.files.uploads.wait()
            self.say("saved the LoRA that was trained, but no state: with --deepspeed each process has a part of the optimizer")
            return
        self.save_state(state)  # which a full disk may have no room for
        self.files.uploads.wait()
        self.say(f"saved what was trained; when the error below is mended: {resume_command(state)}")

    # ------------------------------------------------------------------ set-up, in the order in which memory is used

    def set_up(self) -> None:
        self.progress: Progress = self.run.start
        self.start_accelerator()
        with networks.before_weights(self.options.network.network_module):
            self.create_network()
        rates = self.options.given_text_rates
        groups = networks.optimizer_groups(self.network, self.options.optimizer, rates)  # now, for what it shows and refuses
        self.optimizer_name = try_optimizer(self.options, self.run.length.total_steps)
        self.print_plan(groups)
        if self.options.run.dry_run:
            return
        if self.accelerator.is_main_process:
            remove_left_over_files(self.run.names)
        self.fill_caches()
        if self.run.text_cache is not None:
            self.run.text_cache.conditioning_type = self.conditioning_type()
        self.load_models()
        total = self.run.length.total_steps
        learner_class = DeepSpeedLearner if self.options.distributed.deepspeed else Learner
        self.learner = learner_class(self.network, self.accelerator, self.options, groups=groups, total_steps=total)
        self.resume()
        self.start_logging()
        self.start_data()
        self.start_validation()

    def resume(self) -> None:
        """Goes on from --resume, and puts the schedule where --initial_step says."""
        self.average = LossAverage(self.run.length.steps_per_epoch, self.run.resumed.losses if self.run.resumed else ())
        folder, saved = self.run.resume_folder, self.run.resumed
        if folder is None or saved is None:
            if self.options.resume.resume:
                self.say("--resume latest: no complete state is there yet, so the run starts from the beginning")
            self.learner.advance_schedule(self.progress.step)
            return
        self.learner.load_state(load_training_tensors(folder), load_network_tensors(folder))
        self.say(f"resumed from {folder} after step {self.progress.step}")

    def start_logging(self) -> None:
        from library.options.reference_table import redacted

        self.metadata = LoraMetadata(self.run, seed=self.seed, model=self.describe_model(), optimizer=self.optimizer_name)
        config = redacted(self.options) if self.options.logging.log_config else {}
        trackers.start_trackers(self.accelerator, self.options.logging, config)
        self.files = RunFiles(
            run=self.run,
            learner=self.learner,
            metadata=self.metadata,
            group=self.group,
            is_main=self.accelerator.is_main_process,
            uploads=HubUploads(self.options.hub, is_main=self.accelerator.is_main_process),
        )
        self.numbers = DelayedNumbers()
        self.guard = DivergenceGuard(scales_losses=self.learner.scales_losses)
        self.pictures = SamplePictures(
            run=self.run,
            accelerator=self.accelerator,
            group=self.group,
            seed=self.seed,
            plan=self.plan_sample,
            draw=self.draw_samples,
            decode=lambda latents: self.decode_images(self.vae, latents),
            encode=self.prompt_conditioning,
            about=self.about_samples(),
            stop_wanted=lambda: bool(self.stop),
        )

    def start_data(self) -> None:
        pin = self.device.type == "cuda"
        source = BatchSource(
            self.run.training_set,
            seed=self.seed,
            rank=self.rank,
            processes=self.processes,
            latent_cache=self.run.latent_cache,
            text_cache=self.run.text_cache,
            prior_loss_weight=self.options.dataset.prior_loss_weight,
            clock=Clock(self.run.length.accumulation, self.run.length.total_steps),
            pin_memory=pin,
        )
        epoch, batches = self.run.length.batches_of_update(self.progress.position)
        self.batches = source.batches(epoch, batches.start, workers=worker_count(self.options))
        total = self.run.length.total_steps
        self.reporter = Report(self.accelerator, total=total, done=self.progress.step, visible=self.accelerator.is_main_process)

    def start_validation(self) -> None:
        seed = noise_seed(self.options)
        batches = ValidationBatches(
            self.run.training_set,
            latent_cache=self.run.latent_cache,
            text_cache=self.run.text_cache,
            seed=seed,
            limit=self.options.validation.max_validation_steps,
            pin_memory=self.device.type == "cuda",
        )
        losses = FixedLosses(
            batches=batches,
            objective=self.objective,
            seed=seed,
            prepare=lambda batch: self.encoded(batch.to(self.device, non_blocking=True)),
            compute_loss=self.compute_loss,
            dtype=self.weight_dtype,
            rank=self.rank,
            group=self.group,
            workers=worker_count(self.options),
            ready=self.learner.evaluating,
            # nobody could make up for the last one: a run that is done has no state to go on from
            stop_wanted=lambda: bool(self.stop) and self.progress.step < self.run.length.total_steps,
        )
        self.validation = Validation(self.run, losses, bar=self.reporter.passing_bar, log=self.reporter.log)

    # ------------------------------------------------------------------ one step

    def update(self) -> StepNumbers | None:
        """One optimizer step over its micro-batches. Returns the numbers of the step before: the host never waits."""
        started, waited_s = time.perf_counter(), self.batches.waited_s
        epoch, batch_numbers = self.run.length.batches_of_update(self.progress.position)
        if batch_numbers.start == 0:
            self.network.on_epoch_start(self.trained_encoders, self.denoiser)
        loss, images = torch.zeros((), device=self.device), 0
        for number in batch_numbers:
            batch = self.next_batch(epoch, number)
            if batch is not None:  # with several processes, the last batch of a bucket may leave some without images
                images += batch.global_size
                loss += self.backward(batch, self.run.length.micro_step(epoch, number), parts=len(batch_numbers))
        facts = HostFacts(self.learner.rates(), started, images, self.batches.waited_s - waited_s)
        numbers = self.step_optimizer(loss, facts)
        self.progress = self.progress.after_update()
        return numbers

    def next_batch(self, epoch: int, number: int) -> Batch | None:
        got_epoch, got_number, batch = next(self.batches)
        assert (got_epoch, got_number) == (epoch, number)
        return None if batch is None else batch.to(self.device, non_blocking=True)

    def backward(self, batch: Batch, micro_step: int, *, parts: int) -> Tensor:
        """Adds a micro-batch's gradient; returns its share of the step's loss (detached)."""
        seed_default_generators(derive_seed(self.seed, "dropout", micro_step, self.rank), self.device)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.trained_encoders, self.denoiser)
        batch = self.encoded(batch)
        assert batch.latents is not None
        noisy = self.objective.corrupt(
            batch.latents, seed=self.seed, step=micro_step, positions=batch.positions, dtype=self.weight_dtype
        )
        loss = self.compute_loss(batch, noisy).sum() / (batch.global_size * parts)  # its part of the mean over the global batch
        self.learner.backward(self.progress.step, loss)
        return loss.detach()

    def encoded(self, batch: Batch) -> Batch:
        """The batch with latents and text, made now where they are not cached."""
        latents = batch.latents
        if batch.pixels is not None:
            with torch.no_grad():
                latents = self.encode_images(self.vae, batch.pixels, batch.latent_seeds)
        self.learner.strength.set(batch.network_multiplier)
        return replace(batch, latents=latents, text=self.text_of(batch))

    def compute_loss(self, batch: Batch, noisy: NoisyLatents) -> Tensor:
        """The loss of each image (B,): in training with what was drawn for the step, in validation with what is fixed."""
        noisy = self.with_preserved_targets(batch, noisy)
        self.learner.strength.set(batch.network_multiplier)
        with self.accelerator.autocast():
            prediction = self.predict(self.denoiser, noisy, batch)
        return self.objective.loss(prediction, noisy, sample_weights=batch.loss_weights, mask=batch.mask)

    @torch.no_grad()
    def with_preserved_targets(self, batch: Batch, noisy: NoisyLatents) -> NoisyLatents:
        """The target of images under differential output preservation: what the model predicts without the network."""
        rows = preserved_rows(batch)
        if not rows:
            return noisy
        with self.learner.strength.at(0.0), self.accelerator.autocast():  # no strength, no dropout
            plain = replace(batch, text=self.text_of(batch)) if self.trained_encoders else batch
            prediction = self.predict(self.denoiser, noisy, plain).to(noisy.target.dtype)
        # of the whole batch, and put together row by row: to pick rows, or texts of their lengths, would wait for the device
        targets = [prediction[row] if row in rows else own for row, own in enumerate(noisy.target)]
        return replace(noisy, target=torch.stack(targets))

    def step_optimizer(self, loss: Tensor, facts: HostFacts) -> StepNumbers | None:
        self.learner.sum_gradients()
        wish = torch.full_like(loss, float(bool(self.stop)))  # a fill: copying a number from the host would wait for the device
        shared = self.accelerator.reduce(torch.stack([loss, wish]), reduction="sum")
        norm, finite, norms = self.learner.step(self.progress.step, shared[0])
        before = self.numbers.put(torch.stack([shared[0], norm, finite, shared[1], *norms]), facts)
        return self.step_numbers(self.progress.step, before)

    def step_numbers(self, step: int, arrived: Arrived | None) -> StepNumbers | None:
        """The numbers as they were put, of the step that ended as number ``step``."""
        if arrived is None:
            return None
        loss, norm, finite, stop, *norms = arrived.values
        curves = {
            **arrived.curves(),
            **dict(zip(MAX_NORM_CURVES, norms, strict=False)),  # none without --scale_weight_norms
        }
        return StepNumbers(step, loss, norm, bool(finite), bool(stop), curves)

    # ------------------------------------------------------------------ between steps

    def before_training(self) -> None:
        """Pictures and the loss of the model as it is; and a validation that the state the run goes on from still owes."""
        if self.options.compile.compiles:
            self.say(COMPILING)
        if self.progress.step == 0:
            self.sample_pictures(epoch=0)
        outcome = self.validation.measure_base_model(self.progress.step, can_switch_off=self.learner.strength.can_change)
        self.stop_agreed = self.stop_agreed or outcome.given_up
        self.validate()

    def must_stop(self) -> bool:
        """A signal came. Several processes agree by the number that travelled with the losses, so all stop at one step."""
        return bool(self.stop) if self.processes == 1 else self.stop_agreed

    def report(self, numbers: StepNumbers | None) -> None:
        if numbers is None:
            return
        self.stop_agreed = self.stop_agreed or numbers.stop_wanted
        self.learner.weights.learned(numbers.step - 1, numbers.finite)
        if numbers.finite:
            self.average.add(numbers.loss)
        if self.guard.has_diverged(numbers):
            self.end_diverged(numbers.step)
        epoch, _ = self.run.length.batches_of_update(max(self.progress.position - 1, 0))
        self.reporter.step(numbers, average=self.average.mean, epoch=epoch, epochs=self.run.length.epochs)

    def run_due_events(self) -> None:
        """Samples, validation, LoRA files and states due after this step.

        States come after all else that this step owes, because a run that goes on from one owes none of it; old files go last.
        """
        ended = self.run.length.ended_epoch(self.progress.position)
        self.sample_pictures(epoch=None)
        if (left := self.run.length.left_epoch(self.progress)) is not None:
            self.sample_pictures(epoch=left)
        self.validate()
        due = self.run.saves.due(self.progress.step, ended, self.run.names)
        if due:
            self.report_pending()  # nor is that of writing
        for save in due:
            self.files.save_lora(save.file, self.progress)
        for save in due:
            if self.options.saving.save_state:
                self.save_state(save.state)
        self.files.remove(*(path for save in due for path in save.makes_way))

    def validate(self) -> None:
        """The loss on images that are not trained, if it is due and not measured yet; the best network is kept."""
        if not self.validation.is_due(self.progress):
            return
        self.report_pending()  # so that the training average knows of this step
        if self.progress.step == self.run.length.total_steps:
            self.save_last_lora()  # the last validation is not given up, and what ends a job need not wait for it
        outcome = self.validation.validate(self.progress, training_average=self.average.mean)
        self.stop_agreed = self.stop_agreed or outcome.given_up
        if outcome.displaced_step is not None:
            self.files.keep_old_best(outcome.displaced_step)
        if outcome.is_best and self.options.validation.save_best:
            self.files.save_lora(self.run.names.best_file(), self.progress, notes=self.validation.notes())

    def finish(self) -> None:
        """The last files. After a signal: a state and the LoRA of this step, and how to go on."""
        self.report_pending()
        self.batches.close()
        names, saving = self.run.names, self.options.saving
        if self.must_stop() and self.progress.step < self.run.length.total_steps:
            self.stop_early()
        self.save_last_lora()
        if saving.save_state or saving.save_state_on_train_end:
            self.save_state(names.last_state())
        self.close_logging()
        self.say(
            f"training is done: {self.progress.step} steps, average loss {self.average.mean:.4f}, LoRA in {names.last_file()}"
        )

    def save_last_lora(self) -> None:
        """Once, when all steps are done."""
        if self.last_lora_is_saved:
            return
        if self.average.is_empty or self.guard.ends_in_skipped_steps:
            self.end_diverged(self.progress.step)
        self.files.save_lora(self.run.names.last_file(), self.progress, last=True)
        self.last_lora_is_saved = True

    def end_diverged(self, step: int) -> NoReturn:
        """``step``: the last that was not finite."""
        self.files.end_diverged_run(self.progress, step=step, untrained=self.average.is_empty)

    def report_pending(self) -> None:
        """The numbers of the last step, which are still on their way."""
        self.report(self.step_numbers(self.progress.step, self.numbers.take()))

    def stop_early(self) -> None:
        names, step = self.run.names, self.progress.step
        self.files.save_lora(names.step_file(step), self.progress, in_haste=True)
        self.save_state(names.step_state(step))  # which a full disk may have no room for
        self.group.wait()  # a process that leaves makes the launcher end the others
        self.close_logging()
        self.say(f"stopped after step {step}; to go on: {resume_command(names.step_state(step))}")
        sys.exit(self.stop.exit_status)

    def close_logging(self) -> None:
        self.files.close()
        self.reporter.close()
        self.accelerator.end_training()

    def save_state(self, folder: Path) -> None:
        """The pending numbers are reported first, so that the state knows of every finished step."""
        self.report_pending()
        description = StateDescription(
            epoch=self.progress.position // self.run.length.steps_per_epoch,
            progress=self.progress,
            seed=self.seed,
            identity=self.run.settings.identity,
            history=self.run.settings.history,
            losses=self.average.values(),
            validation=self.validation.record,
        )
        self.files.save_state(folder, description)

    # ------------------------------------------------------------------ sample pictures

    def sample_pictures(self, *, epoch: int | None) -> None:
        """Draws the sample prompts if they are due after this step (epoch None), or at the end of ``epoch``."""
        self.pictures.draw_if_due(step=self.progress.step, epoch=epoch, ready=self.ready_to_sample)

    @contextmanager
    def ready_to_sample(self) -> Iterator[None]:
        self.report_pending()  # the time that pictures take is not the step's
        with self.learner.evaluating(), self.vae_on_device():
            yield


DEFAULT_SAMPLER = "ddim"  # the reference's


class StableDiffusionTrainer(NetworkTrainer):
    """Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or velocity, CLIP text states, a KL-regularised VAE."""

    def build_denoiser(self) -> Any:
        return build_unet(self.run.layouts.denoiser.config)

    def fp8_layers(self) -> str:
        return UNET_FP8_LAYERS

    def load_denoiser(self, denoiser: Any, *, device: Place, dtype: torch.dtype) -> None:
        load_unet(denoiser, self.run.layouts.denoiser, device=device, dtype=dtype)

    def memory_use(self, size_wh: tuple[int, int], images: int) -> MemoryUse:
        return memory_use(self.run.layouts, size_wh, images, self.live_encoders)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Any:
        architecture: Any = self.run.architecture
        return load_vae(self.run.layouts.vae, device=device, dtype=dtype, scale=architecture.scale_of(self.run.layouts))

    def build_text_encoder(self) -> Any:
        clip = self.options.clip
        return build_text_encoder(
            self.run.layouts.text,
            v2=clip.v2,
            clip_skip=clip.clip_skip,
            max_token_length=clip.max_token_length,
            weighted_captions=clip.weighted_captions,
            fp8=self.options.memory.fp8_base,
        )

    def text_models(self, text_encoder: Any) -> Sequence[nn.Module]:
        return text_models(text_encoder)

    def load_text_encoder(self, text_encoder: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        load_text_encoder(text_encoder, self.run.layouts.text, device=device, dtype=dtype)

    def conditioning_type(self) -> type[Conditioning]:
        return SdConditioning

    def prompt_type(self) -> type[Conditioning]:
        return SdPrompts

    def encode_images(self, vae: Any, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(pixels, seeds)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> Conditioning:
        return text_encoder.encode(captions, self.device)

    def encode_prompts(self, text_encoder: Any, prompts: Sequence[str]) -> Conditioning:
        return text_encoder.encode_prompts(prompts, self.device)

    def create_objective(self) -> DdpmObjective:
        return DdpmObjective(self.options.ddpm, self.options.noise, self.options.loss)

    def predict(self, denoiser: Any, noisy: NoisyLatents, batch: Batch) -> Tensor:
        text: Any = batch.text
        return denoiser.predict(noisy.latents, noisy.timesteps, text.states)

    def plan_sample(self, prompt: SamplePrompt, seed: int) -> Picture:
        sampler = prompt.sample_sampler or self.options.samples.sample_sampler or DEFAULT_SAMPLER
        return sample_picture(prompt, seed, sampler=sampler, defaults=SampleDefaults(side_step=STRIDE))

    def draw_sample(self, picture: Picture, positive: Any, negative: Any | None) -> Tensor:
        prediction = VELOCITY if self.options.ddpm.v_parameterization else EPSILON
        texts = self.sample_texts(picture, positive, negative)
        return draw_latents(self.denoiser, [picture], *texts, prediction=prediction, device=self.device)

    def sample_texts(self, picture: Picture, positive: Any, negative: Any | None) -> tuple[TextInputs, TextInputs | None]:
        """Prompt and negative prompt as the U-Net takes them."""
        return prompt_inputs(positive, negative)

    def decode_images(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents)

    def describe_model(self) -> dict[str, str]:
        return describe(self.options, sdxl=False)


def run_training(trainer_class: type[NetworkTrainer], run: CheckedRun) -> None:
    """Trains, and ends the script with one message for what a user can mend."""
    gc.freeze()  # what was imported stays: the collector, off since the first checks, need not look at it again
    gc.enable()
    with user_errors_end_the_script(all_processes=True):
        try:
            with ends_of_others_are_told():
                trainer_class(run).train()
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"the GPU is out of memory ({str(error).splitlines()[0]}); {advice(run.options)}") from error


if __name__ == "__main__":
    run_training(StableDiffusionTrainer, RUN)
