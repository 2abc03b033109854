"""Rules that look at installed packages, the optimizer's class and the number of processes."""

import importlib.machinery

import pytest

from library.nn import attention_kernels
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training import run_rules

REQUIRED = """--pretrained_model_name_or_path=dit.safetensors --qwen3=qwen3.safetensors --vae=vae.safetensors
    --dataset_config=my.toml --output_dir=out --network_module=networks.lora_anima"""
FUSED = "--fused_backward_pass --max_grad_norm=0"


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(run_rules, "find_spec", lambda name: None)


def problems(arguments: str) -> list[str]:
    return list(run_rules.run_problems(read_options(AnimaTrainOptions, [*REQUIRED.split(), *arguments.split()])))


@pytest.mark.parametrize("arguments", ["", "--attn_mode=torch", "--sdpa", "--attn_mode=sdpa", FUSED])
def test_nothing_to_mend(arguments, nothing_installed):
    assert problems(arguments) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--xformers", "--attn_mode=xformers needs the package xformers, which is not installed: pip install xformers"),
        ("--attn_mode=xformers", "pip install xformers"),
        ("--attn_mode=flash", "--attn_mode=flash needs the package flash_attn, which is not installed: pip install flash-attn"),
    ],
)
def test_missing_attention_package(arguments, expected, nothing_installed):
    (problem,) = problems(arguments)
    assert expected in problem and "--attn_mode=torch" in problem


def test_sageattention_is_named_as_pip_names_it(nothing_installed):
    (problem,) = run_rules.attention_problems("sageattn")
    assert "pip install sageattention" in problem


def test_packages_are_those_of_the_kernels():
    assert run_rules.PACKAGES is attention_kernels.PACKAGES
    assert {mode: (package.top_module, package.name) for mode, package in run_rules.PACKAGES.items()} == {
        "xformers": ("xformers", "xformers"),
        "flash": ("flash_attn", "flash-attn"),
        "sageattn": ("sageattention", "sageattention"),
    }


def test_installed_attention_package(monkeypatch):
    installed = importlib.machinery.ModuleSpec("flash_attn", loader=None)
    monkeypatch.setattr(run_rules, "find_spec", lambda name: installed if name == "flash_attn" else None)
    assert problems("--attn_mode=flash") == []


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("Prodigy", "Prodigy, which finds one step size from the gradients of all weights"),
        ("DAdaptAdam", "DAdaptAdam, which finds one step size"),
        ("DAdaptation", "DAdaptAdamPreprint, which finds one step size"),
        ("AdamWScheduleFree", "AdamWScheduleFree, which averages all weights together"),
    ],
)
def test_fused_backward_pass_refuses_optimizers_that_look_at_all_weights(optimizer, expected):
    (problem,) = problems(f"{FUSED} --optimizer_type={optimizer}")
    assert expected in problem and "--fused_backward_pass" in problem


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "Lion", "torch.optim.SGD"])
def test_fused_backward_pass_takes_optimizers_that_look_at_one_weight(optimizer):
    assert problems(f"{FUSED} --optimizer_type={optimizer}") == []


def test_fused_backward_pass_works_with_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = problems(FUSED)
    assert "--fused_backward_pass works with one process, not 2" in problem
    assert problems("") == []


def test_a_wrong_optimizer_is_told_elsewhere():
    assert problems(f"{FUSED} --optimizer_type=AdamWx") == []
