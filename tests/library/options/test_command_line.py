"""Reading options: command line, config file, defaults; and through a real process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from library.errors import OptionError, OutputError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.options.declare import groups_of, options_of

REPOSITORY = Path(__file__).parents[3]
REQUIRED_TEXT = """--pretrained_model_name_or_path=dit.safetensors --qwen3=qwen3.safetensors --vae=vae.safetensors --dataset_config=my.toml
    --output_dir=out --network_module=networks.lora_anima"""
REQUIRED = REQUIRED_TEXT.split()


def read(*arguments: object) -> AnimaTrainOptions:
    return read_options(AnimaTrainOptions, [*REQUIRED, *map(str, arguments)])


def problems(*arguments: object) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        read(*arguments)
    return caught.value.problems


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        (tmp_path / "options.toml").write_text(text, encoding="utf-8")
        return f"--config_file={tmp_path / 'options.toml'}"

    return write


def test_command_line_beats_file_beats_default(config):
    file = config("[network]\nnetwork_dim = 4\nnetwork_alpha = 2\n[run]\ncache_latents = true\ngradient_checkpointing = true\n")
    options = read("--network_dim=32", file, "--cache_latents=false")
    assert (options.network.network_dim, options.network.network_alpha, options.network.network_dropout) == (32, 2.0, None)
    assert (options.caches.cache_latents, options.memory.gradient_checkpointing) == (False, True)


def test_empty_value_takes_a_value_of_the_file_back(config):
    assert read(config("save_precision = 'fp16'\n"), "--save_precision=").saving.save_precision is None


def test_home_in_paths_of_both_sources(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    file = config(
        "llm_adapter_path = '~/v.safetensors'\ncache_dir = '~/cache'\nbase_weights = ['~/a', 'b~', './~no_such_user/c']\noutput_name = '~n'\n"
    )
    options = read(file, "--output_dir=~/out", "--dataset_config=~/my.toml", "--metadata_author=~me", "--cache_latents_to_disk")
    home = str(tmp_path)
    assert (options.anima.llm_adapter_path, options.saving.output_dir) == (f"{home}/v.safetensors", f"{home}/out")
    assert (options.dataset.dataset_config, options.caches.cache_dir) == (tmp_path / "my.toml", tmp_path / "cache")
    assert options.network.base_weights == [f"{home}/a", "b~", "./~no_such_user/c"]
    assert (options.saving.output_name, options.metadata.metadata_author) == ("~n", "~me")  # no paths


@pytest.mark.skipif(os.name == "nt", reason="the path of any user's home is guessed on Windows")
def test_the_home_of_someone_who_is_not_there_is_refused_everywhere(config):
    paths = [option.name for group in groups_of(AnimaTrainOptions).values() for option in options_of(group) if option.path]
    assert {"output_dir", "vae", "dataset_config", "cache_dir", "in_json", "sample_prompts"} <= set(paths)
    for name in paths:
        with pytest.raises(OptionError) as caught:
            read(f"--{name}=~no_such_user/x")
        told = [problem for problem in caught.value.problems if "no_such_user" in problem]
        assert told == [
            f"--{name} ~no_such_user/x begins with ~no_such_user, but no user no_such_user is known here: give the whole path, "
            "or ./~no_such_user/x for a name that begins with ~"
        ]
    (problem,) = problems(config("[general]\nvae = '~no_such_user/x'\n"))
    assert "options.toml, [general]: vae ~no_such_user/x begins with ~no_such_user, but no user" in problem


def test_what_cannot_be_a_path(config, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for value, words in (
        (str(loop), f"{loop} does not exist: {loop} is a link that leads nowhere (to loop)"),
        (str(loop / "x"), f"{loop / 'x'} does not exist: {loop} is a link that leads nowhere (to loop)"),
        ("x" * 300, f"{'x' * 60}... (300 characters) is longer than a path can be here: shorten it"),
    ):
        with pytest.raises(OptionError) as caught:
            read(f"--output_dir={value}", "--vae=x")
        assert caught.value.problems[0] == f"--output_dir {words}"
    with pytest.raises(OptionError, match=r"vae 'p\\x00x' holds a NUL character, which no path can: take it out"):
        read(config('vae = "p\\u0000x"\n'))
    url = "data:image/png;base64," + "A" * 5000
    assert read(*REQUIRED, f"--metadata_thumbnail={url}").metadata.metadata_thumbnail == url


def test_file_alone_is_enough(config):
    lines = [argument.removeprefix("--").partition("=") for argument in REQUIRED]
    file = config("\n".join(f'{name} = "{value}"' for name, _, value in lines))
    assert read_options(AnimaTrainOptions, [file]) == read()


def test_problems_of_the_file_name_their_place(config):
    (problem,) = problems(config("[network]\nnetwork_dim = 0\n"))
    assert problem.endswith("options.toml, [network]: --network_dim is 0: give 1 or more")
    (problem,) = problems(config("[network]\nnetwork_dim = 4\n"), "--network_dim=0")
    assert problem == "--network_dim is 0: give 1 or more"


def test_everything_wrong_is_told_at_once(config):
    found = problems("--sed=1", "--max_train_steps=x", "--vae_chunk_size=3", "left", config("huber_c = 0\nlearnin_rate = 1\n"))
    assert [problem.partition(" ")[0] for problem in found[:2]] == ["unknown", "--max_train_steps"]
    text = "\n".join(found)
    assert len(found) == 6
    for expected in ("--sed", "stray argument 'left'", "unknown key learnin_rate", "--huber_c is 0.0", "--vae_chunk_size is 3"):
        assert expected in text


def test_option_meant_by_a_misspelt_flag_is_not_called_missing():
    arguments = [argument.replace("--output_dir", "--output_dirr") for argument in REQUIRED]
    with pytest.raises(OptionError) as caught:
        read_options(AnimaTrainOptions, arguments)
    assert caught.value.problems == ("unknown flag --output_dirr (did you mean --output_dir?)",)


def test_missing_file_is_told_with_the_other_problems(tmp_path):
    found = problems("--sed=1", f"--config_file={tmp_path / 'none'}")
    assert len(found) == 2 and "there is no file" in found[1]


def test_output_config_reads_back_to_equal_options(tmp_path, capsys):
    arguments = [
        *REQUIRED, "--network_dim=8", "--learning_rate=1e-4", "--lr_scheduler=cosine", "--lr_warmup_steps=10%", "--cache_latents",
        r"--logging_dir=C:\my logs\x64", "--optimizer_args", "betas=0.9,0.99", "weight_decay=0.1", "--network_train_unet_only",
        "--text_encoder_lr", "1e-5", "0", "--output_name=it's \u4e2d", "--cache_dir=some where/else", "--cache_latents_to_disk",
    ]  # fmt: skip
    name = f"--config_file={tmp_path / 'my options'}"
    with pytest.raises(SystemExit) as ended:
        read_options(AnimaTrainOptions, [*arguments, "--wandb_api_key=hush", "--dry_run", name, "--output_config"])
    assert ended.value.code == 0
    written = tmp_path / "my options.toml"
    shown = capsys.readouterr().out
    assert f"wrote {written}; left out: --wandb_api_key" in shown
    assert not {"hush", "dry_run", "config_file", "output_config"} & set(written.read_text(encoding="utf-8").split())
    assert read_options(AnimaTrainOptions, [name]) == read_options(AnimaTrainOptions, arguments)


def test_output_config_overwrites_nothing(tmp_path, config):
    file = config("seed = 1\n")
    (problem,) = problems(file, "--output_config")
    assert "exists already" in problem
    assert (tmp_path / "options.toml").read_text(encoding="utf-8") == "seed = 1\n"


def test_output_config_needs_a_name_and_readable_flags(tmp_path):
    assert problems("--output_config")[0].startswith("--output_config needs --config_file")
    found = problems("--output_config", f"--config_file={tmp_path / 'x'}", "--sed=1")
    assert found[0].startswith("unknown flag --sed") and not (tmp_path / "x.toml").exists()


def test_output_config_into_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="x.toml"):
        read(f"--config_file={tmp_path / 'file' / 'x'}", "--output_config")


# ---------------------------------------------------------------------- through a process

SCRIPT = """
import os
import sys
from library.errors import user_errors_end_the_script
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
try:
    with user_errors_end_the_script():
        read_options(AnimaTrainOptions)
