"""The inference scripts of Anima, SD3 and Lumina Image 2.0 in this process, on tiny models: what they draw as training does, and
for the last two, which have the same options, what they draw, save, add and refuse."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import anima_minimal_inference
import lumina_minimal_inference
import sd3_minimal_inference
from anima_train_network import AnimaNetworkTrainer
from library.anima.architecture import ANIMA
from library.anima.tokenizers import AnimaTokenizers, TokenizerFiles
from library.errors import CheckpointError, NetworkError, OptionError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.lumina.architecture import LUMINA
from library.options.anima import AnimaTrainOptions
from library.options.anima_inference import AnimaInferenceOptions
from library.options.command_line import read_options
from library.options.lumina import LuminaTrainOptions
from library.options.lumina_inference import LuminaInferenceOptions
from library.options.sd3 import Sd3TrainOptions
from library.options.sd3_inference import Sd3InferenceOptions
from library.sampling.flow_inference import FlowPictureMaker
from library.sampling.inference_checks import check_pictures
from library.sampling.prompts import SamplePrompt
from library.sd3 import text as sd3_text
from library.sd3.architecture import SD3
from library.training.models.precision import WEIGHT_DTYPES
from lumina_train_network import LuminaNetworkTrainer
from networks import lora_anima, lora_lumina, lora_sd3
from networks.layout_names import COMFY, DIFFUSERS, OURS
from sd3_train_network import Sd3NetworkTrainer
from tests.e2e.kinds import model_flags, run_flags

PAIR = ("sd3", "lumina")
CPU = torch.device("cpu")
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Script:
    """One of the scripts, and how its command line says what all of them can be told."""

    checks: Any
    maker: type[FlowPictureMaker]
    options: type
    files: dict[str, str]  # flag -> the fixture's name of a file
    usual: tuple[str, ...] = ()
    sides: tuple[str, ...]  # flags of width and height
    steps: str
    scale: str
    shift: str
    folder: str = "--output_dir"
    precisions: dict[str, tuple[str, ...]]
    network: Any
    trainer: Any
    train_options: type
    architecture: Any
    name: str = ""  # regex of its pictures'


FLOAT32 = ("--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32")
SCRIPTS = {
    "anima": Script(
        checks=anima_minimal_inference.CHECKS, maker=anima_minimal_inference.AnimaPictureMaker, options=AnimaInferenceOptions,
        files={"--dit": "dit", "--text_encoder": "qwen3", "--vae": "vae"}, sides=(), steps="--infer_steps",
        scale="--guidance_scale", shift="--flow_shift", folder="--save_path", network=lora_anima,
        precisions={"no": ("--mixed_precision=no",), "bf16": ("--mixed_precision=bf16",)},
        trainer=AnimaNetworkTrainer, train_options=AnimaTrainOptions, architecture=ANIMA,
    ),
    "sd3": Script(
        checks=sd3_minimal_inference.CHECKS, maker=sd3_minimal_inference.Sd3PictureMaker, options=Sd3InferenceOptions,
        files={"--ckpt_path": "sd3", "--clip_l": "clip_l", "--clip_g": "clip_g", "--t5xxl": "t5xxl"},
        sides=("--width", "--height"), steps="--steps", scale="--cfg_scale", shift="--flow_shift", network=lora_sd3,
        precisions={"no": (), "bf16": ("--bf16",)},
        trainer=Sd3NetworkTrainer, train_options=Sd3TrainOptions, architecture=SD3, name=r"\d{8}_\d{6}",
    ),
    "lumina": Script(
        checks=lumina_minimal_inference.CHECKS, maker=lumina_minimal_inference.LuminaPictureMaker, options=LuminaInferenceOptions,
        files={"--pretrained_model_name_or_path": "dit", "--gemma2_path": "gemma2", "--ae_path": "ae"},
        usual=FLOAT32, sides=("--image_width", "--image_height"), steps="--steps", scale="--guidance_scale",
        shift="--discrete_flow_shift", network=lora_lumina,
        precisions={"no": (), "bf16": ("--dtype=bf16", "--gemma2_dtype=bf16")},
        trainer=LuminaNetworkTrainer, train_options=LuminaTrainOptions, architecture=LUMINA, name=r"image_\d{14}_(\d+)",
    ),
}  # fmt: skip
both = pytest.mark.parametrize("kind", PAIR)
lumina_first = pytest.mark.parametrize("kind", ["lumina", pytest.param("sd3", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def tokenizers() -> tuple[AnimaTokenizers, Callable[..., Any]]:
    return AnimaTokenizers.bundled(), cache(sd3_text.load_sd3_tokenizers)


@pytest.fixture(autouse=True)
def tokenizers_are_loaded_once(tokenizers, monkeypatch):
    """They take most of a second each time."""
    monkeypatch.setattr(TokenizerFiles, "load", lambda self: tokenizers[0])
    monkeypatch.setattr(sd3_text, "load_sd3_tokenizers", tokenizers[1])


@pytest.fixture
def models(request) -> Callable[[str], dict[str, Path]]:
    return lambda kind: request.getfixturevalue(f"tiny_{kind}")


def size_flags(script: Script, width: int, height: int) -> list[object]:
    if not script.sides:
        return ["--image_size", height, width]
    return [f"{flag}={side}" for flag, side in zip(script.sides, (width, height), strict=True)]


@pytest.fixture
def maker(models, tmp_path):
    """``maker("sd3", "--prompt=a cat", ...)``: what the script makes of this command line, not started yet; four steps, 64 x 64.

    ``files``: other files than the usual ones, by flag; None = without.
    """

    def make(kind: str, *flags: object, files: dict[str, object] | None = None) -> FlowPictureMaker:
        script = SCRIPTS[kind]
        named = {**{flag: models(kind)[name] for flag, name in script.files.items()}, **(files or {})}
        argv = [*(f"{flag}={path}" for flag, path in named.items() if path is not None), f"{script.folder}={tmp_path / 'out'}",
                *size_flags(script, 64, 64), f"{script.steps}=4", f"--seed={SEED}", "--device=cpu", *script.usual, *flags]  # fmt: skip
        return script.maker(check_pictures(read_options(script.options, list(map(str, argv))), script.checks))

    return make


@pytest.fixture
def draw(maker, tmp_path):
    """Runs the command line; -> the files that it has written, in the order of their names."""

    def run(kind: str, *flags: object, **changes: Any) -> list[Path]:
        before = set((tmp_path / "out").glob("*"))
        maker(kind, *flags, **changes).make()
        return sorted(set((tmp_path / "out").glob("*")) - before)

    return run


@pytest.fixture(scope="module")
def drawn_before() -> dict[tuple[str, ...], torch.Tensor]:
    return {}


@pytest.fixture
def latents(draw, drawn_before):
    """``latents("sd3", ...)``: (16, h, w) of the only picture; drawn once for flags that name no file of a test."""

    def run(kind: str, *flags: object, **changes: Any) -> torch.Tensor:
        asked = (kind, *map(str, flags), str(sorted(changes.items())))
        if asked in drawn_before:
            return drawn_before[asked]
        (path,) = draw(kind, "--output_type=latent", *flags, **changes)
        found = dict(read_tensors(read_header(path)))["latent"]
        if not any(".safetensors" in word for word in asked):
            drawn_before[asked] = found
        return found

    return run


@pytest.fixture
def lora_file(maker, tmp_path):
    """``lora_file("sd3", ...)``: a LoRA with an effect on the denoiser and on every text encoder."""

    def write(
        kind: str,
        name: str = "lora.safetensors",
        *,
        seed: int = 0,
        layout: str = OURS,
        text: bool = True,
        t5: bool = True,
        **arguments: str,
    ) -> Path:
        prepared = maker(kind)
        prepared.build()
        encoders, denoiser = prepared.text_models(), prepared.denoiser
        more = {"train_t5xxl": "true"} if kind == "sd3" and t5 else {}
        network = SCRIPTS[kind].network.create_network(1.0, 2, 2, None, encoders, denoiser, **more, **arguments)
        network.apply_to(encoders, denoiser, text, True)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if layout == OURS:
            network.save_weights(tmp_path / name, torch.float32, {})
        else:
            network.save_weights_as(layout, tmp_path / name, torch.float32, {})
        return tmp_path / name

    return write


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()


def said(path: Path, pattern: str) -> str:
    """What the settings in a file of latents say, by a pattern with a group."""
    match = re.search(pattern, read_header(path).metadata["parameters"])
    assert match is not None
    return match[1]


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return not torch.allclose(first, second, atol=1e-3)


# ---------------------------------------------------------------- as in training


@pytest.mark.parametrize(("precision", "sampler"), [("no", "er_sde"), ("bf16", "euler")])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_latents_are_those_of_training_samples(maker, latents, models, tmp_path, kind, precision, sampler):
    script = SCRIPTS[kind]
    flags = ["--prompt=a cat on a wall", "--negative_prompt=rain", f"--sampler={sampler}", *script.precisions[precision],
             *size_flags(script, 64, 96), f"{script.scale}=4", f"{script.shift}=3"]  # fmt: skip
    drawn = latents(kind, *flags)
    argv = [*model_flags(kind, models(kind)), *run_flags(kind, tmp_path / "trained", tmp_path / "set.toml"),
            f"--mixed_precision={precision}"]  # fmt: skip
    prompt = SamplePrompt(
        prompt="", index=0, sample_sampler=sampler, width=64, height=96, sample_steps=4, scale=4.0, flow_shift=3.0
    )
    trained = sample_of_training(
        script, read_options(script.train_options, list(map(str, argv))), maker(kind, "--prompt=").run.layouts, prompt
    )
    assert trained.shape == (1, 16, 12, 8) and trained.isfinite().all()
    assert torch.equal(drawn, trained[0])


@torch.no_grad()
def sample_of_training(script: Script, options: Any, layouts: Any, prompt: SamplePrompt) -> torch.Tensor:
    """By the trainer's own hooks, in the way of library/training/sample_pictures.py."""
    dtype = WEIGHT_DTYPES[options.run.mixed_precision]
    trainer = script.trainer.__new__(script.trainer)
    trainer.run = SimpleNamespace(
        layouts=layouts, architecture=script.architecture, text_cache=None, prompts=(prompt,),
        training_set=SimpleNamespace(all_items=()),
    )  # fmt: skip
    trainer.options, trainer.device = options, CPU
    trainer.denoiser = trainer.build_denoiser()
    trainer.load_denoiser(trainer.denoiser, device=CPU, dtype=dtype)
    encoder = trainer.build_text_encoder()
    trainer.load_text_encoder(encoder, device=CPU, dtype=dtype)
    positive, negative = (trainer.encode_prompts(encoder, [text]) for text in ("a cat on a wall", "rain"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return trainer.draw_sample(trainer.plan_sample(prompt, SEED), positive, negative)


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sd3", "A photo of a cat\nSteps: 4, Sampler: euler, CFG scale: 5, Seed: 7, Shift: 3, Size: 64x64, Model: "),
        ("lumina", "A beautiful sunset over the mountains\nSteps: 4, Sampler: euler, CFG scale: 3.5, Seed: 7, Shift: 6, "
                   "CFG trunc ratio: 0.25, CFG renorm: 1, Size: 64x64, Model: "),
    ],
)  # fmt: skip
def test_a_picture_where_nothing_is_asked_for_and_nothing_is_overwritten(draw, monkeypatch, models, kind, said):
    monkeypatch.setattr("time.strftime", lambda form, *when: re.sub("%.", "00", form).replace("0000", "20260101", 1))
    (path,) = draw(kind)
    with Image.open(path) as picture:
        assert picture.size == (64, 64) and picture.text["parameters"].startswith(said)
        assert picture.text["parameters"].endswith("Precision: float32")
        assert all(models(kind)[name].name in picture.text["parameters"] for name in SCRIPTS[kind].files.values())
    assert pixels(path).float().std() > 1
    (again,) = draw(kind)
    assert again.stem == f"{path.stem}-2" and torch.equal(pixels(again), pixels(path))


