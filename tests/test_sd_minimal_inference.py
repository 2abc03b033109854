"""The inference scripts of Stable Diffusion and SDXL in this process, on tiny models: what they draw, save, merge and refuse."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import sd_minimal_inference
import sdxl_minimal_inference
from library.errors import CheckpointError, NetworkError, OptionError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.options.command_line import read_options
from library.options.sd_inference import SdInferenceOptions, SdxlInferenceOptions
from library.sampling.inference import PictureMaker
from library.sampling.inference_checks import check_pictures
from library.sampling.picture_plan import SampleDefaults, sample_picture
from library.sampling.prompts import SamplePrompt
from library.sd import sampling as sd_sampling
from library.sd import text as sd_text
from library.sd.denoiser import build_unet, load_unet
from library.sd.layout import EPSILON, SD_SCALE, SDXL_SCALE, VELOCITY
from library.sdxl import sampling as sdxl_sampling
from library.sdxl import text as sdxl_text
from networks import lora

KINDS = ("sd1", "sd2", "sdxl")
NAME = re.compile(r"image_\d{8}-\d{6}_(\d{3})(-\d+)?(_latent)?\.(png|safetensors)")
DRAWING = ("--image_size", 64, 64, "--infer_steps=3", "--seed=7", "--device=cpu")


@pytest.fixture
def maker(tiny_sd, tmp_path):
    """``maker("sd1", "--prompt=a cat", ...)``: what the script makes of this command line, not started yet."""

    def make(kind: str, *flags: object, model: str | None = None) -> PictureMaker:
        script = sdxl_minimal_inference if kind == "sdxl" else sd_minimal_inference
        options = SdxlInferenceOptions if kind == "sdxl" else SdInferenceOptions
        argv = [f"--ckpt_path={tiny_sd[model or kind]}", f"--output_dir={tmp_path / 'out'}", *DRAWING]
        argv += [*(["--v2"] if kind == "sd2" else []), *flags]
        run = check_pictures(read_options(options, list(map(str, argv))), script.CHECKS)
        return (script.SdxlPictureMaker if kind == "sdxl" else script.SdPictureMaker)(run)

    return make


@pytest.fixture
def draw(maker, tmp_path):
    """Runs the command line; -> the files that it has written, by their whole name."""

    def run(kind: str, *flags: object, **changes) -> dict[str, Path]:
        before = set((tmp_path / "out").glob("*"))
        maker(kind, *flags, **changes).make()
        return {path.name: path for path in sorted(set((tmp_path / "out").glob("*")) - before)}

    return run


@pytest.fixture(scope="module")
def drawn_before() -> dict[tuple, torch.Tensor]:
    return {}


@pytest.fixture
def latents(draw, drawn_before):
    """``latents("sd1", ...)``: (4, h, w) of the only picture; drawn once for flags that name no file of a test."""

    def run(kind: str, *flags: object, **changes) -> torch.Tensor:
        asked = (kind, *map(str, flags), *sorted(changes.items()))
        if asked not in drawn_before:
            (path,) = draw(kind, "--output_type=latent", *flags, **changes).values()
            found = dict(read_tensors(read_header(path)))["latent"]
            if any("/" in word for word in asked if isinstance(word, str)):
                return found
            drawn_before[asked] = found
        return drawn_before[asked]

    return run


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)


# ---------------------------------------------------------------- as in training


@pytest.mark.parametrize(("kind", "precision"), [("sd1", "no"), ("sd2", "no"), ("sdxl", "no"), ("sdxl", "bf16")])
def test_latents_are_those_of_training_samples(maker, latents, kind, precision):
    flags = ["--prompt=a (red:1.2) cat", "--negative_prompt=rain", "--sampler=euler_a", f"--mixed_precision={precision}",
             "--image_size", 104, 64, "--guidance_scale=4"]  # fmt: skip
    drawn = latents(kind, *flags)
    trained = sample_of_training(maker(kind, *flags).run.layouts, kind, precision)
    assert trained.shape == (1, 4, 13, 8) and trained.isfinite().all()
    assert torch.equal(drawn, trained[0])


@torch.no_grad()
def sample_of_training(layouts, kind: str, precision: str) -> torch.Tensor:
    """By the functions that the trainers' hooks call."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    unet = build_unet(layouts.denoiser.config)
    load_unet(unet, layouts.denoiser, device="cpu", dtype=dtype)
    is_xl = kind == "sdxl"
    encoder = sdxl_text.build_text_encoder(layouts.text) if is_xl else sd_text.build_text_encoder(layouts.text, v2=kind == "sd2")
    sd_text.load_text_encoder(encoder, layouts.text, device="cpu", dtype=dtype)
    positive, negative = (encoder.encode_prompts([text]) for text in ("a (red:1.2) cat", "rain"))
    prompt = SamplePrompt(prompt="", index=0, width=70, height=104, sample_steps=3, scale=4.0)
    picture = sample_picture(prompt, 7, sampler="euler_a", defaults=SampleDefaults())
    assert (picture.width, picture.height) == (64, 104)
    with torch.autocast("cpu", dtype=dtype, enabled=precision != "no"):
        if is_xl:
            inputs = sdxl_sampling.prompt_inputs(positive, negative, (picture.width, picture.height))
        else:
            inputs = sd_sampling.prompt_inputs(positive, negative)
        return sd_sampling.draw_latents(unet, [picture], *inputs, prediction=EPSILON, device="cpu")


