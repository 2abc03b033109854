"""Stable Diffusion and SDXL before torch: which models are accepted in which form, and what caches depend on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.dataset.token_use import TokenUse, lost_text
from library.errors import CheckpointError, OptionError
from library.files.open_weights import open_weights
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.options.samples import SAMPLERS
from library.options.sd import SdxlTrainOptions, StableDiffusionTrainOptions
from library.sd.architecture import SAMPLERS as DRAWN
from library.sd.architecture import STABLE_DIFFUSION
from library.sd.layout import EPSILON, VELOCITY, Marks
from library.sdxl.architecture import SDXL
from tests.caption_sets import captions
from tools.tiny_sd import make_sd
from tools.tiny_sd_models import MODELS

ARCHITECTURES = {"sd1": STABLE_DIFFUSION, "sd2": STABLE_DIFFUSION, "sdxl": SDXL}
FORMS = ("sd1", "sd1_ckpt", "sd1_folder", "sd2", "sd2_folder", "sdxl", "sdxl_folder")
REPOSITORY = Path(__file__).resolve().parents[3]


def options_for(form: str, path: object = None, /, **groups):
    """Of a model in one of ``FORMS`` at ``path``."""
    kind = form.partition("_")[0]
    options = (SdxlTrainOptions if kind == "sdxl" else StableDiffusionTrainOptions)()
    groups = {"clip": {"v2": kind == "sd2"}, **groups}
    groups["model"] = {"pretrained_model_name_or_path": None if path is None else str(path), **groups.get("model", {})}
    return replace(options, **{name: replace(getattr(options, name), **values) for name, values in groups.items()})


def read(form: str, path: object, /, parts=("denoiser", "text", "vae"), **groups):
    return ARCHITECTURES[form.partition("_")[0]].read_layouts(options_for(form, path, **groups), parts)


def problem_of(form: str, path: object, /, parts=("denoiser", "text", "vae"), **groups) -> str:
    with pytest.raises((CheckpointError, OptionError)) as caught:
        read(form, path, parts, **groups)
    (problem,) = caught.value.problems
    return problem


def changed_file(source: Path, target: Path, change, metadata: dict[str, str] | None = None) -> Path:
    """A copy of a file with what ``change`` makes of its tensors."""
    header = read_header(source)
    save_safetensors(target, change(dict(read_tensors(header))), {**header.metadata, **(metadata or {})})
    return target


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_is_read(form, tiny_sd):
    layouts = read(form, tiny_sd[form])
    model = MODELS[form.partition("_")[0]]["tiny"]()
    assert layouts.denoiser.config == model.unet
    assert [part.config.width for part in layouts.text] == [config.width for _, _, config in model.text]
    assert [part.config.heads for part in layouts.text] == [config.heads for _, _, config in model.text]
    assert layouts.vae.config.widths == model.vae.widths
    layers = {"sd2": [2], "sd1": [3], "sdxl": [3, 3]}[form.partition("_")[0]]  # the last of SD 2 is not used
    assert [part.config.layers for part in layouts.text] == layers


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_file_and_a_folder_give_the_same_tensors(kind, tiny_sd):
    file, folder = read(kind, tiny_sd[kind]), read(kind, tiny_sd[f"{kind}_folder"])
    for one, other in ((file.denoiser, folder.denoiser), *zip(file.text, folder.text, strict=True), (file.vae, folder.vae)):
        assert one.pieces.keys() == other.pieces.keys()
        tensors = [dict(module_tensors(part.source, part.pieces)) for part in (one, other)]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def module_tensors(source, pieces):
    from library.files.weights_source import module_tensors as stream

    return stream(source, pieces)


@pytest.mark.parametrize(
    ("form", "parts"), [("sd1", ("vae",)), ("sdxl_folder", ("text",)), ("sd2", ("denoiser",)), ("sd1_ckpt", ())]
)
def test_only_the_parts_that_are_asked_for_are_read(form, parts, tiny_sd):
    layouts = read(form, tiny_sd[form], parts)
    found = {"denoiser": layouts.denoiser is not None, "text": bool(layouts.text), "vae": layouts.vae is not None}
    assert {name for name, is_there in found.items() if is_there} == set(parts)


@pytest.mark.parametrize("role", ["vae", "vae_folder", "sd1_folder", "sd1", "sdxl", "sd1_ckpt"])
def test_a_named_vae_wins_over_the_bundled_one(role, tiny_sd):
    """A file of its own, a folder of its own, or the one in a whole model of any form."""
    layouts = read("sdxl", tiny_sd["sdxl"], model={"vae": str(tiny_sd[role])})
    assert layouts.vae.source.path in (
        tiny_sd[role],
        tiny_sd[role] / "vae",
        *tiny_sd[role].glob("*.safetensors"),
        *tiny_sd[role].glob("vae/*"),
    )
    assert layouts.denoiser.source.path == tiny_sd["sdxl"]


def test_a_named_vae_alone_needs_no_model(tiny_sd):
    options = options_for("sd1", None, model={"vae": str(tiny_sd["vae"])})
    assert STABLE_DIFFUSION.read_layouts(options, {"vae"}).vae is not None
    with pytest.raises(CheckpointError, match="--pretrained_model_name_or_path is missing"):
        STABLE_DIFFUSION.read_layouts(options_for("sd1"), {"vae"})


def test_a_folder_without_its_index_works(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd["sd1_folder"], tmp_path / "model")
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "scheduler")
    assert read("sd1", folder).marks == Marks(where="its scheduler/scheduler_config.json")


def test_looking_needs_no_torch(tiny_sd):
    code = (
        "import sys\nfrom dataclasses import replace\nfrom library.options.sd import SdxlTrainOptions\n"
        "from library.sdxl.architecture import SDXL\noptions = SdxlTrainOptions()\n"
        f"options = replace(options, model=replace(options.model, pretrained_model_name_or_path={str(tiny_sd['sdxl'])!r}))\n"
        "layouts = SDXL.read_layouts(options)\nSDXL.latent_recipe(layouts, options), SDXL.text_recipe(layouts, options)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- what is refused


def test_versions_and_their_flag(tiny_sd):
    without = {"clip": {"v2": False}}
    for form in ("sd2", "sd2_folder"):
        assert problem_of(form, tiny_sd[form], **without).endswith("is a Stable Diffusion 2.x checkpoint: add --v2")
    for form in ("sd1", "sd1_folder", "sd1_ckpt"):
        assert "1.x checkpoint, but --v2 says 2.x: drop --v2" in problem_of("sd2", tiny_sd[form])


@pytest.mark.parametrize("form", ["sdxl", "sdxl_folder"])
def test_sdxl_belongs_to_its_own_script(form, tiny_sd):
    assert (
        "is an SDXL checkpoint (sdxl_train_network.py trains those), not a Stable Diffusion 1.x or 2.x checkpoint"
        in problem_of("sd1", tiny_sd[form])
    )


@pytest.mark.parametrize(
    ("form", "script"), [("sd1", "train_network.py"), ("sd2", "train_network.py --v2"), ("sd1_folder", "train_network.py")]
)
def test_sdxls_script_names_the_script_of_others(form, script, tiny_sd):
    problem = problem_of("sdxl", tiny_sd[form])
    assert f"({script} trains those), not an SDXL checkpoint" in problem


def test_anima_belongs_to_its_own_script(tiny_anima, tiny_sd):
    from library.anima.layout import read_denoiser_layout

    for kind in ("sd1", "sdxl"):
        assert "is an Anima DiT (anima_train_network.py trains those)" in problem_of(kind, tiny_anima["dit"])
        with pytest.raises(
            CheckpointError, match=f"{ARCHITECTURES[kind].name if kind == 'sdxl' else ''}.*_?train_network.py trains those"
        ):
            read_denoiser_layout(tiny_sd[kind])


OTHERS = {
    "SD3 or SD3.5 checkpoint": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "Lumina Image 2.0 checkpoint": ["cap_embedder.0.weight"],
    "FLUX checkpoint": ["double_blocks.0.img_attn.qkv.weight"],
    "ControlNet": ["control_model.input_blocks.1.1.transformer_blocks.0.norm1.weight"],
    "SDXL refiner checkpoint": ["conditioner.embedders.0.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"],
    "Stable Diffusion unCLIP checkpoint": ["cond_stage_model.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"],
    "LoRA file": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "Stable Diffusion VAE": ["encoder.mid.block_1.norm1.weight"],
    "CLIP text encoder": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("form", ["sd1", "sdxl"])
def test_files_of_other_models_are_named(kind, form, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {key: torch.zeros(1) for key in OTHERS[kind]})
    assert f"x.safetensors is {'an' if kind[:3] in ('SD3', 'SDX') else 'a'} {kind}" in problem_of(
        form, tmp_path / "x.safetensors"
    )


def test_unknown_keys_are_named(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"some.weight": torch.zeros(1)})
    assert "none of its 1 keys is known, for example some.weight" in problem_of("sd1", tmp_path / "x.safetensors")


def test_a_folder_of_another_pipeline_is_named(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    assert "is a folder of StableDiffusion3Pipeline: it has no unet/, but transformer/" in problem_of("sd1", tmp_path)


def test_a_refiner_folder_is_named(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd["sdxl_folder"], tmp_path / "refiner")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    changed_file(file, file, lambda tensors: {**tensors, "add_embedding.linear_1.weight": torch.zeros(8, 2560)})
    assert "is an SDXL refiner checkpoint, not an SDXL checkpoint; give it the SDXL base model" in problem_of("sdxl", folder)


@pytest.mark.parametrize("form", ["sd1", "sd1_folder"])
def test_an_inpainting_model_is_named(form, tiny_sd, tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight" if form == "sd1" else "conv_in.weight"
    wide = {key: torch.zeros(32, 9, 3, 3)}
    if form == "sd1":
        model = changed_file(tiny_sd["sd1"], tmp_path / "x.safetensors", lambda tensors: {**tensors, **wide})
    else:
        model = shutil.copytree(tiny_sd[form], tmp_path / "x")
        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        changed_file(file, file, lambda tensors: {**tensors, **wide})
    assert "is an inpainting model: its U-Net takes 9 channels instead of 4" in problem_of(form, model)


def test_what_a_checkpoint_lacks_is_named(tiny_sd, tmp_path):
    def without(prefix):
        return changed_file(
            tiny_sd["sd1"], tmp_path / "x.safetensors", lambda ts: {n: t for n, t in ts.items() if not n.startswith(prefix)}
        )

    assert "x.safetensors has no VAE: name one with --vae" in problem_of("sd1", without("first_stage_model."))
    assert read("sd1", tmp_path / "x.safetensors", model={"vae": str(tiny_sd["vae"])}).vae is not None
    assert "lacks a text encoder (cond_stage_model.transformer.*)" in problem_of("sd1", without("cond_stage_model."))
    unet = changed_file(
        tiny_sd["sd1"],
        tmp_path / "unet.safetensors",
        lambda ts: {n.removeprefix("model.diffusion_model."): t for n, t in ts.items() if "diffusion_model" in n},
    )
    assert "unet.safetensors is a U-Net alone" in problem_of("sd1", unet, ("denoiser",))


def test_the_problems_of_all_parts_come_together(tiny_sd, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read("sd1", tmp_path / "gone.safetensors", model={"vae": str(tmp_path / "no_vae.pt")})
    assert len(caught.value.problems) == 2
    broken = changed_file(tiny_sd["sd1"], tmp_path / "x.safetensors",
                          lambda ts: {n: t for n, t in ts.items() if not n.endswith(("conv_in.bias", "input_blocks.0.0.bias", "final_layer_norm.bias"))})  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        read("sd1", broken)
    assert len(caught.value.problems) == 3


def test_a_vae_flag_with_something_else_is_named(tiny_sd, tiny_anima):
    problem = problem_of("sd1", tiny_sd["sd1"], model={"vae": str(tiny_anima["vae"])})
    assert problem.startswith("--vae ") and "Qwen-Image VAE" in problem


def test_parts_of_different_models_are_told(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd["sdxl_folder"], tmp_path / "mixed")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder / "text_encoder_2", folder / "text_encoder")
    assert "its U-Net takes text of width 80, its text encoder gives 96" in problem_of("sdxl", folder)


def test_a_vae_that_says_it_is_of_another_family(tiny_sd):
    vae = str(tiny_sd["sd1_folder"] / "vae")
    options = options_for("sdxl", tiny_sd["sdxl"], model={"vae": vae})
    (warning,) = SDXL.warnings_of(SDXL.read_layouts(options), options)
    assert "scaling_factor = 0.18215, as VAEs of Stable Diffusion 1.x and 2.x do; this model has 0.13025" in warning
    options = options_for("sd1", tiny_sd["sd1"], model={"vae": vae})
    assert not list(STABLE_DIFFUSION.warnings_of(STABLE_DIFFUSION.read_layouts(options), options))


def test_clip_skip_beyond_the_layers(tiny_sd):
    assert "--clip_skip is 4, but the text encoder has 3 layers" in problem_of("sd1", tiny_sd["sd1"], clip={"clip_skip": 4})
    assert read("sd1", tiny_sd["sd1"], clip={"clip_skip": 3}).text


# ---------------------------------------------------------------- marks


@pytest.fixture(scope="module")
def velocity(tmp_path_factory) -> dict[str, Path]:
    return make_sd(tmp_path_factory.mktemp("velocity"), "sdxl", layouts=("file", "folder"), v_prediction=True)


@pytest.mark.parametrize(
    ("form", "where"), [("file", "its keys v_pred and ztsnr"), ("folder", "its scheduler/scheduler_config.json")]
)
def test_marks_of_velocity_want_their_flags(velocity, form, where):
    assert f"predicts velocity (v) according to {where}: add --v_parameterization" in problem_of("sdxl", velocity[form])
    options = options_for("sdxl", velocity[form], ddpm={"v_parameterization": True})
    layouts = SDXL.read_layouts(options)
    assert layouts.marks == Marks(prediction=VELOCITY, zero_terminal_snr=True, where=where)
    (warning,) = SDXL.warnings_of(layouts, options)
    assert f"according to {where}: add --zero_terminal_snr" in warning
    both = replace(options, ddpm=replace(options.ddpm, zero_terminal_snr=True))
    assert not list(SDXL.warnings_of(layouts, both))


def test_a_folder_that_says_epsilon_refuses_velocity(tiny_sd):
    problem = problem_of("sdxl_folder", tiny_sd["sdxl_folder"], ddpm={"v_parameterization": True})
    assert "predicts noise (epsilon) according to its scheduler/scheduler_config.json: drop --v_parameterization" in problem


@pytest.mark.parametrize(
    ("said", "flag", "word"), [("v", False, "add"), ("epsilon", True, "drop"), ("v", True, None), ("else", False, None)]
)
def test_metadata_alone_warns(said, flag, word, tiny_sd, tmp_path):
    model = changed_file(tiny_sd["sd1"], tmp_path / "x.safetensors", dict, {"modelspec.prediction_type": said})
    options = options_for("sd1", model, ddpm={"v_parameterization": flag})
    warnings = list(STABLE_DIFFUSION.warnings_of(STABLE_DIFFUSION.read_layouts(options), options))
    if word is None:
        assert warnings == []
    else:
        assert f"according to its metadata (modelspec.prediction_type = {said}): {word} --v_parameterization" in warnings[0]


def test_a_file_without_marks_takes_either_flag(tiny_sd):
    for flag in (True, False):
        assert read("sd2", tiny_sd["sd2"], ddpm={"v_parameterization": flag}).marks == Marks()
    assert {EPSILON, VELOCITY} == {"epsilon", "v"}


# ---------------------------------------------------------------- caches and tokens


def recipes(form: str, path: object, /, **groups):
    architecture, options = ARCHITECTURES[form.partition("_")[0]], options_for(form, path, **groups)
    layouts = architecture.read_layouts(options)
    return architecture.latent_recipe(layouts, options), architecture.text_recipe(layouts, options)


def test_caches_depend_on_the_weights_that_make_them_not_on_the_file(tiny_sd, tmp_path):
    latents, text = recipes("sd1", tiny_sd["sd1"])
    assert (latents.arch, latents.channels, latents.shrink, latents.dtype) == ("sd", 4, 8, "float32")
    moved = shutil.copy(tiny_sd["sd1"], tmp_path / "moved.safetensors")
    assert recipes("sd1", moved) == (latents, text)
    other_unet = changed_file(tiny_sd["sd1"], tmp_path / "tuned.safetensors",
                              lambda ts: {n: t + 1 if "diffusion_model" in n else t for n, t in ts.items()})  # fmt: skip
    assert recipes("sd1", other_unet) == (latents, text)
    other_text = changed_file(tiny_sd["sd1"], tmp_path / "text.safetensors",
                              lambda ts: {n: t * 2 if n.endswith("layers.1.mlp.fc1.bias") else t for n, t in ts.items()})  # fmt: skip
    found = recipes("sd1", other_text)
    assert found[0] == latents and found[1] != text
    assert recipes("sd1", tiny_sd["sd1"], model={"vae": str(tiny_sd["vae"])})[0] != latents
    assert recipes("sd1_ckpt", tiny_sd["sd1_ckpt"])[0] != latents  # of a pickle, the whole file counts
    assert recipes("sd1_ckpt", tiny_sd["sd1_ckpt"]) == recipes("sd1_ckpt", shutil.copy(tiny_sd["sd1_ckpt"], tmp_path / "x.ckpt"))


def test_one_vae_in_two_files_is_one_to_the_cache(tiny_sd, tmp_path):
    own = make_sd(tmp_path, "sd1", layouts=("vae",))["vae"]
    config = json.loads(read_header(tiny_sd["sd1"]).metadata["config"])
    assert config["vae"] == {"norm_groups": 32}
    assert recipes("sd1", tiny_sd["sd1"], model={"vae": str(own)})[0] == recipes("sd1", tiny_sd["sd1"])[0]


def test_latents_depend_on_precision_and_scale(tiny_sd):
    half = {"run": {"mixed_precision": "fp16"}}
    assert recipes("sdxl", tiny_sd["sdxl"], **half)[0].dtype == "float16"
    assert recipes("sdxl", tiny_sd["sdxl"], **half, model={"no_half_vae": True})[0].dtype == "float32"
    same_vae = {"model": {"vae": str(tiny_sd["vae"])}}
    one, other = recipes("sd1", tiny_sd["sd1"], **same_vae)[0], recipes("sdxl", tiny_sd["sdxl"], **same_vae)[0]
    assert one.vae_fingerprint != other.vae_fingerprint  # 0.18215 and 0.13025


@pytest.mark.parametrize(
    "group", [{"clip_skip": 2}, {"max_token_length": 150}, {"weighted_captions": True}], ids=lambda group: next(iter(group))
)
def test_text_depends_on_what_changes_it(group, tiny_sd):
    assert recipes("sd1", tiny_sd["sd1"], clip=group)[1] != recipes("sd1", tiny_sd["sd1"])[1]
    is_same = recipes("sdxl", tiny_sd["sdxl"], clip=group)[1] == recipes("sdxl", tiny_sd["sdxl"])[1]
    assert is_same == ("clip_skip" in group)  # which SDXL is trained without


def test_v2_is_another_tokenizer(tiny_sd, tmp_path):
    """Which the encoder alone does not show, as when only texts are cached of a model on the hub."""
    folder = tmp_path / "part"
    shutil.copytree(tiny_sd["sd1_folder"] / "text_encoder", folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    found = []
    for v2 in (False, True):
        options = options_for("sd1", folder, clip={"v2": v2})
        found.append(STABLE_DIFFUSION.text_recipe(STABLE_DIFFUSION.read_layouts(options, ("text",)), options))
    assert found[0] != found[1]


def test_text_in_8_bits_is_another(tiny_sd):
    assert recipes("sdxl", tiny_sd["sdxl"], memory={"fp8_base": True})[1] != recipes("sdxl", tiny_sd["sdxl"])[1]
    assert recipes("sd1", tiny_sd["sd1"], clip={"clip_skip": 1})[1] == recipes("sd1", tiny_sd["sd1"])[1]


def test_tokens_are_counted_without_any_model_file():
    assert STABLE_DIFFUSION.token_counter(options_for("sd1"))("a cat") == (TokenUse("CLIP-L", 2, 75, None),)
    assert STABLE_DIFFUSION.token_counter(options_for("sd2"))("a cat") == (TokenUse("OpenCLIP-H", 2, 75, None),)
    counter = SDXL.token_counter(options_for("sdxl", clip={"max_token_length": 150, "weighted_captions": True}))
    assert counter("(a cat:1.2)") == (TokenUse("CLIP-L", 2, 150, None), TokenUse("OpenCLIP-G", 2, 150, None))


def test_captions_that_are_cut_or_weighted_in_vain():
    training_set = captions("dog " * 100, "a (cat:1.3)")
    for architecture, kind in ((STABLE_DIFFUSION, "sd1"), (STABLE_DIFFUSION, "sd2"), (SDXL, "sdxl")):
        cut, weighted = architecture.caption_warnings(training_set, options_for(kind))
        assert cut.startswith("1 of 2 captions is longer than the 75 tokens") and "100 tokens): raise --max_token_length" in cut
        assert weighted.startswith("1 of 2 captions has weights (such as '(cat:1.3)'") and "--weighted_captions" in weighted
        options = options_for(kind, clip={"max_token_length": 225, "weighted_captions": True})
        assert not list(architecture.caption_warnings(training_set, options))


def test_long_prompts_are_cut():
    """Stable Diffusion takes three rows of them whatever the captions' length is, SDXL as much as of a caption."""
    long, short = "dog " * 230, "(cat:1.2) " * 75
    options = options_for("sd1", clip={"max_token_length": 150})
    assert list(STABLE_DIFFUSION.cut_prompts([short, long, long], options)) == [(long, TokenUse("CLIP-L", 230, 225, 900))]
    for tokens, cut in ((None, [long]), (225, [long]), (150, [long])):
        options = options_for("sdxl", clip={"max_token_length": tokens})
        found = list(SDXL.cut_prompts([short, long], options))
        assert [text for text, _ in found] == cut and found[0][1].limit == (tokens or 75)
    assert lost_text(*found[0]).startswith("has 230 tokens, of which CLIP-L takes 150: cut off is 'dog dog")


