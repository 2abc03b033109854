"""From noise to latents with the samplers of Stable Diffusion, which are diffusers' schedulers under the names that people know.

B pictures are drawn at once; each has a seed of its own, and depends on it alone, except for rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from library.nn.initial_noise import initial_noises
from library.randomness import torch_generator
from library.sd.layout import VELOCITY
from library.sd.text import SdPrompts, equally_long
from library.sd.vae_layout import LATENT_CHANNELS

if TYPE_CHECKING:
    from library.sd.denoiser import StableDiffusionUNet

# latents (B, 4, h, w), timesteps (B,), context (B, N, C), vector (B, V) or None -> what the U-Net predicts (B, 4, h, w)
Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# the noise schedule of training, as the reference draws with it: zero terminal SNR does not change it
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RUNGE_KUTTA_STEPS = 4  # that pndm begins with


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A scheduler class of diffusers and what is set besides the schedule."""

    scheduler: str
    settings: tuple[tuple[str, Any], ...] = ()
    draws_noise: bool = False  # at each step
    clips: bool = False  # the guessed image to [-1, 1]; the reference forces it where the class can
    is_multistep: bool = False  # steps as library/sd/linear_multistep.py takes them
    most_steps: int = 1000


LMS = Sampler(scheduler="EulerDiscreteScheduler", is_multistep=True)
EULER = Sampler(scheduler="EulerDiscreteScheduler")
EULER_A = Sampler(scheduler="EulerAncestralDiscreteScheduler", draws_noise=True)
DPM_2 = Sampler(scheduler="KDPM2DiscreteScheduler")
DPM_2_A = Sampler(scheduler="KDPM2AncestralDiscreteScheduler", draws_noise=True)
SAMPLERS = {
    "ddim": Sampler(scheduler="DDIMScheduler", clips=True),
    "pndm": Sampler(scheduler="PNDMScheduler"),  # begins with Runge-Kutta steps
    "lms": LMS,
    "euler": EULER,
    "euler_a": EULER_A,
    "heun": Sampler(scheduler="HeunDiscreteScheduler", clips=True),
    "dpm_2": DPM_2,
    "dpm_2_a": DPM_2_A,
    # DPM-Solver in its first form divides by the noise level, so it cannot go to zero: it ends at the level of timestep 0, as it
    # did in diffusers when that could not be chosen
    "dpmsolver": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        settings=(("algorithm_type", "dpmsolver"), ("final_sigmas_type", "sigma_min")),
        most_steps=999,  # with 1000 two of them are at one timestep, and the solver divides by the way between them
    ),
    "dpmsolver++": Sampler(
        scheduler="DPMSolverMultistepScheduler", settings=(("algorithm_type", "dpmsolver++"),), most_steps=999
    ),
    # diffusers sets this itself, with a warning, where a picture ends at noise level zero
    "dpmsingle": Sampler(scheduler="DPMSolverSinglestepScheduler", settings=(("lower_order_final", True),)),
    "k_lms": LMS,
    "k_euler": EULER,
    "k_euler_a": EULER_A,
    "k_dpm_2": DPM_2,
    "k_dpm_2_a": DPM_2_A,
}