# ---------------------------------------------------------------- what is drawn


def test_the_reference_draws_a_cat_where_nothing_is_asked_for(draw):
    (path,) = draw("sdxl").values()
    with Image.open(path) as picture:
        text = picture.text["parameters"]
        assert picture.size == (64, 64)
    assert text == ("A photo of a cat\nSteps: 3, Sampler: euler, CFG scale: 7, Seed: 7, Size: 64x64, "
                    "Model: sdxl_tiny.safetensors, Precision: float32")  # fmt: skip
    assert NAME.fullmatch(path.name)[1] == "000"


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_a_model_draws_the_same(latents, tiny_sd, kind):
    plain = latents(kind)
    for other in (f"{kind}_folder", *(["sd1_ckpt"] if kind == "sd1" else [])):
        torch.testing.assert_close(latents(kind, model=other), plain, rtol=1e-3, atol=1e-3)


def test_pictures_of_a_batch_are_those_of_their_seeds(draw):
    together = list(draw("sd1", "--images_per_prompt=3", "--batch_size=2", "--sampler=dpm_2_a").values())
    (alone,) = draw("sd1", "--seed=9", "--sampler=dpm_2_a").values()
    assert [NAME.fullmatch(path.name)[1] for path in together] == ["000", "001", "002"]
    assert (pixels(together[2]).int() - pixels(alone).int()).abs().max() <= 1
    assert not torch.equal(pixels(together[0]), pixels(alone))


@pytest.mark.parametrize("flags", [
    ("--prompt=a dog",), ("--negative_prompt=rain",), ("--guidance_scale=2",), ("--sampler=ddim",), ("--infer_steps=4",),
    ("--seed=8",), ("--clip_skip=2",), ("--v_parameterization",), ("--prompt=A photo of a (cat:1.4)",),
])  # fmt: skip
def test_settings_change_the_picture(latents, flags):
    assert not torch.allclose(latents("sd1", *flags), latents("sd1"), atol=1e-3)


def test_the_second_prompt_goes_to_the_second_encoder_alone(latents, maker):
    first, second = "a red house", "fog"
    assert torch.equal(latents("sdxl", f"--prompt={first}", f"--prompt2={first}"), latents("sdxl", f"--prompt={first}"))
    assert not torch.equal(latents("sdxl", f"--prompt={first}", f"--prompt2={second}"), latents("sdxl", f"--prompt={first}"))
    prepared = maker("sdxl", f"--prompt={first}")
    with torch.no_grad():
        prepared.build()
        prepared.load_text_encoder()
        both, one, other = (prepared.encode(texts) for texts in ((first, second), (first, None), (second, None)))
    width = prepared.run.layouts.text[0].config.width
    assert torch.equal(both.states[..., :width], one.states[..., :width])
    assert torch.equal(both.states[..., width:], other.states[..., width:]) and torch.equal(both.pooled, other.pooled)


def test_lengths_of_prompts(latents):
    long = " ".join(["a red house by the sea"] * 20)
    other = f"{long} at night"
    assert not torch.equal(latents("sd1", f"--prompt={long}"), latents("sd1", f"--prompt={other}"))  # up to 225 tokens count
    assert torch.equal(latents("sdxl", f"--prompt={long}"), latents("sdxl", f"--prompt={other}"))  # 75
    wide = "--max_token_length=225"
    assert not torch.equal(latents("sdxl", wide, f"--prompt={long}"), latents("sdxl", wide, f"--prompt={other}"))


