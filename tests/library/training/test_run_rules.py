"""Rules that look at installed packages, the optimizer's class and the number of processes."""

import importlib.machinery

import pytest

from library.nn import attention_kernels
from library.options.anima import AnimaTrainOptions
from library.options.attention import AttentionOptions
from library.options.command_line import read_options
from library.options.lumina import LuminaAttentionOptions
from library.options.sd import SdxlTrainOptions
from library.training import run_rules

REQUIRED = """--pretrained_model_name_or_path=dit.safetensors --qwen3=qwen3.safetensors --vae=vae.safetensors
    --dataset_config=my.toml --output_dir=out --network_module=networks.lora_anima"""
RATE = "--learning_rate is 2e-06, as in kohya-ss/sd-scripts where none is given: "
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
        ("--attn_mode=xformers", "pip install xformers"),
        ("--attn_mode=flash", "--attn_mode=flash needs the package flash_attn, which is not installed: pip install flash-attn"),
    ],
)
def test_missing_attention_package(arguments, expected, nothing_installed):
    (problem,) = problems(arguments)
    assert expected in problem and "--attn_mode=torch" in problem


def test_the_older_flag_is_named_as_it_was_typed(nothing_installed):
    (problem,) = problems("--xformers")
    assert problem == (
        "--xformers needs the package xformers, which is not installed: drop it (PyTorch's own attention, the default, takes as "
        "little memory), or pip install xformers"
    )


@pytest.mark.parametrize(("flags", "cure"), [
    ({"use_flash_attn": True}, "or drop it: PyTorch's own attention, the default, needs nothing"),
    ({"attn_mode": "flash"}, "or give --attn_mode=torch, which needs nothing"),
])  # fmt: skip
def test_the_cure_does_not_contradict_the_flag(flags, cure, nothing_installed):
    (problem,) = run_rules.attention_problems(LuminaAttentionOptions(**flags))
    assert "needs the package flash_attn, which is not installed: pip install flash-attn, " in problem and problem.endswith(cure)


def test_sageattention_is_named_as_pip_names_it(nothing_installed):
    (problem,) = run_rules.attention_problems(AttentionOptions(attn_mode="sageattn"))
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


DEEPSPEED_INSTALLED = importlib.machinery.ModuleSpec("deepspeed", loader=None)


@pytest.fixture
def deepspeed_installed(monkeypatch):
    """As if; ``deepspeed_installed("0.18.1")`` says of which version."""
    found = run_rules.find_spec
    monkeypatch.setattr(run_rules, "find_spec", lambda name: DEEPSPEED_INSTALLED if name == "deepspeed" else found(name))
    monkeypatch.setattr(run_rules.sys, "platform", "linux")

    def installed(version: str) -> None:
        monkeypatch.setattr(run_rules, "version", lambda package: version)

    installed("0.19.8")
    return installed


def test_deepspeed_is_missing(nothing_installed, monkeypatch):
    monkeypatch.setattr(run_rules.sys, "platform", "linux")
    (problem,) = problems("--deepspeed")
    assert problem.startswith("--deepspeed needs the package deepspeed, which is not installed: pip install deepspeed; ")
    assert "accelerate launch --multi_gpu trains on several GPUs" in problem


def test_deepspeed_on_windows(monkeypatch):
    monkeypatch.setattr(run_rules.sys, "platform", "win32")
    (problem,) = problems("--deepspeed")
    assert "does not train on Windows: drop the flag; without --deepspeed, accelerate launch --multi_gpu" in problem


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8+abc", "0.20.1", "1.0"])
def test_deepspeed_that_is_new_enough(deepspeed_installed, version):
    deepspeed_installed(version)
    assert problems("--deepspeed") == []


@pytest.mark.parametrize("version", ["0.9.5", "0.18.9"])
def test_deepspeed_that_is_too_old(deepspeed_installed, version):
    deepspeed_installed(version)
    (problem,) = problems("--deepspeed")
    assert f"needs deepspeed 0.19 or newer, and {version} is installed: pip install --upgrade deepspeed" in problem