class PictureSettings(Protocol):
    """What drawing takes from a Picture of library/sampling/picture_plan.py."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def sampler(self) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class TextInputs:
    """The text as the U-Net takes it."""

    context: Tensor  # (B, N, C)
    vector: Tensor | None = None  # (B, V); SDXL's

    def repeated(self, images: int) -> TextInputs:
        """The only text for each of ``images``."""
        vector = None if self.vector is None else self.vector.expand(images, -1)
        return replace(self, context=self.context.expand(images, -1, -1), vector=vector)

    def followed_by(self, other: TextInputs) -> TextInputs:
        both = None if self.vector is None or other.vector is None else torch.cat([self.vector, other.vector])
        return TextInputs(torch.cat([self.context, other.context]), both)


def draw_latents(  # noqa: PLR0913  # what a picture needs
    unet: StableDiffusionUNet,
    pictures: Sequence[PictureSettings],
    positive: TextInputs,
    negative: TextInputs | None,
    *,
    prediction: str,
    device: torch.device | str,
    tick: Callable[[], None] | None = None,
) -> Tensor:
    """Scaled latents (B, 4, h, w) in fp32 of pictures that differ in their seeds alone. The caller sets autocast, gradient mode.

    ``positive`` and ``negative`` (1, N, C) are on ``device``; without a ``negative`` there is no guidance. ``prediction`` is
    EPSILON or VELOCITY of library/sd/layout.py. ``tick`` is called before each pass through the U-Net.
    """
    first, seeds = pictures[0], [picture.seed for picture in pictures]
    noise = initial_noises(seeds, (first.width, first.height), LATENT_CHANNELS)
    return draw(
        guided(unet.predict, positive.repeated(len(seeds)), negative.repeated(len(seeds)) if negative else None, first.scale),
        noise.to(device),
        scheduler=build_scheduler(first.sampler, first.steps, prediction=prediction),
        seeds=seeds if SAMPLERS[first.sampler].draws_noise else None,
        tick=tick,
    )


def prompt_inputs(positive: SdPrompts, negative: SdPrompts | None) -> tuple[TextInputs, TextInputs | None]:
    """A prompt and its negative (each B = 1), equally long. A negative text that does not act is None."""
    if negative is None:
        return TextInputs(positive.conditioning().states), None
    with_prompt, without = equally_long(positive, negative)
    return TextInputs(with_prompt.states), TextInputs(without.states)


def build_scheduler(sampler: str, steps: int, *, prediction: str) -> Any:
    """The scheduler of a sampler, set to that many ``steps``. Its times and levels are on the CPU, so nothing waits for a GPU."""
    import diffusers

    from library.sd.linear_multistep import LinearMultistep

    plan = SAMPLERS[sampler]
    settings = {**SCHEDULE, **dict(plan.settings), **({"clip_sample": True} if plan.clips else {})}
    if sampler == "pndm" and steps < RUNGE_KUTTA_STEPS:
        settings["skip_prk_steps"] = True
    kind = "v_prediction" if prediction == VELOCITY else "epsilon"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that "dpmsolver" may be gone some day
        scheduler = getattr(diffusers, plan.scheduler)(**settings, prediction_type=kind)
    if plan.is_multistep:
        scheduler = LinearMultistep(scheduler)
    scheduler.set_timesteps(min(steps, plan.most_steps))
    return scheduler


def passes(sampler: str, steps: int) -> int:
    """Passes through the U-Net that a picture takes; some samplers take two for a step."""
    return len(build_scheduler(sampler, steps, prediction="").timesteps)


Prediction = Callable[[Tensor, float], Tensor]  # latents (B, 4, h, w), timestep -> guided prediction (B, 4, h, w) in fp32


def draw(
    predict: Prediction,
    noise: Tensor,
    *,
    scheduler: Any,
    seeds: Sequence[int] | None = None,
    tick: Callable[[], None] | None = None,
) -> Tensor:
    """noise (B, 4, h, w) -> scaled latents (B, 4, h, w). ``seeds``: of the rows, where noise is drawn at each step."""
    # not the seed itself: then the noise of the first step would be that which the picture starts from
    sources = [torch_generator("sampler noise", seed) for seed in seeds] if seeds is not None else None
    drawing = {} if sources is None else {"generator": sources}
    latents = noise * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        if tick is not None:
            tick()
        prediction = predict(scheduler.scale_model_input(latents, timestep), float(timestep))
        (latents,) = scheduler.step(prediction, timestep, latents, return_dict=False, **drawing)[:1]
    return latents


def guided(predict: Predict, positive: TextInputs, negative: TextInputs | None, scale: float) -> Prediction:
    """``negative + scale * (positive - negative)`` (classifier-free guidance, arXiv 2207.12598), both in one pass.

    One pass of twice the rows starts half the kernels of two, reads the weights once, and needs less memory than a training step.
    """
    if negative is None:
        return lambda latents, timestep: _predicted(predict, latents, timestep, positive)
    if negative.context.shape != positive.context.shape:
        raise ValueError(f"texts of different lengths: {tuple(negative.context.shape)} and {tuple(positive.context.shape)}")
    both = negative.followed_by(positive)

    def prediction(latents: Tensor, timestep: float) -> Tensor:
        without, with_prompt = _predicted(predict, torch.cat([latents, latents]), timestep, both).chunk(2)
        return without + scale * (with_prompt - without)

    return prediction


def _predicted(predict: Predict, latents: Tensor, timestep: float, text: TextInputs) -> Tensor:
    timesteps = latents.new_full((len(latents),), timestep, dtype=torch.float32)  # a fill: nothing waits for the device
    return predict(latents, timesteps, text.context, text.vector).float()
