"""What people get wrong with the models of Stable Diffusion 3 and Lumina Image 2.0: one message with flag, finding and cure,
before a model is loaded. Most of it in this process, which is quicker; some commands as real processes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from library.errors import UserError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from tests.e2e.kinds import KINDS, model_flags, over, run_flags, write_dataset
from tests.trainer_runs import Runs
from tools import tiny_lumina as tiny_maker

MODEL = "--pretrained_model_name_or_path"
PREVIEW = "--sample_every_n_steps=1"


@pytest.fixture
def models(tiny_sd3, tiny_lumina, tiny_sd, tiny_anima) -> dict[str, object]:
    sd3 = {name: tiny_sd3[name] for name in ("sd3", "clip_l", "clip_g", "t5xxl")}
    return {**tiny_lumina, **sd3, "sd3_vae": tiny_sd3["vae"], "sdxl": tiny_sd["sdxl"], "sd_vae": tiny_sd["vae"],
            "anima": tiny_anima["dit"], "qwen3": tiny_anima["qwen3"]}  # fmt: skip


@pytest.fixture
def told(request, picture_folder, tmp_path) -> Callable[..., list[str]]:
    """``told("sd3", "--flag", left_out=[...])``: the problems of a run that a good set-up and these flags make."""

    def run(kind: str, *flags: object, left_out: tuple[str, ...] = (), start: str = "checked") -> list[str]:
        models = request.getfixturevalue(KINDS[kind].fixture)
        runs = Runs(kind, tmp_path, models, tmp_path / "pictures")
        runs.left_out = left_out
        with pytest.raises(UserError) as caught:
            getattr(runs, start)("--max_train_steps=1", *flags)
        return list(caught.value.problems)

    picture_folder(1)
    return run


# ---------------------------------------------------------------- model files


@pytest.mark.parametrize(
    ("kind", "flag", "given", "named"),
    [
        ("sd3", MODEL, "clip_l", "is a CLIP text encoder, not an SD3 or SD3.5 checkpoint"),
        ("sd3", MODEL, "t5xxl", "is a T5 text encoder"),
        ("sd3", MODEL, "sd3_vae", "is a Stable Diffusion VAE"),
        ("sd3", MODEL, "sdxl", "is an SDXL checkpoint (sdxl_train_network.py trains those)"),
        ("sd3", MODEL, "dit", "is a Lumina Image 2.0 checkpoint (lumina_train_network.py trains those)"),
        ("sd3", MODEL, "anima", "is an Anima DiT (anima_train_network.py trains those)"),
        ("sd3", "--clip_l", "t5xxl", "is a T5 text encoder, not a CLIP-L text encoder; give --clip_l the file of that"),
        ("sd3", "--clip_g", "sd3", "is an SD3 or SD3.5 checkpoint"),
        ("sd3", "--t5xxl", "clip_g", "is a CLIP text encoder, not a T5-XXL text encoder"),
        ("sd3", "--t5xxl", "gemma2", "is a Gemma 2 text encoder"),
        ("sd3", "--vae", "sd_vae", "is a VAE of 4 latent channels (it is a Stable Diffusion VAE); SD3 and Lumina need one of 16"),
        ("sd3", "--vae", "sdxl", "is a VAE of 4 latent channels"),
        ("sd3", "--vae", "whole", "is a Lumina Image 2.0 checkpoint (lumina_train_network.py trains those), whose VAE makes"),
        ("sd3", "--vae", "clip_l", "holds no VAE of SD3, FLUX or Lumina: it is a CLIP text encoder"),
        ("lumina", MODEL, "sd3", "is an SD3 or SD3.5 checkpoint (sd3_train_network.py trains those)"),
        ("lumina", MODEL, "gemma2", "is a Gemma 2 text encoder: give the Lumina Image 2.0 model"),
        ("lumina", MODEL, "ae", "is a Stable Diffusion VAE: give the Lumina Image 2.0 model"),
        ("lumina", "--gemma2", "qwen3", "is a Qwen3 text encoder: give Gemma 2 2B"),
        ("lumina", "--gemma2", "dit", "is a Lumina Image 2.0 checkpoint"),
        ("lumina", "--ae", "sd_vae", "is a VAE of 4 latent channels"),
        ("lumina", "--ae", "sd3", "is an SD3 or SD3.5 checkpoint (sd3_train_network.py trains those), whose VAE makes latents"),
        ("lumina", "--ae", "gemma2", "holds no VAE of SD3, FLUX or Lumina: it is a Gemma 2 text encoder"),
    ],
)
def test_a_model_file_in_anothers_flag(told, models, kind, flag, given, named):
    (problem,) = told(kind, f"{flag}={models[given]}")
    assert problem.startswith(f"{flag} {models[given]} {named}"), problem


def test_parts_that_are_missing_are_all_told(told):
    assert [text.split()[0] for text in told("sd3", left_out=("--clip_l", "--clip_g"))] == ["--clip_l", "--clip_g"]
    problems = told("lumina", left_out=("--gemma2", "--ae"))
    assert [text.split()[0] for text in problems] == ["--gemma2", "--ae"] and all("give the file" in text for text in problems)
    (problem,) = told("sd3", "--network_args", "train_t5xxl=true", left_out=("--t5xxl",))
    assert problem.startswith("--network_args train_t5xxl=true needs a T5, and there is none: give --t5xxl the file")


def test_gemma_of_another_size(told, tiny_lumina, tmp_path):
    """As Gemma 2 9B: the same names, wider."""
    wide = replace(tiny_maker.sizes("tiny").gemma2, width=64)
    tensors = {f"model.{name}": tensor for name, tensor in tiny_maker.gemma_weights(wide, seed=0).items()}
    path = tmp_path / "gemma_9b.safetensors"
    header = read_header(tiny_lumina["gemma2"])
    save_safetensors(path, {**dict(read_tensors(header)), **tensors}, dict(header.metadata))
    (problem,) = told("lumina", f"--gemma2={path}")
    assert str(path) in problem and "64" in problem and "32" in problem and "Gemma 2 2B" in problem, problem


@pytest.mark.parametrize(("kind", "flag", "name"), [("sd3", "--t5xxl", "t5xxl"), ("lumina", "--gemma2", "gemma2")])
def test_files_that_are_torn_or_folders(told, models, tmp_path, kind, flag, name):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(models[name].read_bytes()[:-1000])
    (problem,) = told(kind, f"{flag}={cut}")
    assert f"{cut} is truncated" in problem and "copy or download it again" in problem
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (MODEL, flag):
        (problem,) = told(kind, f"{place}={folder}")
        assert problem.startswith(f"{place} {folder}") and "folder" in problem.replace(str(folder), ""), problem


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("lumina", ("embedder_dims=[4,4]",), "embedder_dims=[4,4] cannot be used: it has 2 values: give 3 ranks"),
        ("sd3", ("emb_dims=[4,4]",), "emb_dims=[4,4] cannot be used: it has 2 values: give 6 ranks"),
        ("lumina", ("train_block_indices=0-9",), "train_block_indices"),
        ("sd3", ("train_block_indices=7",), "train_block_indices"),
        ("sd3", ("x_attn_dmi=4",), "did you mean x_attn_dim"),
        ("lumina", ("train_blocks=transfromer",), "did you mean transformer"),
    ],
)
def test_network_arguments(told, kind, arguments, said):
    """Some need the model's sizes, which a dry run reads, too."""
    (problem,) = told(kind, "--network_train_unet_only", "--dry_run", "--network_args", *arguments, start="train")
    assert "--network_args" in problem and said in problem, problem


