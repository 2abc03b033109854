"""What the script refuses before a model is loaded, and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anima_minimal_inference import CHECKS
from library.errors import UserError
from library.files.safetensors_file import save_safetensors
from library.options.anima_inference import AnimaInferenceOptions
from library.options.command_line import read_options
from library.sampling.inference_checks import check_pictures, picture_shape


@pytest.fixture
def check(tiny_anima, tmp_path):
    def run(*flags: object, **models: object):
        files = {"dit": tiny_anima["dit"], "text_encoder": tiny_anima["qwen3"], "vae": tiny_anima["vae"], **models}
        named = [f"--{name}={path}" for name, path in files.items() if path is not None]
        argv = [*named, f"--save_path={tmp_path / 'out'}", *flags]
        if not any(str(flag).startswith(("--prompt", "--from_file", "--latent_path")) for flag in flags):
            argv.append("--prompt=a cat")
        return check_pictures(read_options(AnimaInferenceOptions, list(map(str, argv))), CHECKS)

    return run


@pytest.fixture
def refusal(check):
    def run(*flags: object, **models: object) -> str:
        with pytest.raises(UserError) as caught:
            check(*flags, **models)
        return "\n".join(caught.value.problems)

    return run


def test_what_is_right_is_taken(check):
    run = check()
    assert run.layouts.denoiser.config.width == 64 and run.prompts[0].prompt == "a cat" and run.warnings == ()


def test_an_attention_package_that_is_missing_is_told_with_all_else(refusal, monkeypatch):
    monkeypatch.setattr("library.training.run_rules.find_spec", lambda name: None)
    message = refusal("--attn_mode=sageattn", vae=None)
    assert "pip install sageattention" in message and "--vae is missing" in message


def test_model_files_are_told_by_this_scripts_flags(refusal, tmp_path):
    message = refusal(dit=tmp_path / "nowhere" / "dit.safetensors", text_encoder=None, vae=None)
    assert "--dit " in message and "--text_encoder is missing" in message and "--vae is missing" in message
    assert "--pretrained_model_name_or_path" not in message and "--qwen3" not in message


def test_models_of_another_kind(refusal, tiny_anima):
    assert "--dit" in refusal(dit=tiny_anima["vae"]) and "VAE" in refusal(dit=tiny_anima["vae"])
    assert "--text_encoder" in refusal(text_encoder=tiny_anima["dit"])


def test_the_vae_is_not_needed_for_latents(check):
    assert check("--output_type=latent", vae=None).layouts.vae is None


def test_lora_files_that_are_missing_or_something_else(refusal, tiny_anima, tmp_path):
    good = tmp_path / "my_lora.safetensors"
    pair = {"lora_down.weight": torch.zeros(2, 64), "lora_up.weight": torch.zeros(64, 2)}
    save_safetensors(good, {f"lora_unet_blocks_0_self_attn_q_proj.{part}": tensor for part, tensor in pair.items()})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(good.read_bytes()[:100])
    kron = tmp_path / "kron.safetensors"
    save_safetensors(kron, {"lora_unet_blocks_0_mlp_layer1.lokr_w1": torch.zeros(2, 2)})
    message = refusal("--lora_weight", tmp_path / "my_lora.safetensor", broken, tmp_path, tiny_anima["dit"], kron)
    assert "did you mean my_lora.safetensors" in message
    assert "broken.safetensors" in message and "truncated" in message
    assert f"--lora_weight {tmp_path} is a folder" in message
    assert "is an Anima DiT, not a LoRA file" in message
    assert "kron.safetensors is no plain LoRA" in message and "add --lycoris" in message


def pairs(*names: str, down=".lora_down.weight", up=".lora_up.weight") -> dict[str, torch.Tensor]:
    return {f"{name}{part}": torch.zeros(2, 2) for name in names for part in (down, up)}


def test_lora_files_of_other_models_and_torn_ones(refusal, check, tmp_path):
    """By their names, before torch is imported."""
    good, comfy = pairs("lora_unet_blocks_0_mlp_layer1"), pairs("diffusion_model.blocks.0.mlp.layer1", down=".lora_A.weight",
                                                                up=".lora_B.weight")  # fmt: skip
    files = {
        "sdxl": pairs("lora_unet_input_blocks_4_1_proj_in"),
        "unknown": pairs("lora_unet_thing_0_proj"),
        "torn": {**good, "lora_unet_blocks_1_mlp_layer1.lora_down.weight": torch.zeros(2, 2)},
        "torn_comfy": {**comfy, "diffusion_model.blocks.1.mlp.layer1.lora_A.weight": torch.zeros(2, 2)},
        "mixed": {**comfy, **pairs("diffusion_model.thing", down=".lora_A.weight", up=".lora_B.weight")},
        "homeless": {**good, **pairs("lora_unet_thing_0_proj")},
        "comfy": comfy,
    }
    for name, tensors in files.items():
        save_safetensors(tmp_path / f"{name}.safetensors", tensors)
    wrong = [tmp_path / f"{name}.safetensors" for name in ("sdxl", "unknown", "torn", "torn_comfy", "mixed")]
    with_flags = refusal("--lora_weight", *wrong).splitlines()
    assert [line.split(".safetensors", 1)[0] for line in with_flags] == [f"--lora_weight {str(path)[:-12]}" for path in wrong]
    sdxl, unknown, torn, torn_comfy, mixed = with_flags
    assert "LoRA for SDXL, not for Anima" in sdxl and "not for Anima" in unknown
    assert "only one of lora_down and lora_up (lora_unet_blocks_1_mlp_layer1)" in torn and "(lora_unet_blocks_1" in torn_comfy
    assert "2 of 4 tensors have names that no LoRA for Anima has: diffusion_model.thing" in mixed
    check("--lora_weight", tmp_path / "homeless.safetensors", tmp_path / "comfy.safetensors")


def test_lycoris_needs_its_package_and_files_for_this_model(refusal, tmp_path, monkeypatch):
    save_safetensors(tmp_path / "kron.safetensors", {"lora_unet_input_blocks_4_1_proj_in.lokr_w1": torch.zeros(2, 2)})
    monkeypatch.setattr("library.sampling.inference_checks.find_spec", lambda name: None)
    message = refusal("--lycoris", "--lora_weight", tmp_path / "kron.safetensors")
    assert "pip install lycoris-lora" in message and "is a file for SDXL, not for Anima" in message


def test_latents_that_are_none(refusal, check, tiny_anima, tmp_path):
    for name, tensors in (("other", {"weight": torch.zeros(2)}), ("four", {"latent": torch.zeros(4, 8, 8)})):
        save_safetensors(tmp_path / f"{name}.safetensors", tensors)
    paths = [tmp_path / f"{name}.safetensors" for name in ("other", "four", "missing")]
    message = refusal("--latent_path", *paths, tmp_path)
    assert "holds no tensor 'latent' (it has weight)" in message
    assert "holds latents of shape (4, 8, 8); this model's are (16, height / 8, width / 8)" in message
    assert "missing.safetensors" in message and f"--latent_path {tmp_path} is a folder" in message
    save_safetensors(tmp_path / "good.safetensors", {"latent": torch.zeros(1, 16, 8, 8)})
    run = check("--latent_path", tmp_path / "good.safetensors", dit=None, text_encoder=None)
    assert run.latents == (tmp_path / "good.safetensors",) and run.prompts == ()


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((16, 8, 12), (16, 8, 12)), ((1, 16, 8, 12), (16, 8, 12)), ((16, 1, 8, 12), (16, 8, 12)), ((1, 16, 1, 8, 12), (16, 8, 12)),
        ((2, 16, 8, 12), None), ((1, 16, 3, 8, 12), None), ((8, 12), None), ((16, 0, 4), None),
    ],
)  # fmt: skip
def test_shapes_of_one_picture(shape, found):
    assert picture_shape(shape) == found


def test_folders_that_cannot_be_written(refusal, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert f"--save_path {file} is a file: name a folder" in refusal(f"--save_path={file}")
    assert f"--save_path {file / 'inside'}" in refusal(f"--save_path={file / 'inside'}")
    if os.name == "posix" and os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "no permission" in refusal(f"--save_path={closed}")


def test_a_prompt_file_that_is_a_folder_or_missing(refusal, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    assert "--from_file" in refusal(f"--from_file={tmp_path / 'folder.txt'}")
    assert "--from_file" in refusal(f"--from_file={tmp_path / 'missing.txt'}")
    assert "ends in .txt, .toml or .json" in refusal(f"--from_file={tmp_path / 'prompts.doc'}")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    assert "holds no prompt" in refusal(f"--from_file={tmp_path / 'empty.txt'}")


def test_too_many_blocks_to_swap(refusal):
    assert "--blocks_to_swap" in refusal("--blocks_to_swap=1")  # of two blocks


def test_everything_is_told_at_once(refusal, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    message = refusal(
        f"--save_path={file}", "--from_file=nowhere.txt", "--lora_weight", "nothing.safetensors", vae="no.safetensors"
    )
    assert all(flag in message for flag in ("--save_path", "--from_file", "--lora_weight", "--vae"))


def test_the_checks_need_no_torch():
    code = (
        "import sys, library.sampling.inference_checks, library.options.anima_inference, networks.lora_names, networks.anima_layouts;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3]).returncode == 0