def test_prompts_that_are_cut_are_told(maker, caplog):
    long = "dog " * 100
    made = maker("sd1")
    made.build()
    made.load_text_encoder()
    made.encode_texts([long])  # two of three rows
    assert "tokens" not in caplog.text
    made.encode_texts([long * 3])
    assert "the prompt 'dog dog dog dog dog dog ...' has 300 tokens, of which CLIP-L takes 225: cut off is 'dog" in caplog.text
    caplog.clear()
    made = maker("sdxl", "--max_token_length=150")
    made.build()
    made.load_text_encoder()
    made.encode_texts([("a cat", None), ("a cat", "fog " * 151)])
    (line,) = caplog.messages[-1:]
    assert line == "warning: the prompt 'fog fog fog fog fog fog ...' has 151 tokens, of which CLIP-L takes 150: cut off is 'fog'"


def test_another_vae_decodes_with_the_scale_of_the_model(draw, tiny_sd, maker):
    (own,), (other,) = draw("sd1").values(), draw("sd1", f"--vae={tiny_sd['vae']}").values()
    assert not torch.equal(pixels(own), pixels(other))
    for kind, scale in (("sd1", SD_SCALE), ("sdxl", SDXL_SCALE)):
        assert maker(kind).load_vae().scale == scale


def test_sdxl_in_float16_decodes_in_float32_unless_a_vae_is_named(maker, tiny_sd):
    half = "--mixed_precision=fp16"
    assert maker("sdxl", half).vae_dtype == torch.float32
    assert maker("sdxl", half, f"--vae={tiny_sd['vae']}").vae_dtype == torch.float16
    assert maker("sdxl", half, f"--vae={tiny_sd['vae']}", "--no_half_vae").vae_dtype == torch.float32
    assert maker("sd1", half).vae_dtype == torch.float16


def test_saved_latents_become_the_picture(draw, tmp_path):
    drawn = draw("sd1", "--output_type=latent_images")
    (picture,), (saved,) = ([drawn[name] for name in drawn if name.endswith(end)] for end in (".png", "_latent.safetensors"))
    (again,) = draw("sd1", "--latent_path", saved).values()
    assert torch.equal(pixels(again), pixels(picture))


def test_a_model_that_says_it_predicts_velocity_is_believed(maker, tiny_sd, tmp_path):
    from tools.tiny_sd import make_sd

    path = make_sd(tmp_path, "sd2", v_prediction=True)["file"]
    tiny_sd_with_marks = {**tiny_sd, "marked": path}
    plain = maker("sd2")
    assert plain.prediction == EPSILON and maker("sd2", "--v_parameterization").prediction == VELOCITY
    options = read_options(
        SdInferenceOptions, [f"--ckpt_path={tiny_sd_with_marks['marked']}", "--v2", f"--output_dir={tmp_path}"]
    )
    run = check_pictures(options, sd_minimal_inference.CHECKS)
    assert sd_minimal_inference.SdPictureMaker(run).prediction == VELOCITY


# ---------------------------------------------------------------- LoRA


@pytest.fixture
def lora_file(maker, tmp_path):
    """``lora_file("sd1", "name.safetensors")``: a LoRA with an effect on the U-Net and the text encoders."""

    def write(kind: str, name: str = "lora.safetensors", seed: int = 0) -> Path:
        prepared = maker(kind)
        prepared.build()
        encoders, unet = sd_text.text_models(prepared.text_encoder), prepared.unet
        network = lora.create_network(1.0, 2, 2, None, encoders, unet)
        network.apply_to(encoders, unet, True, True)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        network.save_weights(tmp_path / name, torch.float32, {})
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_lora_acts_on_all_models(latents, lora_file, kind, caplog):
    file = lora_file(kind)
    caplog.set_level("INFO")
    plain, whole = latents(kind), latents(kind, "--lora_weights", file)
    assert "LoRA modules into the U-Net (lora.safetensors x 1)" in caplog.text and "into the text encoders" in caplog.text
    assert not torch.allclose(whole, plain, atol=1e-3)


def test_strengths_and_patterns_of_a_merged_lora(latents, lora_file):
    kind, file = "sd1", lora_file("sd1")
    plain, half, whole = (latents(kind, "--lora_weights", f"{file};{strength}") for strength in (0, 0.5, 1))
    assert torch.equal(plain, latents(kind))
    assert not torch.allclose(half, plain, atol=1e-3) and not torch.allclose(half, whole, atol=1e-3)
    only = latents(kind, "--lora_weights", file, "--include_patterns", "lora_te")
    rest = latents(kind, "--lora_weights", file, "--exclude_patterns", "lora_te")
    assert not torch.allclose(only, rest, atol=1e-3) and not torch.allclose(only, plain, atol=1e-3)


