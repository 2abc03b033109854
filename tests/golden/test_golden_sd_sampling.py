from __future__ import annotations

import json

import pytest
import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.sd.denoiser import build_unet, load_unet
from library.sd.layout import EPSILON, VELOCITY
from library.sd.sampling import SAMPLERS, TextInputs, build_scheduler, draw, guided, passes
from library.sd.unet_layout import unet_part
from library.sdxl.sampling import text_inputs
from library.sdxl.text import SdxlConditioning
from tests.golden.golden_files import Golden, load_golden, relative_error

FILES = {"sd/sd1_sampling": EPSILON, "sd/sd2_v_sampling": VELOCITY, "sdxl/sdxl_sampling": EPSILON}
SOLVER_TOLERANCE, PATH_TOLERANCE = 1e-5, 1e-4  # of the files' README
PREFIX = "model.diffusion_model."


def recorded(golden: Golden, kind: str, name: str) -> list[torch.Tensor]:
    """``steps``, ``model_out`` or ``noise`` of a case, in order."""
    tensors = golden.inputs if kind == "noise" else golden.outputs
    return [tensors[key] for key in sorted(key for key in tensors if key.startswith(f"{kind}/{name}/"))]


def play_noise(monkeypatch, scheduler, draws: list[torch.Tensor]) -> None:
    """The recorded draws in place of new ones, in their order."""
    left = iter(draws)
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(left))


@pytest.mark.parametrize("file", FILES)
def test_times_and_levels(file):
    golden = load_golden(f"{file}.safetensors")
    for name, case in golden.about["samplers"].items():
        scheduler = build_scheduler(case["sampler"], case["steps"], prediction=FILES[file])
        assert scheduler.timesteps.tolist() == pytest.approx(case["timesteps"], abs=1e-3), name
        assert float(scheduler.init_noise_sigma) == pytest.approx(case["init_noise_sigma"], rel=1e-6)
        assert passes(case["sampler"], case["steps"]) == len(case["timesteps"])
        if case["sigmas"] is not None:
            levels = getattr(scheduler, "levels", scheduler).sigmas.tolist()
            assert levels == pytest.approx(case["sigmas"], rel=1e-5), name


@pytest.mark.parametrize("file", ["sd/sd1_sampling", "sd/sd2_v_sampling"])
def test_solvers_alone(file, monkeypatch):
    golden = load_golden(f"{file}.safetensors")
    for name, case in golden.about["samplers"].items():
        scheduler = build_scheduler(case["sampler"], case["steps"], prediction=FILES[file])
        outputs, noise = recorded(golden, "model_out", name), recorded(golden, "noise", name)
        assert len(outputs) == len(scheduler.timesteps) and len(noise) == case["noise_draws"]
        if noise:
            play_noise(monkeypatch, scheduler, noise)
        answers = iter(outputs)
        seeds = [0] if SAMPLERS[case["sampler"]].draws_noise else None
        assert bool(noise) == bool(seeds)
        found = draw(lambda _x, _t, a=answers: next(a), golden.inputs["init_noise"], scheduler=scheduler, seeds=seeds)
        assert relative_error(found, golden.outputs[f"final/{name}"]) < SOLVER_TOLERANCE, name
    assert {case["sampler"] for case in golden.about["samplers"].values()} <= set(SAMPLERS)


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_pictures(file, monkeypatch, tmp_path):
    golden = load_golden(f"{file}.safetensors")
    unet = golden_unet(golden, tmp_path)
    positive, negative = golden_text(golden)
    for name, case in golden.about["samplers"].items():
        scheduler = build_scheduler(case["sampler"], case["steps"], prediction=FILES[file])
        seen: list[torch.Tensor] = []
        remember_steps(monkeypatch, scheduler, seen)
        if noise := recorded(golden, "noise", name):
            play_noise(monkeypatch, scheduler, noise)
        predict = guided(unet.predict, positive, negative if case["cfg_scale"] > 1 else None, case["cfg_scale"])
        found = draw(predict, golden.inputs["init_noise"], scheduler=scheduler, seeds=[0] if noise else None)
        rounding = golden.about["checks_max_rel_diff"].get(f"{name}/other_attention_path", 0.0)
        tolerance = max(PATH_TOLERANCE, 30 * rounding)
        steps = recorded(golden, "steps", name)
        assert len(steps) == len(seen)
        for step, expected in zip(seen, steps, strict=True):
            assert relative_error(step, expected) < tolerance, name
        assert relative_error(found, golden.outputs[f"final/{name}"]) < tolerance, name


def remember_steps(monkeypatch, scheduler, seen: list[torch.Tensor]) -> None:
    step = scheduler.step

    def remembering(*args, **kwargs):
        result = step(*args, **kwargs)
        seen.append(result[0])
        return result

    monkeypatch.setattr(scheduler, "step", remembering)


def golden_unet(golden: Golden, folder):
    sizes = golden.about["config"]
    keys = {"norm_num_groups": "norm_groups", "num_heads": "heads", "num_heads_per_level": "heads", "head_dim": "head_dim"}
    unet = {ours: sizes[theirs] for theirs, ours in keys.items() if theirs in sizes}
    if isinstance(unet.get("heads"), int):
        unet["heads"] = [unet["heads"]] * len(sizes["channel_mult"])
    save_safetensors(folder / "unet.safetensors", golden.weights, {"config": json.dumps({"unet": unet})})
    part = unet_part(open_weights(folder / "unet.safetensors", flag="--unet"), prefix=PREFIX, layout="original")
    model = build_unet(part.config)
    load_unet(model, part, device="cpu", dtype=torch.float32)
    return model


def golden_text(golden: Golden) -> tuple[TextInputs, TextInputs]:
    inputs = golden.inputs
    if "cond" in inputs:
        return TextInputs(inputs["cond"]), TextInputs(inputs["uncond"])
    pairs = []
    for start in ("", "uncond_"):
        context = torch.cat([inputs[f"{start}hidden1"], inputs[f"{start}hidden2"]], dim=-1)
        pairs.append(text_inputs(SdxlConditioning(context, inputs[f"{start}pooled"]), (64, 64)))
    return pairs[0], pairs[1]