finally:
    heavy = sorted({"torch", "transformers", "diffusers", "numpy", "PIL", "accelerate"} & set(sys.modules))
    print("heavy:", heavy)
    print("cpu:", sum(os.times()[:2]))
"""


def run(*arguments: str, columns: str = "100") -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1", "COLUMNS": columns, "SYSTEMROOT": "C:\\Windows"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60)


def assert_light(process: subprocess.CompletedProcess[str]) -> None:
    assert "heavy: []" in process.stdout
    assert float(process.stdout.rpartition("cpu:")[2]) < 1.0  # seconds; it is about 0.1


def test_help_of_a_process():
    process = run("--help")
    assert process.returncode == 0 and process.stderr == ""
    assert "--network_dim N" in process.stdout and "Run: length, seed" in process.stdout
    assert_light(process)


def test_typo_in_a_process():
    process = run(*REQUIRED, "--learning_rte=1e-4")
    assert process.returncode == 2
    assert process.stderr == "error: unknown flag --learning_rte (did you mean --learning_rate?)\n"
    assert_light(process)


def test_good_flags_in_a_process(tmp_path):
    (tmp_path / "x.toml").write_text("seed = 1\n", encoding="utf-8")
    process = run(*REQUIRED, f"--config_file={tmp_path / 'x'}")
    assert process.returncode == 0 and process.stderr == ""
    assert_light(process)


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently there")
def test_help_ends_quietly_where_its_reader_leaves(tmp_path):
    script = "import sys; from library.options.anima import AnimaTrainOptions as A; from library.options.command_line import read_options as r; r(A)"
    read, write = os.pipe()
    os.close(read)  # nobody reads any more
    done = subprocess.run([sys.executable, "-c", script, "--help"], stdout=write, stderr=subprocess.PIPE, cwd=REPOSITORY)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_keys_that_do_nothing_are_left_out_of_a_file_and_said_once(config, capsys, monkeypatch):
    file = config("epoch = 1\nnoise_offset_type = 'Original'\nsave_n_epoch_ratio = 0\nscale_weight_norms = 0\n")
    assert read(file).network.scale_weight_norms == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "options.toml: left out: epoch, noise_offset_type; " in line
    monkeypatch.setenv("RANK", "1")
    read(file)
    assert capsys.readouterr().err == ""


def test_what_is_left_out_of_files_is_an_error_on_the_command_line():
    (problem,) = problems("--stop_text_encoder_training=3")
    assert problem.startswith("unknown flag --stop_text_encoder_training: it is for the training of whole models; a LoRA's text")
    assert problem.endswith("; drop --stop_text_encoder_training")
    (problem,) = problems("--use_safetensors")
    assert "unknown flag --use_safetensors: it is for scripts that convert models; a LoRA is a .safetensors file" in problem


def test_compiling_can_be_named_and_switched_off():
    assert read("--torch_compile").compile.compiles
    assert not read("--torch_compile", "--dynamo_backend=no").compile.compiles
    assert not read("--dynamo_backend=no").compile.compiles
