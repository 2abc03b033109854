"""Number formats of a run, and kernels that give the same bits each time."""

from __future__ import annotations

import os

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors
from library.training.models.precision import allow_fp16_gradients
from tests.tiny_runs import TinyRuns


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(2))


@pytest.fixture
def torch_as_it_was(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cuda = torch.backends.cuda
    kernels = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    cuda.enable_mem_efficient_sdp(kernels[0])
    cuda.enable_cudnn_sdp(kernels[1])


def test_deterministic_asks_for_kernels_of_a_fixed_order(runs, torch_as_it_was):
    runs.train("--max_train_steps=1", "--deterministic")
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()


def test_without_it_torch_is_left_alone(runs, torch_as_it_was):
    runs.train("--max_train_steps=1")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ("--mixed_precision=bf16", torch.float32),
        ("--mixed_precision=bf16 --full_bf16", torch.bfloat16),
        ("--mixed_precision=fp16 --full_fp16 --optimizer_args eps=1e-4", torch.float16),
    ],
)
def test_number_format_of_the_trained_weights(runs, flags, trained):
    trainer = runs.train("--max_train_steps=1", *flags.split())
    assert {parameter.dtype for parameter in trainer.network.parameters()} == {trained}
    saved = dict(read_tensors(read_header(runs.folder / "out" / "t.safetensors")))
    assert {tensor.dtype for tensor in saved.values()} == {trained}


def test_the_frozen_model_has_the_format_of_the_computation(runs):
    trainer = runs.train("--max_train_steps=1", "--mixed_precision=bf16")
    assert trainer.denoiser.blocks[0].mlp["layer1"].weight.dtype is torch.bfloat16


@pytest.mark.parametrize(("flags", "expected"), [((), torch.bfloat16), (("--no_half_vae",), torch.float32)])
def test_number_format_of_the_vae(runs, flags, expected):
    trainer = runs.train("--max_train_steps=1", "--mixed_precision=bf16", *flags)
    assert trainer.vae_dtype is expected


def test_fp16_gradients_may_be_unscaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    weight.grad = torch.full_like(weight, 8.0)
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
    allow_fp16_gradients(scaler)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    allow_fp16_gradients(scaler)
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [2.0, 2.0]
