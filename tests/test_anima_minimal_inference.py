"""The inference script in this process, on tiny models: what it draws, saves, merges and reads."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from anima_minimal_inference import CHECKS, AnimaPictureMaker
from anima_train_network import AnimaNetworkTrainer
from library.anima.architecture import ANIMA
from library.anima.checkpoint import build_denoiser
from library.anima.layout import read_denoiser_layout
from library.anima.text import build_qwen3
from library.anima.text_layout import read_text_encoder_layout
from library.anima.tokenizers import AnimaTokenizers, TokenizerFiles
from library.errors import NetworkError, OptionError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.options.anima_inference import AnimaInferenceOptions
from library.options.command_line import read_options
from library.sampling.inference_checks import check_pictures
from library.sampling.pictures import picture_parameters
from library.sampling.prompts import SamplePrompt
from networks import lora_anima
from tools.tiny_anima import SIZES, make_anima

NAME = re.compile(r"\d{8}-\d{6}-\d{3}_(\w+?)(-\d+)?(_latent)?\.(png|safetensors)")


@pytest.fixture(scope="module")
def tokenizers() -> AnimaTokenizers:
    return AnimaTokenizers.bundled()


@pytest.fixture(autouse=True)
def tokenizers_are_loaded_once(tokenizers, monkeypatch):
    """They take most of a second each time."""
    monkeypatch.setattr(TokenizerFiles, "load", lambda self: tokenizers)


@pytest.fixture
def maker(tiny_anima, tmp_path):
    """``maker("--prompt=a cat", ...)``: what the script makes of this command line, not started yet; four steps, 64 x 64."""

    def make(*flags: object, base=("--image_size", 64, 64, "--infer_steps=4", "--seed=7", "--device=cpu")) -> AnimaPictureMaker:
        models = [f"--dit={tiny_anima['dit']}", f"--text_encoder={tiny_anima['qwen3']}", f"--vae={tiny_anima['vae']}"]
        argv = [*models, f"--save_path={tmp_path / 'out'}", *base, *flags]
        return AnimaPictureMaker(check_pictures(read_options(AnimaInferenceOptions, list(map(str, argv))), CHECKS))

    return make


@pytest.fixture
def draw(maker, tmp_path):
    """Runs the command line; -> the files that it has written, by their whole name."""

    def run(*flags: object, **changes) -> dict[str, Path]:
        before = set((tmp_path / "out").glob("*"))
        maker(*flags, **changes).make()
        return {path.name: path for path in sorted(set((tmp_path / "out").glob("*")) - before)}

    return run


def latent(draw, *flags: object) -> torch.Tensor:
    (path,) = draw("--output_type=latent", *flags).values()
    return dict(read_tensors(read_header(path)))["latent"]


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)


@pytest.fixture
def lora_file(tiny_anima, tmp_path):
    """``lora_file(name, text_encoder=False, seed=0)``: a LoRA with an effect, for the denoiser and, if asked, for Qwen3."""

    def write(name="lora.safetensors", *, seed=0, text_encoder=False) -> Path:
        encoders = [build_qwen3(read_text_encoder_layout(tiny_anima["qwen3"]).config)] if text_encoder else []
        denoiser = build_denoiser(read_denoiser_layout(tiny_anima["dit"]).config)
        network = lora_anima.create_network(1.0, 2, 2, None, encoders, denoiser)
        network.apply_to(encoders, denoiser, text_encoder, True)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        network.save_weights(tmp_path / name, torch.float32, {})
        return tmp_path / name

    return write


def test_a_sample_tells_all_that_was_not_given():
    trainer = AnimaNetworkTrainer.__new__(AnimaNetworkTrainer)
    trainer.options = SimpleNamespace(samples=SimpleNamespace(sample_sampler="euler_a"))
    trainer.run = SimpleNamespace(architecture=ANIMA)
    plain = trainer.plan_sample(SamplePrompt(prompt="a cat", index=0, sample_sampler="ddim"), 7)
    assert picture_parameters(plain, {}) == ("a cat\nSteps: 30, Sampler: euler, CFG scale: 7.5, Seed: 7, Shift: 3, Size: 512x512")
    odd = trainer.plan_sample(SamplePrompt(prompt="a", index=0, sample_steps=0, scale=0.5, negative_prompt="b", width=70), 7)
    assert picture_parameters(odd, {}) == "a\nSteps: 1, Sampler: euler, CFG scale: 1, Seed: 7, Shift: 3, Size: 64x512"


# ---------------------------------------------------------------- pictures


def test_a_picture_tells_how_it_was_drawn_and_comes_out_again(draw, tiny_anima):
    flags = ("--prompt=a cat, sitting", "--negative_prompt=rain", "--sampler=er_sde", "--flow_shift=2.5")
    ((name, path),) = draw(*flags).items()
    assert NAME.fullmatch(name)[1] == "7"
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        assert picture.text["parameters"] == (
            "a cat, sitting\nNegative prompt: rain\nSteps: 4, Sampler: er_sde, CFG scale: 3.5, Seed: 7, Shift: 2.5, Size: 64x64, "
            f"Model: {tiny_anima['dit'].name}, Text encoder: {tiny_anima['qwen3'].name}, VAE: {tiny_anima['vae'].name}, "
            "Precision: float32"
        )
    ((_, again),) = draw(*flags).items()
    assert torch.equal(pixels(path), pixels(again)) and pixels(path).float().std() > 1
    ((_, other),) = draw(*flags, "--seed=8").items()
    assert not torch.equal(pixels(path), pixels(other))


def test_several_pictures_count_seeds_up_and_each_is_what_it_would_be_alone(draw):
    files = draw("--prompt=a cat", "--images_per_prompt=3", "--batch_size=2", "--output_type=latent", "--sampler=er_sde")
    assert sorted(NAME.fullmatch(name)[1] for name in files) == ["7", "8", "9"]
    for name, path in files.items():
        together = dict(read_tensors(read_header(path)))["latent"]
        alone = latent(draw, "--prompt=a cat", "--sampler=er_sde", f"--seed={NAME.fullmatch(name)[1]}")
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_without_a_seed_each_prompt_gets_one_that_is_told(maker, tmp_path, caplog):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    with caplog.at_level("INFO", logger="library"):
        maker(f"--from_file={tmp_path / 'two.txt'}", base=("--image_size", 64, 64, "--infer_steps=1")).make()
    seeds = [NAME.fullmatch(path.name)[1] for path in (tmp_path / "out").glob("*.png")]
    assert len(set(seeds)) == 2 and all(f"(seed {seed})" in caplog.text for seed in seeds)
    assert "2 pictures in" in caplog.text and "loading models" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "# a note\na cat --w 96 --h 64 --d 42 --s 3 --g 2 --fs 3 --n rain --ss er_sde\n"),
        ("p.toml", '[prompt]\nprompt = "a cat"\nwidth = 96\nheight = 64\nseed = 42\nsample_steps = 3\nscale = 2.0\nflow_shift = 3.0\n'
                   'negative_prompt = "rain"\nsample_sampler = "er_sde"\n'),
        ("p.json", '["a cat --w 96 --h 64 --d 42 --s 3 --l 2 --fs 3 --n rain --ss er_sde"]'),
    ],
)  # fmt: skip
def test_prompt_files_say_the_same_as_flags(draw, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    flags = ["--prompt=a cat", "--image_size", 64, 96, "--seed=42", "--infer_steps=3", "--guidance_scale=2", "--flow_shift=3",
             "--negative_prompt=rain", "--sampler=er_sde"]  # fmt: skip
    assert torch.equal(latent(draw, f"--from_file={tmp_path / name}"), latent(draw, *flags))


def test_guidance_of_one_needs_no_negative_and_below_one_goes_towards_it(draw):
    one = latent(draw, "--prompt=a cat", "--guidance_scale=1")
    assert torch.equal(one, latent(draw, "--prompt=a cat", "--guidance_scale=1", "--negative_prompt=rain"))
    none = latent(draw, "--prompt=a cat", "--guidance_scale=0", "--negative_prompt=rain")
    torch.testing.assert_close(none, latent(draw, "--prompt=rain", "--guidance_scale=1"), rtol=1e-4, atol=1e-4)


def test_saved_latents_become_the_same_picture_later(draw, tmp_path):
    files = draw("--prompt=a cat", "--output_type=latent_images")
    picture, saved = (next(path for name, path in files.items() if name.endswith(end)) for end in (".png", ".safetensors"))
    assert picture.name.removesuffix(".png") == saved.name.removesuffix("_latent.safetensors")
    ((name, again),) = draw("--latent_path", saved).items()
    assert NAME.fullmatch(name)[1] == "7" and torch.equal(pixels(again), pixels(picture))
    with Image.open(again) as first, Image.open(picture) as second:
        assert first.text == second.text
    tensor = dict(read_tensors(read_header(saved)))["latent"]
    foreign = tmp_path / "foreign.safetensors"
    save_safetensors(foreign, {"latent": tensor[None, :, None]})  # as others save them: (1, C, 1, h, w), without metadata
    ((name, again),) = draw("--latent_path", foreign).items()
    assert name.endswith("_foreign.png") and torch.equal(pixels(again), pixels(picture))


@pytest.mark.parametrize("seed", ["../../elsewhere/x", "9" * 300, ""])
def test_a_seed_in_a_file_is_no_path(draw, tmp_path, seed):
    save_safetensors(tmp_path / "odd.safetensors", {"latent": torch.zeros(16, 2, 2)}, {"seed": seed})
    ((name, path),) = draw("--latent_path", tmp_path / "odd.safetensors").items()
    assert name.endswith("_odd.png") and path.parent == tmp_path / "out"


def test_no_metadata(draw):
    files = draw("--prompt=a cat", "--output_type=latent_images", "--no_metadata")
    for path in files.values():
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert not getattr(picture, "text", {})
        else:
            assert read_header(path).metadata == {}


def test_nothing_is_overwritten(draw, monkeypatch):
    monkeypatch.setattr("library.sampling.inference.time", SimpleNamespace(time=lambda: 1.8e9, perf_counter=lambda: 0.0))
    first, second = (next(iter(draw("--prompt=a cat").values())) for _ in range(2))
    assert second.name == first.name.replace(".png", "-2.png")


# ---------------------------------------------------------------- memory


def test_savers_of_memory_change_nothing(draw):
    plain = latent(draw, "--prompt=a cat")
    for flags in (["--offload", "--attn_mode=sdpa"], ["--text_encoder_cpu", "--split_attn"]):
        assert torch.equal(latent(draw, "--prompt=a cat", *flags), plain), flags
    chunked, whole = (draw("--prompt=a cat", *flags) for flags in (["--vae_chunk_size=4", "--vae_disable_cache"], []))
    difference = pixels(*chunked.values()).int() - pixels(*whole.values()).int()
    assert difference.abs().max() <= 1


def test_block_swap_draws_the_same(draw, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "deep", replace(SIZES["tiny"], blocks=5))
    flags = ["--prompt=a cat", f"--dit={make_anima(tmp_path / 'deep', size='deep')['dit']}"]
    for more in ([], ["--fp8_scaled"]):
        plain = latent(draw, *flags, *more)
        assert torch.equal(latent(draw, *flags, *more, "--blocks_to_swap=3"), plain)


@pytest.mark.parametrize("flag", ["--fp8", "--fp8_scaled"])
def test_8_bit_weights_are_close(draw, lora_file, flag):
    flags = ["--prompt=a cat", "--lora_weight", lora_file()]
    plain, quantised = latent(draw, *flags), latent(draw, *flags, flag)
    error = (plain - quantised).norm() / plain.norm()
    assert 0 < error < 0.1


# ---------------------------------------------------------------- LoRA files


def test_merged_files_draw_what_the_network_draws(maker, draw, lora_file):
    """The merged model against the LoRA beside the frozen model, as in training."""
    file = lora_file(text_encoder=True)
    plain = latent(draw, "--prompt=a cat")
    merged = latent(draw, "--prompt=a cat", "--lora_weight", file, "--lora_multiplier", 0.5)
    assert (merged - plain).abs().max() > 0.01
    torch.testing.assert_close(merged, beside(maker("--prompt=a cat"), file, 0.5), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def beside(maker: AnimaPictureMaker, file: Path, multiplier: float) -> torch.Tensor:
    saved = []
    load_denoiser, load_text_encoder = maker.load_denoiser, maker.load_text_encoder
    networks = {}

    def apply(which: str, encoders, denoiser) -> None:
        weights = {key: value for key, value in read_tensors(read_header(file)) if key.startswith(which)}
        network, _ = lora_anima.create_network_from_weights(multiplier, file, None, encoders, denoiser, weights_sd=weights)
        network.apply_to(encoders, denoiser)
        network.load_state_dict(weights)
        networks[which] = network

    def with_network() -> None:
        load_denoiser()
        apply("lora_unet", [], maker.denoiser)

    def encoder_with_network() -> None:
        load_text_encoder()
        apply("lora_te", [maker.text_encoder.model], None)

    maker.load_denoiser, maker.load_text_encoder = with_network, encoder_with_network
    maker.save = lambda picture, latent: saved.append(latent[0])
    maker.make()
    return saved[0]


def test_strength_zero_changes_nothing_and_files_add_up(draw, lora_file):
    first, second = lora_file("a.safetensors", seed=1), lora_file("b.safetensors", seed=2)
    plain = latent(draw, "--prompt=a cat")
    assert torch.equal(latent(draw, "--prompt=a cat", "--lora_weight", first, "--lora_multiplier", 0), plain)
    both = latent(draw, "--prompt=a cat", "--lora_weight", first, second, "--lora_multiplier", 1, -1)
    turned = latent(draw, "--prompt=a cat", "--lora_weight", second, first, "--lora_multiplier", -1, 1)
    torch.testing.assert_close(both, turned, rtol=1e-3, atol=1e-3)
    same = latent(draw, "--prompt=a cat", "--lora_weight", first, first, "--lora_multiplier", 1, -1)
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-3)


def test_metadata_names_the_files(draw, lora_file):
    file = lora_file("my, lora.safetensors")
    (path,) = draw("--prompt=a cat", "--lora_weight", file, "--lora_multiplier", 0.8, "--include_patterns", "mlp").values()
    with Image.open(path) as picture:
        text = picture.text["parameters"]
    assert 'LoRA: "my, lora.safetensors (0.8)"' in text and "LoRA modules: mlp" in text


def test_patterns_choose_modules(draw, lora_file):
    file = lora_file(text_encoder=True)
    plain = latent(draw, "--prompt=a cat")
    lora = ["--prompt=a cat", "--lora_weight", file]
    everything = latent(draw, *lora)
    without = latent(draw, *lora, "--exclude_patterns", r"mlp\.layer", "lora_te_")  # a path in the model, a name in the file
    only = latent(draw, *lora, "--include_patterns", "self_attn", "cross_attn", "--exclude_patterns", "lora_te")
    assert not torch.equal(without, everything) and not torch.equal(without, plain) and torch.equal(without, only)
    for flags, words in (
        (["--include_patterns", "nothing_like_this"], "--include_patterns nothing_like_this fits no module"),
        (["--include_patterns", "mlp", "--exclude_patterns", "lora"], "leave no module"),
    ):
        with pytest.raises(NetworkError, match=words):
            draw(*lora, *flags)


def test_layouts_of_other_programs(draw, lora_file, tmp_path):
    from networks.anima_layouts import ANIMA_NAMES
    from networks.layout_names import COMFY, DIFFUSERS
    from networks.lora_formats import by_our_name, convert, write_lora_file

    file = lora_file()
    expected = latent(draw, "--prompt=a cat", "--lora_weight", file)
    tensors = dict(read_tensors(read_header(file)))
    keys = {key: ANIMA_NAMES.find(key) for key in tensors}
    for layout in (COMFY, DIFFUSERS):
        other = tmp_path / f"{layout}.safetensors"
        write_lora_file(other, convert(file, by_our_name(file, tensors, keys), layout).tensors, {})
        torch.testing.assert_close(latent(draw, "--prompt=a cat", "--lora_weight", other), expected, rtol=1e-3, atol=1e-3)


def test_a_lora_for_another_model_does_not_fit(maker, tmp_path):
    file = tmp_path / "sdxl.safetensors"
    pair = {"lora_down.weight": torch.zeros(2, 4), "lora_up.weight": torch.zeros(4, 2)}
    save_safetensors(file, {f"lora_unet_input_blocks_4_1_proj_in.{part}": tensor for part, tensor in pair.items()})
    with pytest.raises(Exception, match="sdxl.safetensors") as caught:
        maker("--prompt=a cat", "--lora_weight", file)
    assert type(caught.value).__name__ in ("NetworkError", "CheckpointError")


def test_lycoris_needs_its_package(maker, lora_file, monkeypatch):
    """One that is there but cannot be imported; one that is missing is told by the checks."""
    import sys

    for name in ("lycoris", "lycoris.kohya"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("library.sampling.inference_checks.find_spec", lambda name: object())
    with pytest.raises(NetworkError, match="pip install lycoris-lora"):
        maker("--prompt=a cat", "--lycoris", "--lora_weight", lora_file()).make()


def test_lycoris_files_are_merged_by_the_package(draw, tmp_path, lora_file):
    pytest.importorskip("lycoris.kohya")
    plain = latent(draw, "--prompt=a cat")
    file = tmp_path / "lokr.safetensors"
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.full((128, 32), 0.05), "alpha": torch.tensor(1.0)}
    save_safetensors(file, {f"lora_unet_blocks_0_mlp_layer1.{part}": tensor for part, tensor in factors.items()})
    flags = ["--prompt=a cat", "--lycoris", "--lora_weight", file]
    assert torch.equal(latent(draw, *flags, "--lora_multiplier", 0), plain)
    merged = latent(draw, *flags)
    assert (merged - plain).abs().max() > 1e-3
    quantised = latent(draw, *flags, "--fp8_scaled")
    assert 0 < (quantised - merged).norm() < 0.1 * merged.norm()
    usual = ["--prompt=a cat", "--lora_multiplier", 0.5, "--lora_weight", lora_file(text_encoder=True)]
    torch.testing.assert_close(latent(draw, *usual, "--lycoris"), latent(draw, *usual), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- from the console


def test_interactive_lines(maker, tmp_path, monkeypatch, capsys):
    lines = "a cat --d 5\n\n# a note\na dog --s three --q 4\na bird --ss ddim\na cow --d 6 --l 1 --w 70\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    one = maker("--interactive", "--offload")
    one.make()
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [NAME.fullmatch(name)[1] for name in names] == ["5", "6"]
    errors = capsys.readouterr().err
    assert "--s (sample_steps) 'three': must be a number" in errors and "--q is not a flag" in errors
    assert "--ss ddim is no sampler here" in errors and errors.count("error:") == 2 and "Traceback" not in errors


def test_words_of_the_console_are_no_prompts(maker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('help\n--help\n--d 5\n"" --d 6\nQuit\na cat --d 7\n'))
    maker("--interactive").make()
    printed = capsys.readouterr()
    assert printed.out.count("steps [4]") == 2 and printed.err.count("error: the line begins with a flag") == 1
    assert [NAME.fullmatch(path.name)[1] for path in (tmp_path / "out").glob("*.png")] == ["6"]


def test_an_empty_prompt_draws_what_a_negative_one_alone_would(draw):
    """Towards the negative prompt, a guidance scale of 0, is the same."""
    empty = latent(draw, "--prompt=", "--guidance_scale=1")
    assert torch.equal(empty, latent(draw, "--prompt=", "--guidance_scale=1")) and empty.isfinite().all()
    assert not torch.equal(empty, latent(draw, "--prompt=a cat", "--guidance_scale=1"))
    torch.testing.assert_close(empty, latent(draw, "--prompt=a cat", "--guidance_scale=0"), rtol=1e-4, atol=1e-4)


def test_interactive_draws_what_a_file_draws(maker, draw, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
    maker("--interactive", "--output_type=latent").make()
    (path,) = (tmp_path / "out").glob("*")
    assert torch.equal(dict(read_tensors(read_header(path)))["latent"], latent(draw, "--prompt=a cat"))


def test_a_device_that_is_not_there(maker):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(OptionError, match="--device cuda: this PyTorch .* finds no such device; there is cpu"):
        maker("--prompt=a cat", "--device=cuda")


@pytest.mark.gpu
def test_the_gpu_draws_nearly_what_the_cpu_draws(draw):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    flags = ["--prompt=a cat", "--mixed_precision=no"]
    torch.testing.assert_close(latent(draw, *flags, "--device=cuda"), latent(draw, *flags), rtol=1e-2, atol=1e-2)
    assert latent(draw, "--prompt=a cat", "--device=cuda", "--offload", "--fp8_scaled").isfinite().all()