@both
def test_names_of_the_reference(draw, kind):
    (path,) = draw(kind, f"{SCRIPTS[kind].steps}=1")
    match = re.fullmatch(f"{SCRIPTS[kind].name}\\.png", path.name)
    assert match is not None and match.groups() in ((), (str(SEED),))


@lumina_first
def test_pictures_of_a_batch_are_those_of_their_seeds(draw, kind):
    together = draw(kind, "--images_per_prompt=3", "--batch_size=2", "--sampler=er_sde", "--output_type=latent")
    found = {read_header(path).metadata["seed"]: dict(read_tensors(read_header(path)))["latent"] for path in together}
    (alone,) = draw(kind, "--seed=8", "--sampler=er_sde", "--output_type=latent")
    assert sorted(found) == ["7", "8", "9"]
    torch.testing.assert_close(found["8"], dict(read_tensors(read_header(alone)))["latent"], rtol=1e-3, atol=1e-3)
    assert differ(found["7"], found["8"])


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        *((kind, flag) for kind in PAIR for flag in ("--prompt=a dog", "--negative_prompt=rain", "--seed=8", "--sampler=er_sde")),
        ("sd3", "--cfg_scale=2"), ("sd3", "--steps=5"), ("sd3", "--flow_shift=1"), ("sd3", "--t5xxl_token_length=128"),
        ("sd3", "--apply_lg_attn_mask"), ("sd3", "--apply_t5_attn_mask"),
        ("lumina", "--guidance_scale=2"), ("lumina", "--steps=5"), ("lumina", "--discrete_flow_shift=1"),
        ("lumina", "--cfg_trunc_ratio=1"), ("lumina", "--renorm_cfg=0.5"), ("lumina", "--gemma2_max_token_length=3"),
        ("lumina", "--system_prompt=You are an artist."),
    ],
)  # fmt: skip
def test_settings_change_the_picture(latents, kind, flag):
    assert differ(latents(kind, flag), latents(kind))


