"""Stable Diffusion 3 before torch: where its parts may lie, which mistakes are told, what caches depend on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.dataset.token_use import TokenUse
from library.errors import CheckpointError, OptionError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.options.sd3 import Sd3TrainOptions
from library.sd3.architecture import SD3
from library.sd3.source import T5XXL
from tests.caption_sets import captions

REPOSITORY = Path(__file__).resolve().parents[3]
KINDS = {"sd3": "medium", "sd35_medium": "5-medium", "sd35_large": "5-large"}
ENCODERS = ("clip_l", "clip_g", "t5xxl")


def options_for(model: object = None, /, **groups) -> Sd3TrainOptions:
    """``sd3={"clip_l": path}`` and so on; paths may be of any type."""
    options = Sd3TrainOptions()
    groups["model"] = {"pretrained_model_name_or_path": model, **groups.get("model", {})}
    texts = {name: {key: str(v) if isinstance(v, Path) else v for key, v in values.items()} for name, values in groups.items()}
    return replace(options, **{name: replace(getattr(options, name), **values) for name, values in texts.items()})


def read(model: object = None, /, parts=("denoiser", "text", "vae"), **groups):
    return SD3.read_layouts(options_for(model, **groups), parts)


def problems_of(model: object = None, /, parts=("denoiser", "text", "vae"), **groups) -> tuple[str, ...]:
    with pytest.raises((CheckpointError, OptionError)) as caught:
        read(model, parts, **groups)
    return caught.value.problems


def problem_of(*args, **groups) -> str:
    (problem,) = problems_of(*args, **groups)
    return problem


def own_files(tiny_sd3, *names) -> dict[str, Path]:
    return {name: tiny_sd3[name] for name in names or ENCODERS}


def changed_file(source: Path, target: Path, change) -> Path:
    """A copy of a file with what ``change`` makes of its tensors."""
    header = read_header(source)
    save_safetensors(target, change(dict(read_tensors(header))), header.metadata)
    return target


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("kind", KINDS)
def test_all_parts_in_one_file(kind, tiny_sd3):
    layouts = read(tiny_sd3[f"{kind}_whole"])
    assert layouts.denoiser.config.kind == KINDS[kind] and layouts.denoiser.config.heads == 2
    assert layouts.text.clip_l.config.width < layouts.text.clip_g.config.width
    assert layouts.text.t5 is not None and layouts.vae.config.latent_channels == 16
    assert not list(SD3.warnings_of(layouts, options_for()))


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_in_files_of_their_own(kind, tiny_sd3):
    layouts, whole = read(tiny_sd3[kind], sd3=own_files(tiny_sd3)), read(tiny_sd3[f"{kind}_whole"])
    assert (layouts.text.clip_l.config, layouts.text.clip_g.config) == (whole.text.clip_l.config, whole.text.clip_g.config)
    assert layouts.text.t5.config == whole.text.t5.config
    assert [part.source.path for part in (layouts.text.clip_l, layouts.text.t5)] == [tiny_sd3["clip_l"], tiny_sd3["t5xxl"]]


def test_a_path_wins_over_what_is_bundled(tiny_sd3):
    layouts = read(tiny_sd3["sd3_whole"], sd3=own_files(tiny_sd3, "clip_g"), model={"vae": tiny_sd3["vae"]})
    assert layouts.text.clip_g.source.path == tiny_sd3["clip_g"] and layouts.vae.source.path == tiny_sd3["vae"]
    assert layouts.text.clip_l.source.path == layouts.denoiser.source.path == tiny_sd3["sd3_whole"]


def test_a_whole_checkpoint_may_stand_for_an_encoder(tiny_sd3):
    layouts = read(tiny_sd3["sd3"], sd3=dict.fromkeys(ENCODERS, tiny_sd3["sd3_whole"]))
    assert all(key.startswith(T5XXL.bundled) for key in (piece.key for piece in layouts.text.t5.pieces.values()))


def test_a_denoiser_without_a_prefix(tiny_sd3, tmp_path):
    def bare(tensors):
        return {name.removeprefix("model.diffusion_model."): t for name, t in tensors.items() if name.startswith("model.")}

    model = changed_file(tiny_sd3["sd3"], tmp_path / "bare.safetensors", bare)
    layouts = read(model, sd3=own_files(tiny_sd3), model={"vae": tiny_sd3["vae"]})
    assert layouts.denoiser.config == read(tiny_sd3["sd3"], {"denoiser"}).denoiser.config
    assert "has no VAE: name one with --vae" in problem_of(model, sd3=own_files(tiny_sd3))


def test_t5_may_be_missing(tiny_sd3):
    options = options_for(tiny_sd3["sd3_clips"])
    layouts = SD3.read_layouts(options)
    assert layouts.text.t5 is None
    (warning,) = SD3.warnings_of(layouts, options)
    assert "there is no T5-XXL" in warning
    given = {"t5xxl_dtype": "bf16", "t5xxl_device": "cpu", "t5xxl_max_token_length": 77, "apply_t5_attn_mask": True,
             "t5_dropout_rate": 0.1}  # fmt: skip
    for flags in (["t5_dropout_rate"], list(given)):
        changed = options_for(tiny_sd3["sd3_clips"], sd3={name: given[name] for name in flags})
        _, idle = SD3.warnings_of(layouts, changed)
        named, _, said = idle.partition(" does nothing" if len(flags) == 1 else " do nothing")
        assert {f"--{name}" for name in flags} == set(named.split(", ")) and said == ": there is no T5"
    with_t5 = options_for(tiny_sd3["sd3_whole"], sd3=given)
    assert not list(SD3.warnings_of(SD3.read_layouts(with_t5), with_t5))
    trains = options_for(tiny_sd3["sd3_clips"], network={"network_args": ["train_t5xxl=true"]})
    with pytest.raises(CheckpointError, match="train_t5xxl=true needs a T5.*--t5xxl"):
        SD3.read_layouts(trains)
    assert SD3.read_layouts(options_for(tiny_sd3["sd3_whole"], network={"network_args": ["train_t5xxl=true"]})).text.t5


@pytest.mark.parametrize("parts", [("vae",), ("text",), ("denoiser",), ()])
def test_only_the_parts_that_are_asked_for_are_read(parts, tiny_sd3):
    layouts = read(tiny_sd3["sd3_whole"], parts)
    found = {name for name in ("denoiser", "text", "vae") if getattr(layouts, name) is not None}
    assert found == set(parts)


def test_parts_with_files_of_their_own_need_no_checkpoint(tiny_sd3):
    layouts = read(None, ("text", "vae"), sd3=own_files(tiny_sd3), model={"vae": tiny_sd3["vae"]})
    assert layouts.denoiser is None and layouts.text.t5 is not None and layouts.vae is not None
    assert read(None, ("text",), sd3=own_files(tiny_sd3, "clip_l", "clip_g")).text.t5 is None


def test_positions_outside_of_sd35_medium_are_a_warning(tiny_sd3):
    flags = {"pos_emb_random_crop_rate": 0.1, "enable_scaled_pos_embed": True}
    for kind, number in (("sd3", 2), ("sd35_medium", 0), ("sd35_large", 2)):
        options = options_for(tiny_sd3[f"{kind}_whole"], sd3=flags)
        assert len(list(SD3.warnings_of(SD3.read_layouts(options), options))) == number


def test_buckets_without_positions(tiny_sd3):
    options = options_for(tiny_sd3["sd3_whole"])
    layouts, wide = SD3.read_layouts(options), [(784, 64), (64, 64), (784, 64)]
    assert not list(SD3.size_problems(layouts, [(768, 64)], options))  # 48 patches of 16 pixels
    (problem,) = SD3.size_problems(layouts, wide, options)
    assert "784x64 pixels are more than 768 on a side" in problem
    scaled = options_for(tiny_sd3["sd3_whole"], sd3={"enable_scaled_pos_embed": True})
    assert not list(SD3.size_problems(layouts, wide, scaled))


def test_looking_needs_no_torch(tiny_sd3):
    code = (
        "import sys\nfrom dataclasses import replace\nfrom library.options.sd3 import Sd3TrainOptions\n"
        "from library.sd3.architecture import SD3\noptions = Sd3TrainOptions()\n"
        f"options = replace(options, model=replace(options.model, pretrained_model_name_or_path={str(tiny_sd3['sd3_whole'])!r}))\n"
        "layouts = SD3.read_layouts(options)\nSD3.latent_recipe(layouts, options), SD3.text_recipe(layouts, options)\n"
        "SD3.reference_format(layouts, options), SD3.token_counter(options)('a cat')\n"
        "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- what is told


def test_nothing_given(tiny_sd3):
    assert problem_of() == ("--pretrained_model_name_or_path is missing: give the path of the SD3 or SD3.5 checkpoint")
    told = problems_of(None, ("text", "vae"))
    assert [text.split()[0] for text in told] == ["--clip_l", "--clip_g", "--vae"]
    told = problems_of(tiny_sd3["sd3"])
    assert [text.split()[0] for text in told] == ["--clip_l", "--clip_g"] and "holds none (text_encoders.clip_l" in told[0]


def test_all_problems_come_together(tiny_sd3, tmp_path):
    gone = str(tmp_path / "gone.safetensors")
    told = problems_of(gone, sd3=dict.fromkeys(ENCODERS, gone), model={"vae": gone})
    assert [text.split()[0] for text in told] == ["--pretrained_model_name_or_path", "--clip_l", "--clip_g", "--t5xxl", "--vae"]


def test_only_single_files(tiny_sd3, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a diffusers folder; SD3 is read from one file: give its single-file checkpoint" in problem_of(
        tmp_path, ("denoiser",)
    )
    assert "is a repository on the hub" in problem_of("stabilityai/stable-diffusion-3.5-medium", ("denoiser",))
    transformer = tmp_path / "diffusion_pytorch_model.safetensors"
    save_safetensors(transformer, {"transformer_blocks.0.ff_context.net.0.proj.weight": torch.zeros(2, 2)})
    assert "transformer in diffusers' layout, which is not read: give its single-file" in problem_of(transformer, ("denoiser",))


WRONG_MODELS = {
    "sdxl": "an SDXL checkpoint (sdxl_train_network.py trains those), not an SD3 or SD3.5 checkpoint",
    "sd1": "a Stable Diffusion 1.x checkpoint (train_network.py trains those), not an SD3",
    "vae": "a Stable Diffusion VAE, not an SD3",
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_another_model_than_sd3(kind, tiny_sd, tiny_sd3):
    assert WRONG_MODELS[kind] in problem_of(tiny_sd[kind], sd3=own_files(tiny_sd3), model={"vae": tiny_sd3["vae"]})


@pytest.mark.parametrize(
    ("flag", "file", "told"),
    [
        ("clip_l", "t5xxl", "is a T5 text encoder, not a CLIP-L text encoder; give --clip_l"),
        ("clip_g", "t5xxl", "is a T5 text encoder, not a CLIP-G text encoder"),
        ("t5xxl", "clip_g", "is a CLIP text encoder, not a T5-XXL text encoder"),
        ("t5xxl", "sd3", "is an SD3 or SD3.5 checkpoint (sd3_train_network.py trains those), not a T5-XXL"),
        ("clip_l", "vae", "is a Stable Diffusion VAE, not a CLIP-L"),
        ("clip_l", "clip_g", "--clip_l {clip_g} and --clip_g {clip_g} are both 24 wide"),
        ("clip_g", "clip_l", "--clip_l {clip_l} and --clip_g {clip_l} are both 16 wide"),
    ],
)
def test_another_model_in_an_encoders_flag(flag, file, told, tiny_sd3):
    files = own_files(tiny_sd3) | {flag: tiny_sd3[file]}
    assert told.format(**{name: str(path) for name, path in tiny_sd3.items()}) in problem_of(tiny_sd3["sd3"], sd3=files)


def test_clips_in_each_others_flags(tiny_sd3):
    files = {"clip_l": tiny_sd3["clip_g"], "clip_g": tiny_sd3["clip_l"]}
    assert "is a CLIP-G and --clip_g" in problem_of(tiny_sd3["sd3"], sd3=files)


@pytest.mark.parametrize(("width", "told"), [(768, "--clip_g"), (1280, "--clip_l")])
def test_published_clips_are_known_by_their_width(width, told, tiny_sd3, monkeypatch):
    monkeypatch.setattr("library.sd3.source.PUBLISHED_WIDTHS", {16: {768: "CLIP-L", 1280: "CLIP-G"}[width]})
    files = dict.fromkeys(("clip_l", "clip_g"), tiny_sd3["clip_l"])
    problem = problem_of(tiny_sd3["sd3"], sd3=files)
    assert problem.startswith(told) and f"is a {'CLIP-L' if width == 768 else 'CLIP-G'}, not a" in problem


def test_vaes_of_other_models(tiny_sd, tiny_anima, tiny_sd3):
    groups = {"sd3": own_files(tiny_sd3)}
    assert "VAE of 4 latent channels" in problem_of(tiny_sd3["sd3"], model={"vae": tiny_sd["vae"]}, **groups)
    assert "it is a Qwen-Image VAE" in problem_of(tiny_sd3["sd3"], model={"vae": tiny_anima["vae"]}, **groups)
    assert "it is a T5 text encoder" in problem_of(tiny_sd3["sd3"], model={"vae": tiny_sd3["t5xxl"]}, **groups)


def test_encoders_of_another_width(tiny_sd3, tmp_path):
    def narrow(tensors):
        own = {name: t for name, t in tensors.items() if not name.startswith("model.diffusion_model.")}
        return {**own, **denoiser(tensors, lambda name: name.startswith(("context_embedder.w", "y_embedder.mlp.0.w")))}

    def denoiser(tensors, is_cut):
        start = "model.diffusion_model."
        found = {name: t for name, t in tensors.items() if name.startswith(start)}
        return {name: t[:, :30].clone() if is_cut(name.removeprefix(start)) else t for name, t in found.items()}

    model = changed_file(tiny_sd3["sd3_whole"], tmp_path / "model.safetensors", narrow)
    clips, t5 = problems_of(model)
    assert "a pooled text of 30 values and states of 30" in clips and "give 40 and 40" in clips
    assert "takes text of width 30, T5" in t5 and "gives 48" in t5


def test_a_clip_g_without_projection(tiny_sd3, tmp_path):
    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != "text_projection.weight"}

    files = {name: changed_file(tiny_sd3[name], tmp_path / f"{name}.safetensors", without) for name in ("clip_l", "clip_g")}
    assert "has no text_projection.weight" in problem_of(tiny_sd3["sd3"], sd3={**files, "t5xxl": tiny_sd3["t5xxl"]})
    identity = read(tiny_sd3["sd3"], sd3={"clip_l": files["clip_l"], "clip_g": tiny_sd3["clip_g"]})
    assert identity.text.clip_l.config.projection is None


def test_too_many_swapped_blocks(tiny_sd3):
    swapping = {"memory": {"blocks_to_swap": 2}}
    assert "this model has 3 blocks" in problem_of(tiny_sd3["sd3_whole"], **swapping)
    assert read(tiny_sd3["sd3_whole"], memory={"blocks_to_swap": 1}).denoiser is not None


# ---------------------------------------------------------------- what caches depend on


def text_recipe(model, **groups):
    options = options_for(model, **groups)
    return SD3.text_recipe(SD3.read_layouts(options, {"text"}), options)


def test_text_depends_on_encoders_lengths_and_masks(tiny_sd3):
    plain = text_recipe(tiny_sd3["sd3_whole"])
    assert plain == text_recipe(tiny_sd3["sd3"], sd3=own_files(tiny_sd3))  # the same weights in other files
    assert plain != text_recipe(tiny_sd3["sd3_clips"])
    for change in ({"t5xxl_max_token_length": 77}, {"apply_lg_attn_mask": True}, {"apply_t5_attn_mask": True},
                   {"t5xxl_dtype": "fp32"}):  # fmt: skip
        assert text_recipe(tiny_sd3["sd3_whole"], sd3=change) != plain, change
    assert text_recipe(tiny_sd3["sd3_whole"], run={"mixed_precision": "bf16"}).dtype == "bfloat16"
    assert text_recipe(tiny_sd3["sd3_whole"], memory={"fp8_base": True}) != plain
    # without a T5 its flags change nothing
    assert text_recipe(tiny_sd3["sd3_clips"], sd3={"t5xxl_max_token_length": 77}) == text_recipe(tiny_sd3["sd3_clips"])


def test_latents_depend_on_the_vae(tiny_sd3, tmp_path):
    def recipe(path, /, **groups):
        options = options_for(path, **groups)
        return SD3.latent_recipe(SD3.read_layouts(options, {"vae"}), options)

    bundled = recipe(tiny_sd3["sd3"])
    assert bundled == recipe(None, model={"vae": tiny_sd3["vae"]}) and bundled.channels == 16
    assert recipe(tiny_sd3["sd3"], run={"mixed_precision": "bf16"}).dtype == "bfloat16"
    assert recipe(tiny_sd3["sd3"], run={"mixed_precision": "bf16"}, model={"no_half_vae": True}).dtype == "float32"
    header = read_header(tiny_sd3["vae"])
    vae = json.loads(header.metadata["config"])["vae"] | {"scaling_factor": 2.0, "shift_factor": 0.5}
    other = tmp_path / "vae.safetensors"
    save_safetensors(other, dict(read_tensors(header)), {"config": json.dumps({"vae": vae})})
    options = options_for(None, model={"vae": other})
    layouts = SD3.read_layouts(options, {"vae"})
    assert SD3.scale_and_shift(layouts) == (2.0, 0.5) and SD3.latent_recipe(layouts, options) != bundled
    assert SD3.scale_and_shift(read(tiny_sd3["sd3"], {"vae"})) == (1.5305, 0.0609)


# ---------------------------------------------------------------- tokens


def test_tokens_of_all_three_encoders(tiny_sd3):
    counts = SD3.token_counter(options_for())("a cat")
    assert counts == [TokenUse("CLIP-L", 2, 75, None), TokenUse("OpenCLIP-G", 2, 75, None), TokenUse("T5", 4, 256, None)]


def test_what_no_encoder_sees_is_told(tiny_sd3):
    with_t5, without = options_for(tiny_sd3["sd3_whole"]), options_for(tiny_sd3["sd3_clips"])
    middle, long = "dog " * 100, "dog " * 300
    assert not list(SD3.cut_prompts(["a cat", middle], with_t5))
    assert [use.encoder for _, use in SD3.cut_prompts([middle, long], with_t5)] == ["T5"]
    assert [use.encoder for _, use in SD3.cut_prompts([middle], without)] == ["CLIP-L"]
    assert not list(SD3.caption_warnings(captions("a cat", middle), with_t5))
    (warning,) = SD3.caption_warnings(captions("a cat", long), with_t5)
    assert "longer than the 256 tokens" in warning and "raise --t5xxl_max_token_length" in warning
    (warning,) = SD3.caption_warnings(captions("a cat", middle), without)
    assert "longer than the 75 tokens" in warning and "give a T5 (--t5xxl)" in warning
    assert not list(SD3.caption_warnings(captions(middle), options_for(None, sd3={"t5xxl": "anywhere.safetensors"})))


def test_prompts_are_encoded_as_they_are():
    assert SD3.positive_prompt("a cat", options_for()) == "a cat"


def test_the_plan_names_model_and_files(tiny_sd3):
    options = options_for(tiny_sd3["sd35_medium"], sd3=own_files(tiny_sd3, "clip_l", "clip_g"))
    (line,) = SD3.model_lines(SD3.read_layouts(options), options)
    files = {name: tiny_sd3[name].name for name in ("sd35_medium", "clip_l", "clip_g")}
    assert line == (
        f"model: SD 3.5 medium, {files['sd35_medium']}; VAE in it; CLIP-L {files['clip_l']}; CLIP-G {files['clip_g']}; no T5-XXL"
    )