def test_a_system_prompt_that_leaves_no_room(told):
    (problem,) = told("lumina", "--system_prompt=" + "an assistant " * 200)
    assert re.match(r"--system_prompt has \d+ tokens .* takes 256 .* shorten it, or raise --gemma2_max_token_length", problem)


@pytest.mark.parametrize("side", ["--w 1024 --h 64", "--w 64 --h 1024", "--w 1024"])
def test_pictures_larger_than_the_table_of_positions(told, tmp_path, side):
    (tmp_path / "prompts.txt").write_text(f"fine --w 64 --h 64\na cat {side}\n")
    (problem,) = told("sd3", f"--sample_prompts={tmp_path / 'prompts.txt'}", PREVIEW)
    assert "pixels are more than 768 on a side" in problem and "--w and --h of a prompt" in problem


# ---------------------------------------------------------------- as a user sees it

COMMANDS = {
    "sd3": ("--v2 --t5xxl_device=gpu --clip_g_dropout_rate=2 --t5xxl_dtype=int8",
            ("--v2 cannot be used", "--t5xxl_device is 'gpu': give", "--clip_g_dropout_rate is 2.0: give", "--t5xxl_dtype is")),
    "lumina": ("--use_sage_attn --v2 --gemma2_max_token_length=0 --vae=some.safetensors",
               ("--use_sage_attn cannot train: the kernel has no backward pass; drop", "--v2 cannot be used",
                "--gemma2_max_token_length is 0: give 1 to 4096", "keep --ae")),
}  # fmt: skip


@over("sd3", "lumina")
def test_mistakes_are_one_report_of_the_script(run_script, kind, request, picture_folder, tmp_path):
    """Of the flags first; where they are right, of files, images and prompts together."""
    models = request.getfixturevalue(KINDS[kind].fixture)
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(1), kind)
    base = [*model_flags(kind, models), *run_flags(kind, tmp_path / "out", dataset), "--max_train_steps=1"]
    flags, expected = COMMANDS[kind]
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x00" * 7)
    encoder = {"sd3": "--clip_l", "lumina": "--gemma2"}[kind]
    files = [f"{MODEL}={tmp_path / 'nowhere.safetensors'}", f"{encoder}={torn}", "--sample_prompts=nope.txt", PREVIEW]
    for more, said in ((flags.split(), expected), (files, ("nowhere.safetensors", "torn.safetensors", "nope.txt"))):
        done = run_script(KINDS[kind].script, *base, *more, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (done.stdout, done.stderr)
        assert done.stderr.count("error") == 1 and all(text in done.stderr for text in said), done.stderr