@lumina_first
def test_savers_of_memory_change_nothing(latents, kind):
    for flags in (["--offload", "--attn_mode=sdpa"], ["--text_encoder_cpu", "--split_attn"]):
        assert torch.equal(latents(kind, *flags), latents(kind)), flags


@both
def test_saved_latents_become_the_picture(draw, maker, kind):
    drawn = draw(kind, "--output_type=latent_images")
    picture, saved = (next(path for path in drawn if path.suffix == end) for end in (".png", ".safetensors"))
    assert picture.stem == saved.stem.removesuffix("_latent")
    (again,) = draw(kind, "--latent_path", saved)
    assert torch.equal(pixels(again), pixels(picture))


def test_sd3_draws_without_t5_and_says_so(maker, latents, models):
    whole = {flag: None for flag in ("--clip_l", "--clip_g", "--t5xxl")}
    assert torch.equal(latents("sd3", files={**whole, "--ckpt_path": models("sd3")["sd3_whole"]}), latents("sd3"))
    clips = {**whole, "--ckpt_path": models("sd3")["sd3_clips"]}
    (warning,) = maker("sd3", files=clips).run.warnings
    assert "no T5-XXL, neither with --t5xxl" in warning
    _, idle = maker("sd3", "--t5xxl_token_length=128", "--apply_t5_attn_mask", files=clips).run.warnings
    assert idle == "--t5xxl_token_length, --apply_t5_attn_mask do nothing: there is no T5"
    assert differ(latents("sd3", files=clips), latents("sd3"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd35_medium", "sd35_large"])
def test_sd35_draws(latents, models, kind):
    assert latents("sd3", files={"--ckpt_path": models("sd3")[kind]}).isfinite().all()


def test_lumina_draws_from_one_file_and_from_a_folder(latents, models):
    alone = {"--gemma2_path": None, "--ae_path": None, "--pretrained_model_name_or_path": models("lumina")["whole"]}
    folder = {"--gemma2_path": models("lumina")["gemma2_folder"]}
    for files in (alone, folder):
        torch.testing.assert_close(latents("lumina", files=files), latents("lumina"), rtol=1e-3, atol=1e-3)


def test_the_system_prompt_of_lumina(maker, draw):
    flags = ["--prompt=a cat", "--negative_prompt=rain", "--system_prompt=You draw."]
    plain, with_negative = maker("lumina", *flags), maker("lumina", *flags, "--add_system_prompt_to_negative_prompt")
    whole = "You draw. <Prompt Start> "
    for made, negative in ((plain, "rain"), (with_negative, f"{whole}rain")):
        made.make()
        assert [text.text for text in made.texts] == [f"{whole}a cat", negative]
    (path,) = draw("lumina", *flags)
    with Image.open(path) as picture:
        assert picture.text["parameters"].startswith("a cat\n") and "System prompt: You draw." in picture.text["parameters"]


def test_number_formats_of_lumina_s_parts(maker, latents):
    made = maker("lumina", "--dtype=fp16", "--gemma2_dtype=fp32", "--ae_dtype=bf16")
    assert (made.dtype, made.text_dtype, made.vae_dtype) == (torch.float16, torch.float32, torch.bfloat16)
    for flags in (["--gemma2_dtype=bf16"], ["--dtype=bf16", "--ae_dtype=bf16"]):
        mixed = latents("lumina", *flags)
        assert 0 < (mixed - latents("lumina")).norm() < 0.2 * latents("lumina").norm()


# ---------------------------------------------------------------- LoRA files


@both
def test_files_act_beside_the_weights_or_merged_into_them(latents, lora_file, caplog, kind):
    file = lora_file(kind)
    caplog.set_level("INFO", logger="library")
    plain, beside = latents(kind), latents(kind, "--lora_weights", f"{file};0.5")
    assert "LoRA modules act on the denoiser (lora.safetensors x 0.5)" in caplog.text
    merged = latents(kind, "--lora_weights", f"{file};0.5", "--merge_lora_weights")
    assert "LoRA modules into the text encoder (lora.safetensors x 0.5)" in caplog.text
    assert differ(beside, plain)
    torch.testing.assert_close(beside, merged, rtol=1e-2, atol=1e-2)
    assert torch.equal(latents(kind, "--lora_weights", f"{file};0"), plain)


@both
@pytest.mark.parametrize("layout", [COMFY, DIFFUSERS])
@pytest.mark.parametrize(
    "arguments", [pytest.param({}, id="one"), pytest.param({"split_qkv": "true"}, id="split", marks=pytest.mark.slow)]
)
def test_layouts_of_other_programs(latents, lora_file, kind, layout, arguments):
    ours, other = (
        lora_file(kind, f"{name}.safetensors", layout=name, text=kind == "sd3", t5=False, **arguments) for name in (OURS, layout)
    )
    found = latents(kind, "--lora_weights", other)
    torch.testing.assert_close(found, latents(kind, "--lora_weights", ours), rtol=1e-3, atol=1e-3)
    assert differ(found, latents(kind))


@lumina_first
def test_patterns_choose_the_text_encoders_and_the_denoiser(latents, lora_file, kind):
    file = lora_file(kind)
    plain, whole = latents(kind), latents(kind, "--lora_weights", file)
    names = ["lora_unet", *(["lora_te1", "lora_te2", "lora_te3"] if kind == "sd3" else ["lora_te"])]
    parts = [latents(kind, "--lora_weights", file, "--include_patterns", name) for name in names]
    for place, part in enumerate(parts):
        assert differ(part, whole) and not torch.equal(part, plain), names[place]
    with pytest.raises(NetworkError, match="--include_patterns nowhere fits no module"):
        latents(kind, "--lora_weights", file, "--include_patterns", "nowhere")


def test_what_a_file_has_for_t5_is_told_where_there_is_none(maker, models, lora_file, caplog):
    files = {"--ckpt_path": models("sd3")["sd3_clips"], "--clip_l": None, "--clip_g": None, "--t5xxl": None}
    with_t5, without = lora_file("sd3", "with.safetensors"), lora_file("sd3", "without.safetensors", t5=False)
    maker("sd3", "--lora_weights", with_t5, without, files=files).build()
    (line,) = [message for message in caplog.messages if "changes T5 too" in message]
    assert line == f"warning: {with_t5} changes T5 too, which is left out: there is no T5 (--t5xxl)"


@lumina_first
def test_prompts_set_the_strengths_of_files(draw, latents, lora_file, tmp_path, kind):
    first, second = (lora_file(kind, f"{name}.safetensors", seed=seed) for seed, name in enumerate("ab"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --m 0,0\na cat\na cat --m 0.25\n")
    loras = ["--lora_weights", f"{first};0.5", second]
    found = draw(kind, *loras, f"--from_file={prompts}", "--output_type=latent")
    by_text = {said(path, r"LoRA: (.*), Precision"): path for path in found}
    written = ["a.safetensors (0); b.safetensors (0)", "a.safetensors (0.5); b.safetensors (1)",
               "a.safetensors (0.25); b.safetensors (1)"]  # fmt: skip
    none, usual, less = (dict(read_tensors(read_header(by_text.pop(text))))["latent"] for text in written)
    assert not by_text
    assert torch.equal(none, latents(kind, "--prompt=a cat"))
    assert torch.equal(usual, latents(kind, "--prompt=a cat", *loras))
    assert torch.equal(less, latents(kind, "--prompt=a cat", "--lora_weights", f"{first};0.25", second))


# ---------------------------------------------------------------- mistakes


def problems(maker, kind: str, *flags: object, **changes: Any) -> str:
    with pytest.raises((OptionError, CheckpointError)) as caught:
        maker(kind, *flags, **changes)
    return "\n".join(caught.value.problems)


@both
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_weights", "a.safetensors;x"], "'a.safetensors;x': write FILE;STRENGTH, with a number behind the semicolon"),
        (["--lora_weights", "gone.safetensors;1"], "--lora_weights gone.safetensors: there is no such file"),
        (["--from_file=gone.txt"], "--from_file gone.txt"),
        (["--from_file={prompts}"], "prompt 1: --ss ddim is no sampler here"),
        (["--from_file={prompts}"], "prompt 2: --m 1,2 (lora_multipliers): there are more numbers than LoRA files (0)"),
        (["--latent_path", "{latent}"], "this model's are (16, height / 8, width / 8)"),
    ],
)
def test_mistakes_are_told_before_models_load(maker, tmp_path, kind, flags, words):
    names = {"prompts": tmp_path / "prompts.txt", "latent": tmp_path / "x_latent.safetensors"}
    names["prompts"].write_text("a cat --ss ddim\na dog --m 1,2\n")
    save_safetensors(names["latent"], {"latent": torch.zeros(4, 8, 8)})
    assert words in problems(maker, kind, *(flag.format(**names) for flag in flags))


@pytest.mark.parametrize(
    ("kind", "flag", "given", "words"),
    [
        ("sd3", "--ckpt_path", "clip_l", "--ckpt_path"),
        ("sd3", "--clip_l", "clip_g", "--clip_l"),
        ("sd3", "--t5xxl", "clip_l", "--t5xxl"),
        ("sd3", "--vae", "clip_l", "--vae"),
        ("sd3", "--clip_g", None, "--clip_g is missing"),
        ("lumina", "--pretrained_model_name_or_path", "ae", "--pretrained_model_name_or_path"),
        ("lumina", "--gemma2_path", "dit", "--gemma2_path"),
        ("lumina", "--ae_path", "gemma2", "--ae_path"),
        ("lumina", "--ae_path", None, "--ae_path is missing"),
        ("lumina", "--gemma2_path", None, "--gemma2_path is missing"),
    ],
)
def test_the_wrong_model_is_told_with_this_script_s_flag(maker, models, kind, flag, given, words):
    text = problems(maker, kind, files={flag: None if given is None else models(kind)[given]})
    training = {"sd3": "pretrained_model_name_or_path|t5xxl_max_token_length", "lumina": "gemma2|ae"}[kind]
    assert words in text and not re.search(rf"--({training})(?!\w)", text)


@both
def test_the_lora_of_the_other_model_is_named(maker, lora_file, kind):
    other = next(name for name in PAIR if name != kind)
    text = problems(maker, kind, "--lora_weights", lora_file(other))
    assert text.startswith("--lora_weights ") and {"sd3": "SD3", "lumina": "Lumina Image 2.0"}[other] in text


@both
def test_strengths_of_merged_files_are_those_of_the_command(maker, lora_file, tmp_path, kind):
    (tmp_path / "prompts.txt").write_text("a cat --m 0.5\n")
    flags = ["--lora_weights", lora_file(kind), f"--from_file={tmp_path / 'prompts.txt'}"]
    text = problems(maker, kind, *flags, "--merge_lora_weights")
    assert "prompt 1: --m 0.5 (lora_multipliers): LoRA files that are merged into the weights have one strength" in text
    assert maker(kind, *flags).run.warnings == ()


@both
def test_odd_sizes_are_rounded_and_told_once(maker, draw, kind):
    flags = size_flags(SCRIPTS[kind], 90, 64)
    (warning,) = maker(kind, *flags).run.warnings
    assert warning.startswith("sizes are rounded down to multiples of 16 pixels") and "90x64 to 80x64" in warning
    (path,) = draw(kind, *flags, f"{SCRIPTS[kind].steps}=1")
    with Image.open(path) as picture:
        assert picture.size == (80, 64)


def test_pictures_larger_than_sd3_has_positions_for(maker, monkeypatch, capsys, tmp_path):
    assert "1024x64 pixels are more than 768 on a side" in problems(maker, "sd3", "--width=1024")
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --w 1024\n"))
    maker("sd3", "--interactive", "--height=1024").make()
    assert "1024x1024 pixels are more than 768 on a side" in capsys.readouterr().err and not list((tmp_path / "out").glob("*"))


@both
def test_prompts_that_are_cut_are_told(maker, caplog, kind):
    maker(kind, f"--prompt={'dog ' * 300}", f"{SCRIPTS[kind].steps}=1").make()
    (line,) = [message for message in caplog.messages if "cut off is" in message]
    assert line.startswith("warning: the prompt 'dog dog dog dog dog dog ...' has")


# ---------------------------------------------------------------- the console


@lumina_first
def test_interactive_lines(draw, latents, lora_file, monkeypatch, capsys, kind):
    lines = "a cat --d 7 --m 0.5 --n -\nhelp\na cat --q 1\na cat --m 1,2\na cat --d7 --w64 --m1\nquit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    file = lora_file(kind)
    loras = ["--lora_weights", f"{file};0.75"]
    found = draw(kind, "--interactive", "--negative_prompt=rain", "--output_type=latent", *loras)
    shown = capsys.readouterr()
    assert "--m X,X       strengths of the LoRA files, in their order [0.75]" in shown.out
    assert "--q is not a flag" in shown.err and "more numbers than LoRA files (1)" in shown.err
    by_strength = {said(path, r"\(([\d.]+)\)"): path for path in found}
    for strength, negative in (("0.5", ""), ("1", "rain")):
        alone = latents(kind, "--prompt=a cat", f"--negative_prompt={negative}", "--lora_weights", f"{file};{strength}")
        assert torch.equal(dict(read_tensors(read_header(by_strength[strength])))["latent"], alone)


@pytest.mark.gpu
@both
def test_the_gpu_draws_nearly_what_the_cpu_draws(latents, lora_file, kind):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    flags = ["--lora_weights", f"{lora_file(kind)};0.5", *({"sd3": ["--mixed_precision=no"]}.get(kind, []))]
    found = latents(kind, *flags, "--device=cuda", "--offload")
    torch.testing.assert_close(found, latents(kind, *flags), rtol=1e-2, atol=1e-2)
    assert latents(kind, "--device=cuda").isfinite().all()
