"""Pictures of SD3 against diffusers' pipeline, on the same tiny weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.nn.initial_noise import initial_noises
from library.sampling.flow_pictures import draw_pictures
from library.sampling.picture_plan import sample_defaults, sample_picture
from library.sampling.prompts import SamplePrompt
from library.sd3.sampling import SCHEDULE, TextInputs, text_inputs, velocity_of
from library.sd3.text import Sd3Conditioning
from tests.library.sd3.test_against_diffusers import their_mmdit, their_weights
from tests.library.sd3.tiny_mmdit import KINDS, TINY, tiny_denoiser

diffusers = pytest.importorskip("diffusers")

SEEDS, SIZE_WH = (3, 9), (80, 64)


def texts(seed: int) -> TextInputs:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(2, 9, TINY.context_width, generator=generator)
    return TextInputs(context, torch.randn(2, TINY.pooled_width, generator=generator))


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline(kind, scale):
    config = replace(KINDS[kind], mlp_hidden=4 * KINDS[kind].width)  # as diffusers always has it
    transformer, (positive, negative) = their_mmdit(config), (texts(1), texts(2))
    transformer.load_state_dict(their_weights(config))
    left_out = dict.fromkeys(
        ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=positive.context, pooled_prompt_embeds=positive.pooled, negative_prompt_embeds=negative.context,
        negative_pooled_prompt_embeds=negative.pooled, latents=initial_noises(SEEDS, SIZE_WH), width=SIZE_WH[0],
        height=SIZE_WH[1], num_inference_steps=5, guidance_scale=scale, output_type="latent",
    ).images  # fmt: skip
    prompt = SamplePrompt(prompt="a", index=0, width=SIZE_WH[0], height=SIZE_WH[1], sample_steps=5, scale=scale)
    pictures = [sample_picture(prompt, seed, sampler="euler", defaults=sample_defaults("sd3")) for seed in SEEDS]
    with torch.no_grad():
        ours = draw_pictures(
            velocity_of(tiny_denoiser(config)), pictures, positive, negative if pictures[0].is_guided else None, channels=16,
            schedule=SCHEDULE, device=torch.device("cpu"),
        )  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_text_of_a_picture_is_what_the_denoiser_takes():
    config = replace(TINY, pooled_width=8, context_width=12)
    text = Sd3Conditioning(
        torch.randn(1, 77, 3), torch.randn(1, 77, 5), torch.randn(1, 4, 12), torch.randn(1, 3), torch.randn(1, 5)
    )
    inputs = text_inputs(tiny_denoiser(config), text).repeated(2)
    assert inputs.context.shape == (2, 81, 12) and inputs.pooled.shape == (2, 8)
    assert torch.equal(inputs.context[1], text.context(12)[0]) and torch.equal(inputs.pooled[0], text.pooled[0])