def test_every_sampler_of_the_flag_is_one_that_prompts_may_name():
    assert DRAWN == SAMPLERS
    assert {f"sample_sampler={name}" for name in SAMPLERS} <= SDXL.prompt_settings == STABLE_DIFFUSION.prompt_settings


def test_the_fingerprint_of_shards_is_that_of_their_tensors(tiny_sd, tmp_path):
    from library.sd.fingerprint import part_fingerprint

    folder = shutil.copytree(tiny_sd["sdxl_folder"], tmp_path / "sharded")
    whole = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = dict(read_tensors(read_header(whole)))
    names = sorted(tensors)
    shards = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for name, own in shards.items():
        save_safetensors(whole.with_name(name), {key: tensors[key] for key in own})
    weight_map = {key: name for name, own in shards.items() for key in own}
    whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = part_fingerprint(read("sdxl", folder).vae)
    whole.unlink()
    layouts = read("sdxl", folder)
    assert len(layouts.vae.source.shards) == 2 and part_fingerprint(layouts.vae) == before
    assert open_weights(folder / "vae", flag="--vae").shapes.keys() == tensors.keys()


@pytest.mark.parametrize(("kind", "warned"), [("sd1", True), ("sdxl", True), ("sd2", False)])
def test_velocity_that_no_mark_speaks_of(kind, warned, tiny_sd):
    architecture = SDXL if kind == "sdxl" else STABLE_DIFFUSION
    options = options_for(kind, tiny_sd[kind], ddpm={"v_parameterization": True}, clip={"v2": kind == "sd2"})
    warnings = list(architecture.warnings_of(architecture.read_layouts(options), options))
    assert len(warnings) == warned
    assert all("does not say that it predicts velocity (v), and models of its kind predict noise" in text for text in warnings)
    assert not list(architecture.warnings_of(architecture.read_layouts(options, {"vae"}), options))  # caching does not ask


@pytest.mark.parametrize(("form", "line"), [
    ("sd1", "Stable Diffusion 1.x, {}; text encoder and VAE in it"),
    ("sd2_folder", "Stable Diffusion 2.x, {}; text encoder and VAE in it"),
    ("sdxl", "SDXL, {}; CLIP-L, CLIP-G and VAE in it"),
])  # fmt: skip
def test_the_plan_names_model_and_files(form, line, tiny_sd):
    architecture, options = ARCHITECTURES[form.partition("_")[0]], options_for(form, tiny_sd[form])
    assert list(architecture.model_lines(architecture.read_layouts(options), options)) == [
        f"model: {line.format(tiny_sd[form].name)}"
    ]
    options = options_for(form, tiny_sd[form], model={"vae": str(tiny_sd["sd1_ckpt"])})
    (told,) = architecture.model_lines(architecture.read_layouts(options), options)
    assert told.endswith(f" in it; VAE {tiny_sd['sd1_ckpt'].name}")
