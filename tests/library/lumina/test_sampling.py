"""Pictures of Lumina against diffusers' pipeline, on the same tiny weights."""

from __future__ import annotations

import pytest
import torch

from library.lumina.sampling import SCHEDULE, velocity_of
from library.lumina.text import LuminaConditioning
from library.nn.initial_noise import initial_noises
from library.sampling.flow_pictures import draw_pictures
from library.sampling.picture_plan import sample_defaults, sample_picture
from library.sampling.prompts import SamplePrompt
from tests.library.lumina.test_against_diffusers import CONFIG, their_nextdit
from tests.library.lumina.tiny_nextdit import batch, tiny_denoiser

diffusers = pytest.importorskip("diffusers", minversion="0.35")

SEEDS = (3, 9)


def text(lengths: tuple[int, ...], *, offset: float = 0.0) -> LuminaConditioning:
    _, _, states, lengths = batch(lengths)
    return LuminaConditioning(states + offset * (states != 0), lengths=lengths)


def mask(text: LuminaConditioning) -> torch.Tensor:
    return torch.arange(text.states.shape[1]) < torch.tensor(text.lengths)[:, None]


def pictures(**settings: object):
    prompt = SamplePrompt(prompt="a", index=0, width=80, height=64, **settings)
    return [sample_picture(prompt, seed, sampler="euler", defaults=sample_defaults("lumina")) for seed in SEEDS]


def drawn(positive: LuminaConditioning, negative: LuminaConditioning | None, **settings: object) -> torch.Tensor:
    velocity = velocity_of(tiny_denoiser(CONFIG))
    with torch.no_grad():
        return draw_pictures(
            velocity, pictures(**settings), positive, negative, channels=16, schedule=SCHEDULE, device=torch.device("cpu")
        )


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pictures_are_those_of_the_pipeline(scale):
    positive, negative = text((7, 4)), text((2, 7), offset=0.5)
    pipeline = diffusers.Lumina2Pipeline(
        transformer=their_nextdit(), vae=None, text_encoder=None, tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=positive.states, prompt_attention_mask=mask(positive), negative_prompt_embeds=negative.states,
        negative_prompt_attention_mask=mask(negative), latents=initial_noises(SEEDS, (80, 64)), width=80, height=64,
        num_inference_steps=6, guidance_scale=scale, cfg_trunc_ratio=1.0, cfg_normalization=False, output_type="latent",
    ).images  # fmt: skip
    ours = drawn(positive, None if scale == 1 else negative, scale=scale, sample_steps=6, cfg_trunc_ratio=1.0, renorm_cfg=0.0)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_pictures_of_a_training_end_their_guidance_early():
    """Of 36 steps with shift 6, those at less than a quarter of the way are guided."""
    positive, negative, asked = text((3, 3)), text((3, 3), offset=0.5), []
    denoiser = tiny_denoiser(CONFIG)

    def velocity(latents, sigmas, conditioning):
        if conditioning is negative:
            asked.append(1 - float(sigmas[0]))
        return velocity_of(denoiser)(latents, sigmas, conditioning)

    with torch.no_grad():
        draw_pictures(velocity, pictures(), positive, negative, channels=16, schedule=SCHEDULE, device=torch.device("cpu"))
    assert len(asked) == 24 and asked[-1] < 0.25 and asked == sorted(asked)


def test_pictures_of_two_seeds_differ():
    alike = text((4, 4))
    states = alike.states[:1].expand(2, -1, -1)
    first, second = drawn(LuminaConditioning(states, lengths=(4, 4)), None, scale=1.0, sample_steps=2)
    assert (first - second).abs().mean() > 0.1
