from __future__ import annotations

import pytest
import torch
from PIL import Image

from anima_train_network import ANIMA
from library.errors import OptionError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.ddpm import DdpmTrainingOptions
from library.options.flow import (
    LUMINA_TIMESTEP_SAMPLINGS,
    AnimaFlowOptions,
    FlowOptions,
    LuminaFlowOptions,
    Sd3FlowOptions,
)
from library.options.lumina import LuminaTrainOptions
from library.options.sd import StableDiffusionTrainOptions
from library.options.sd3 import Sd3TrainOptions
from library.training.look import look
from library.training.loss.timesteps import sample_sigmas, sigma_sampler
from library.training.timestep_picture import BINS, ddpm_shares, flow_shares, squared_error_weights

SIZES = {(128, 128): 3.0, (64, 64): 1.0}


def drawn_at_random(flow: FlowOptions, count: int = 400_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of BINS parts of [0, 1], as the trainer's own draws give them; by number and by weight."""
    generator = torch.Generator().manual_seed(1)
    sigmas = []
    for size, times in SIZES.items():
        shape = (int(count * times / sum(SIZES.values())),)
        draw = torch.rand if sigma_sampler(flow).draw == "uniform" else torch.randn
        sigmas.append(sample_sigmas(draw(shape, generator=generator), flow, latent_hw=size))
    half_step = 0.0005 if sigma_sampler(flow).rounds_down else -0.0005
    places = ((torch.cat(sigmas) + half_step) * BINS).long().clamp(0, BINS - 1)
    weights = squared_error_weights(flow, torch.cat(sigmas))
    counts, weighed = torch.bincount(places, minlength=BINS), torch.bincount(places, weights=weights, minlength=BINS)
    return counts / counts.sum(), weighed / weighed.sum()


def flows_of(scheme: str) -> list[FlowOptions]:
    shared = {"weighting_scheme": scheme, "min_timestep": 100}
    return [
        *(
            LuminaFlowOptions(timestep_sampling=sampling, discrete_flow_shift=2.0, model_prediction_type=kind, **shared)
            for sampling, kind in zip(LUMINA_TIMESTEP_SAMPLINGS, ["sigma_scaled", "raw"] * 3, strict=True)
        ),
        AnimaFlowOptions(**shared),
        Sd3FlowOptions(training_shift=2.0, **shared),
    ]


@pytest.mark.parametrize("flow", [flow for scheme in ("none", "logit_normal", "mode", "cosmap") for flow in flows_of(scheme)])
def test_curves_are_those_of_the_draws(flow):
    shares = flow_shares(flow, SIZES)
    drawn, weighed = drawn_at_random(flow)
    assert (shares.drawn - drawn).abs().max() < 0.002 and (shares.weighed - weighed).abs().max() < 0.002
    assert float(shares.drawn.sum()) == pytest.approx(1) and float(shares.weighed.sum()) == pytest.approx(1)
    middle = int((shares.quantiles[0.5] / 1000 - 0.0005) * BINS)
    assert float(shares.drawn[:middle].sum()) < 0.5 + 1e-9 and float(shares.drawn[: middle + 1].sum()) > 0.5 - 1e-9


def looked(tmp_path, *flags: str, option_set: type = AnimaTrainOptions) -> None:
    """The architecture matters only where pictures are looked at."""
    base = [f"--output_dir={tmp_path / 'out'}", "--output_name=t", "--show_timesteps"]
    look(read_options(option_set, [*base, *flags]), ANIMA)


@pytest.mark.parametrize(("option_set", "flags", "told"), [
    (AnimaTrainOptions, ("--weighting_scheme=cosmap",), ("50% below 500", "--sigmoid_scale=1.0")),
    (Sd3TrainOptions, ("--training_shift=3",), ("50% below 750", "--training_shift=3.0")),
    (LuminaTrainOptions, ("--model_prediction_type=sigma_scaled",), ("50% below 857", "--discrete_flow_shift=6.0")),
    (StableDiffusionTrainOptions, ("--min_snr_gamma=5", "--v_parameterization"),
     ("50% below 500", "--v_parameterization --min_snr_gamma=5.0")),
])  # fmt: skip
def test_picture_and_numbers(tmp_path, capsys, option_set, flags, told):
    looked(tmp_path, *flags, option_set=option_set)
    lines = capsys.readouterr().out
    assert all(words in lines for words in (*told, "t-timesteps.png"))
    with Image.open(tmp_path / "out" / "t-timesteps.png") as picture:
        assert picture.size == (1200, 640) and len(picture.getcolors(2**16)) > 4


@pytest.mark.parametrize(("option_set", "sampling"), [
    (AnimaTrainOptions, "flux_shift"), (LuminaTrainOptions, "flux_shift"), (LuminaTrainOptions, "nextdit_shift")
])  # fmt: skip
def test_the_sizes_of_the_pictures_count_where_the_sampling_asks_for_them(tmp_path, picture_folder, capsys, option_set, sampling):
    root = tmp_path / "root"
    root.mkdir()
    picture_folder(3).rename(root / "2_thing")
    looked(tmp_path, f"--train_data_dir={root}", "--resolution=64", f"--timestep_sampling={sampling}", option_set=option_set)
    assert "(shift 1.5" in capsys.readouterr().out


def test_flux_shift_needs_the_pictures(tmp_path):
    with pytest.raises(OptionError, match="nothing to train on"):
        looked(tmp_path, "--timestep_sampling=flux_shift")


def test_the_levels_of_a_table_give_a_smooth_curve():
    flow = AnimaFlowOptions(timestep_sampling="sigma", weighting_scheme="none")
    shares = flow_shares(flow, SIZES)
    assert torch.allclose(shares.drawn, torch.full_like(shares.drawn, 1 / BINS))


def test_whole_timesteps_give_a_smooth_curve():
    shares = flow_shares(Sd3FlowOptions(), SIZES)
    assert torch.allclose(shares.drawn, torch.full_like(shares.drawn, 1 / BINS), atol=1e-6)
    assert shares.weighed[0] < 1e-3 * shares.weighed[-1]  # of guessed images
    assert "--training_shift=1.0 --weighting_scheme=uniform" in shares.settings
    level = flow_shares(Sd3FlowOptions(weighting_scheme="sigma_sqrt"), SIZES).weighed
    assert torch.allclose(level, torch.full_like(level, 1 / BINS), atol=1e-6)


def test_tables_are_drawn_alike_and_weigh_by_their_snr():
    plain = ddpm_shares(DdpmTrainingOptions())
    assert torch.allclose(plain.drawn, torch.full_like(plain.drawn, 1 / BINS))
    assert torch.allclose(plain.weighed, plain.drawn)
    assert plain.quantiles[0.5] == pytest.approx(500)
    part = ddpm_shares(DdpmTrainingOptions(min_timestep=50, max_timestep=450, min_snr_gamma=5.0))
    assert torch.allclose(part.drawn[5:45], torch.full((40,), 1 / 40, dtype=torch.float64))
    assert not part.drawn[:5].any() and not part.drawn[45:].any()
    assert part.weighed[5] < 0.5 * part.weighed[44] and float(part.weighed.sum()) == pytest.approx(1)