def test_two_files_add_up(latents, lora_file):
    first, second = lora_file("sd1", "a.safetensors", 1), lora_file("sd1", "b.safetensors", 2)
    both = latents("sd1", "--lora_weights", f"{first};0.3", second)
    other = latents("sd1", "--lora_weights", second, f"{first};0.3")
    torch.testing.assert_close(both, other, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both, latents("sd1", "--lora_weights", second), atol=1e-3)


def test_the_lora_of_another_model_is_named(maker, lora_file, draw):
    file = lora_file("sdxl")
    with pytest.raises(CheckpointError, match="--lora_weights .*SDXL"):
        maker("sd1", "--lora_weights", file)
    with pytest.raises(CheckpointError, match="--lora_weights"):
        maker("sdxl", "--lora_weights", lora_file("sd1", "sd1.safetensors"))
    with pytest.raises(NetworkError, match="--include_patterns nowhere fits no module"):
        draw("sdxl", "--lora_weights", file, "--include_patterns", "nowhere")


# ---------------------------------------------------------------- mistakes


def problems(maker, kind: str, *flags: object, **changes) -> str:
    with pytest.raises((OptionError, CheckpointError)) as caught:
        maker(kind, *flags, **changes)
    return "\n".join(caught.value.problems)


def test_mistakes_are_told_together(maker, tmp_path):
    text = problems(maker, "sd1", "--lora_weights", tmp_path / "no.safetensors", "--vae=missing.safetensors")
    assert "--lora_weights" in text and "no.safetensors" in text and "--vae missing.safetensors does not exist" in text


@pytest.mark.parametrize(("kind", "model", "words"), [
    ("sd1", "sd2", "add --v2"), ("sd2", "sd1", "drop --v2"), ("sd1", "sdxl", "SDXL"), ("sdxl", "sd1", "Stable Diffusion 1.x"),
])  # fmt: skip
def test_the_wrong_model_is_named_with_this_scripts_flag(maker, kind, model, words):
    text = problems(maker, kind, model=model)
    assert words in text and text.startswith("--ckpt_path") and "--pretrained" not in text


@pytest.mark.parametrize(("flags", "words"), [
    (["--lora_weights", "a.safetensors;big"], "'a.safetensors;big': write FILE;STRENGTH, with a number behind the semicolon"),
    (["--lora_weights", ";1"], "';1' names no file"),
    (["--prompt=a", "--interactive"], "--prompt and --interactive are different sources of prompts"),
    (["--sampler=unipc"], "--sampler"),
    (["--include_patterns", "("], "--include_patterns needs --lora_weights"),
    (["--clip_skip=0"], "--clip_skip is 0"),
    (["--clip_skip=9"], "clip_skip"),
    (["--image_size", 32, 64], "--image_size is 32 64"),
])  # fmt: skip
def test_flags_that_cannot_be(maker, flags, words):
    assert words in problems(maker, "sd1", *flags)


def test_a_prompt_file_is_checked(maker, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --ss er_sde\na dog --ss euler_b\n")
    text = problems(maker, "sd1", f"--from_file={path}")
    assert (
        "prompt 1: --ss er_sde is no sampler here" in text and "prompt 2: --ss euler_b" in text and "did you mean euler_a" in text
    )
    path.write_text("a cat --fs 3 --p2 a dog\n")
    (warning,) = maker("sd1", f"--from_file={path}").run.warnings
    assert "does not use --fs (flow_shift), --p2 (prompt2) of a prompt" in warning
    (warning,) = maker("sdxl", f"--from_file={path}").run.warnings
    assert "--p2" not in warning


# ---------------------------------------------------------------- the console


def test_interactive_lines(maker, draw, monkeypatch, capsys):
    lines = "a cat --d 3 --p2 a dog\nhelp\na cat --x 1\n\na cat --d 3 --ss ddim --w 70\nquit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    files = list(draw("sdxl", "--interactive").values())
    shown = capsys.readouterr()
    assert [NAME.fullmatch(path.name)[1] for path in files] == ["000", "001"]
    assert "--p2 TEXT" in shown.out and "dpm_2_a" in shown.out and "--fs" not in shown.out and "--x is not a flag" in shown.err
    (alone,) = draw("sdxl", "--prompt=a cat", "--prompt2=a dog", "--seed=3").values()
    assert torch.equal(pixels(files[0]), pixels(alone))


def test_latents_of_another_model_are_refused(maker, tmp_path):
    path = tmp_path / "x_latent.safetensors"
    save_safetensors(path, {"latent": torch.zeros(16, 8, 8)})
    assert "this model's are (4, height / 8, width / 8)" in problems(maker, "sd1", "--latent_path", path)