def test_what_contradicts_deepspeed_is_told_together(deepspeed_installed, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    flags = f"--deepspeed {FUSED} --full_bf16 --mixed_precision=bf16 --optimizer_type=Adafactor"
    fused, precision, optimizer, file = problems(flags)
    assert fused.startswith("--fused_backward_pass cannot be used with --deepspeed")
    assert precision.startswith("--full_bf16 cannot be used with --deepspeed")
    assert optimizer.startswith("--deepspeed cannot share transformers.optimization.Adafactor among processes")
    assert "ds.json, which is not read" in file
    (precision,) = [p for p in problems("--deepspeed --full_fp16 --mixed_precision=fp16") if "ds.json" not in p]
    assert precision.startswith("--full_fp16 cannot be used")


@pytest.mark.parametrize("optimizer", ["Prodigy", "AdamWScheduleFree", "Adagrad", "Muon", "some.Optimizer"])
def test_deepspeed_shares_no_optimizer_that_looks_at_more_than_a_number(deepspeed_installed, optimizer):
    (problem,) = problems(f"--deepspeed --optimizer_type={optimizer}")
    assert "cannot share" in problem and "--zero_stage=0, which shares nothing" in problem
    assert problems(f"--deepspeed --zero_stage=0 --optimizer_type={optimizer}") == []


@pytest.mark.parametrize("optimizer", ["", "AdamW", "Lion", "torch.optim.SGD", "AdamW8bit", "PagedLion8bit", "SGDNesterov"])
def test_deepspeed_shares_optimizers_that_look_at_one_number(deepspeed_installed, optimizer):
    assert problems(f"--deepspeed --optimizer_type={optimizer}") == []


def test_deepspeed_moves_no_optimizer_of_the_gpu(deepspeed_installed):
    (problem,) = problems("--deepspeed --offload_optimizer_device=cpu --optimizer_type=AdamW8bit")
    assert problem.startswith("--offload_optimizer_device: bitsandbytes.optim.AdamW8bit works on the GPU only")
    assert problems("--deepspeed --offload_optimizer_device=cpu --optimizer_type=AdamW") == []


def test_a_launcher_configured_for_deepspeed_wants_the_flag(deepspeed_installed, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (problem,) = problems("")
    assert problem.startswith("accelerate is configured for DeepSpeed: add --deepspeed")
    assert problems("--deepspeed") == []


def warnings(arguments: str, *, total_steps: int = 100) -> list[str]:
    options = read_options(AnimaTrainOptions, [*REQUIRED.split(), *arguments.split()])
    return list(run_rules.run_warnings(options, total_steps=total_steps))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", "the denoiser and the text encoder are"),
        ("--cache_text_encoder_outputs", "the denoiser is"),
        ("--unet_lr=1e-4", "the text encoder is"),
        ("--text_encoder_lr 1e-5", "the denoiser is"),
        ("--optimizer_type=AdamWScheduleFree", "the denoiser and the text encoder are"),
    ],
)
def test_a_rate_that_is_not_given_is_told(arguments, parts):
    (warning,) = warnings(arguments)
    assert warning.startswith(RATE) and f": {parts} trained at it" in warning and warning.endswith("takes 1e-4")


@pytest.mark.parametrize(
    "arguments",
    ["--learning_rate=1e-4", "--unet_lr=1e-4 --text_encoder_lr 1e-5", "--unet_lr=1e-4 --network_train_unet_only",
     "--optimizer_type=Prodigy", "--optimizer_type=Adafactor"],
)  # fmt: skip
def test_rates_that_are_given_or_found_are_not_told(arguments):
    assert warnings(arguments) == []


@pytest.mark.parametrize(("warmup", "told"), [("99", False), ("100", True), ("500", True), ("0.5", False), ("100%", True)])
def test_a_warm_up_that_never_ends(warmup, told):
    found = warnings(f"--learning_rate=1e-4 --lr_scheduler=cosine --lr_warmup_steps={warmup}")
    assert len(found) == told
    assert all("and the run has 100 steps: the learning rate rises to the very end" in warning for warning in found)


def test_two_text_encoders_are_counted_as_such():
    required = "--pretrained_model_name_or_path=x --dataset_config=x --output_dir=x --network_module=networks.lora --unet_lr=1e-4"
    (warning,) = run_rules.run_warnings(read_options(SdxlTrainOptions, required.split()), total_steps=9)
    assert "none is given: the text encoders are trained at it" in warning
