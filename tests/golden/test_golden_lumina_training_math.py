"""What Lumina alone has of the training's numbers: its target, its kinds of predictions, draws at the ends.

The rest is compared together with Anima's: test_golden_training_math.py.
"""

from __future__ import annotations

import pytest
import torch

from golden_files import Golden, load_golden, relative_error
from library.options.flow import LuminaFlowOptions
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.loss.objective import FlowObjective, NoisyLatents
from library.training.loss.timesteps import sample_sigmas

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("lumina/training_math.safetensors")


def objective(**flow: object) -> FlowObjective:
    return FlowObjective(LuminaFlowOptions(**flow), NoiseOptions(), LossOptions())


def test_target(golden):
    """Recorded as image - noise: the denoiser's own sign."""
    noisy = objective().corrupt_with(golden.inputs["latents_16x24"], golden.inputs["noise_16x24"], torch.full((4,), 0.3))
    assert torch.equal(-noisy.target, golden.outputs["target"])


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.parametrize("sampling", ["nextdit_shift", "flux_shift"])
def test_draws_at_the_ends(golden, sampling, size):
    """The reference raises them to 1e-7 first; ours give the exact ends, less than 1e-6 away."""
    tag = f"{sampling}_edges/{size[0]}x{size[1]}"
    (draws,) = (golden.inputs[key] for key in golden.inputs if key.startswith(f"{tag}/draw0"))
    sigmas = sample_sigmas(draws, LuminaFlowOptions(timestep_sampling=sampling), latent_hw=size)
    torch.testing.assert_close(sigmas, golden.outputs[f"{tag}/sigmas"], rtol=1e-5, atol=1e-6)
    assert sigmas.isfinite().all() and sigmas.min() >= 0 and sigmas.max() <= 1
    if sampling == "nextdit_shift":
        assert float(sigmas[draws == 0].sum()) == 0.0 and (draws == 0).any()


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_sigma_scaled_predictions(golden, scheme):
    """The recorded form is x_t - sigma * prediction, weighed; with the image on the other side it is our loss."""
    recorded = {name: golden.inputs[f"prediction_type/{name}"] for name in ("model_pred", "noisy", "sigmas")}
    made, target = objective(model_prediction_type="sigma_scaled", weighting_scheme=scheme), golden.inputs["loss/target"]
    sigmas = recorded["sigmas"]
    weights = golden.outputs[f"prediction_type/sigma_scaled/{scheme}/weighting"]
    image = recorded["noisy"] - sigmas.view(-1, 1, 1, 1) * target  # where the velocity is ``target``
    guess = golden.outputs[f"prediction_type/sigma_scaled/{scheme}/pred"]
    noisy = NoisyLatents(
        latents=recorded["noisy"], sigmas=sigmas, timesteps=sigmas * 1000, target=target,
        loss_weights=made.corrupt_with(image, image, sigmas).loss_weights,
    )  # fmt: skip
    losses = made.loss(recorded["model_pred"], noisy, sample_weights=torch.ones(4))
    expected = (guess.double() - image).square().flatten(1).mean(1) * weights
    assert relative_error(losses, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["raw", "additive"])
def test_other_predictions_are_compared_as_they_are(golden, kind):
    """Additive: what the reference adds to the prediction is added to the target too, and nothing changes."""
    recorded = golden.outputs[f"prediction_type/{kind}/none/pred"]
    prediction, target = golden.inputs["prediction_type/model_pred"], golden.inputs["loss/target"]
    added = recorded - prediction
    assert bool(added.abs().max() > 1e-3) == (kind == "additive")
    made, sigmas = objective(model_prediction_type=kind), golden.inputs["prediction_type/sigmas"]
    noisy = NoisyLatents(latents=added, sigmas=sigmas, timesteps=sigmas, target=target, loss_weights=torch.ones(4))
    losses = made.loss(prediction, noisy, sample_weights=torch.ones(4))
    assert relative_error(losses, (recorded - (target + added)).square().flatten(1).mean(1)) < TOLERANCE
