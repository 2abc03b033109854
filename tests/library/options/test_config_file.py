"""Options in TOML files."""

import random
from pathlib import Path

import pytest

from library.errors import OptionError
from library.options.anima import AnimaTrainOptions
from library.options.config_file import config_path, config_text, read_config
from library.options.declare import groups_of, options_of
from library.options.given import known_options
from library.options.left_out import LEFT_OUT

GROUPS = {name: options_of(group) for name, group in groups_of(AnimaTrainOptions).items()}
KNOWN = known_options(GROUPS.values())


def read(tmp_path: Path, text: str):
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, KNOWN)


def problems(tmp_path: Path, text: str) -> list[str]:
    """With the file's name in place of its path."""
    return [problem.replace(str(tmp_path / "my.toml"), "my.toml") for problem in read(tmp_path, text).problems]


def syntax_problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(OptionError) as caught:
        read(tmp_path, text)
    (problem,) = caught.value.problems
    return problem.replace(str(tmp_path / "my.toml"), "my.toml")


def test_values_of_every_type(tmp_path):
    given = read(
        tmp_path,
        """
        seed = 7
        [anything]
        learning_rate = "1e-4"
        network_alpha = 8
        network_dim = "16"
        cache_latents = true
        optimizer_args = ["betas=0.9,0.99", "weight_decay=0.1"]
        text_encoder_lr = 1e-5
        lr_warmup_steps = "10%"
        resolution = [832, 1216]
        dataset_config = 'C:\\data\\my set.toml'
        max_train_epochs = ""
        """,
    )
    assert given.problems == []
    assert given.values == {
        "seed": 7, "learning_rate": 1e-4, "network_alpha": 8.0, "network_dim": 16, "cache_latents": True,
        "optimizer_args": ["betas=0.9,0.99", "weight_decay=0.1"], "text_encoder_lr": [1e-5], "lr_warmup_steps": 0.1,
        "resolution": "832,1216", "dataset_config": Path(r"C:\data\my set.toml"), "max_train_epochs": None,
    }  # fmt: skip


def test_later_keys_win(tmp_path):
    assert read(tmp_path, "seed = 1\n[a]\nseed = 2\n[b]\nseed = 3\n").values == {"seed": 3}


def test_byte_order_mark_and_empty_file(tmp_path):
    assert read(tmp_path, "\ufeffseed = 1\n").values == {"seed": 1}
    assert read(tmp_path, "").values == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[network]\nnetwork_dimm = 8", "my.toml, [network]: unknown key network_dimm (did you mean network_dim?)"),
        ("networkdim = 8", "my.toml: unknown key networkdim (did you mean network_dim?)"),
        ("zzzz = 8", "my.toml: unknown key zzzz: keys are named as the flags, see --help"),
        ("[network]\nnetwork_dim = 8.5", "my.toml, [network]: network_dim is 8.5, but must be a whole number"),
        ("[a]\nnetwork_dim = true", "my.toml, [a]: network_dim is true, but must be a whole number"),
        ("cache_latents = 1", "my.toml: cache_latents is 1, but must be true or false"),
        ("cache_latents = 'true'", "my.toml: cache_latents is 'true', but must be true or false: take the quotes away"),
        ("output_name = 2024", "my.toml: output_name is 2024, but must be a text: write \"2024\""),
        ("attn_mode = true", "my.toml: attn_mode is true, but must be one of torch, xformers, flash, sageattn, sdpa"),
        ("learning_rate = nan", "my.toml: learning_rate is nan, but must be a finite number"),
        ("learning_rate = '1e-4,1e-5'", "my.toml: learning_rate is '1e-4,1e-5', but must be one number"),
        ("learning_rate = 'fast'", "my.toml: learning_rate is 'fast', but must be a number"),
        ("network_args = 'a=1 b=2'", "my.toml: network_args is 'a=1 b=2', but must be a list, each a text"),
        ("network_args = [1]", "my.toml: network_args is [1], but must be a list, each a text"),
        ("loss_type = 'l3'", "my.toml: loss_type is 'l3', but must be one of l1, l2, huber, smooth_l1 (did you mean l2?)"),
        ("[a.b]\nseed = 1", "my.toml, [a]: b is a table inside a table: write its keys directly under [a]"),
        ("[[datasets]]\nresolution = 512",
         "my.toml: datasets is an array of tables, as dataset files have: give a dataset file with --dataset_config"),
        ("config_file = 'x'", "my.toml: config_file works on the command line only: take it out of the file"),
        ("output_config = true", "my.toml: output_config works on the command line only: take it out of the file"),
    ],
)  # fmt: skip
def test_refused(tmp_path, text, expected):
    found = problems(tmp_path, text)
    if "did you mean l" in expected:  # l1 and l2 are equally near
        assert found[0].partition(" (did")[0] == expected.partition(" (did")[0]
    else:
        assert found == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = 1\nvae = yes\n", r"--config_file my.toml, line 2 (vae): "),
        ("seed = 1\n\nvae = yes\n", "; texts stand in quotes, switches are true or false"),
        ('seed = 1\nvae = "C:\\models\\x"\n', "; write paths with / or in 'single quotes'"),
        ("text_encoder_lr = [1e-4, 0]\n", "; write the numbers of a list alike, such as [1e-4, 0.0]"),
        ("seed = 1\nseed = 2\n", "line 2 (seed): Duplicate keys!"),
        ("seed = 1\n[network\n", "; the line is: [network"),
        ("seed = 1\nvae = yes\n", "; the line is: vae = yes"),
        ("[a]\nseed = 1\n[a]\nhuber_c = 1\n", "line 3 ([a]): the table [a] stands here twice"),
    ],
)
def test_syntax_errors_name_the_line(tmp_path, text, expected):
    assert expected in syntax_problem(tmp_path, text)


def test_syntax_error_shows_no_value(tmp_path):
    assert "hush" not in syntax_problem(tmp_path, "wandb_api_key = hush\n")
    assert "hush" not in syntax_problem(tmp_path, "[a]\nwandb_api_key = 'hush'\n[a]\nseed = 1\n")


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b"seed = 1\nmetadata_author = 'J\xf6rg'\n")
    with pytest.raises(OptionError, match="line 2: not UTF-8 text"):
        read_config(path, KNOWN)


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        read_config(tmp_path, KNOWN)


def test_ending_may_be_left_out(tmp_path):
    (tmp_path / "my.toml").touch()
    (tmp_path / "v1.5").touch()
    assert config_path(str(tmp_path / "my"), must_exist=True) == tmp_path / "my.toml"
    assert config_path(str(tmp_path / "my.toml"), must_exist=True) == tmp_path / "my.toml"
    assert config_path(str(tmp_path / "v1.5"), must_exist=True) == tmp_path / "v1.5"
    assert config_path(str(tmp_path / "v2.5"), must_exist=False) == tmp_path / "v2.5.toml"


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "training.toml").touch()
    with pytest.raises(OptionError, match=r"there is no file .*trainig.toml \(did you mean .*training.toml\?\)"):
        config_path(str(tmp_path / "trainig"), must_exist=True)


def reread(tmp_path: Path, values: dict) -> dict:
    return read(tmp_path, config_text(GROUPS, values)).values


def test_what_is_written_reads_back(tmp_path):
    values = {
        "vae": r"C:\x64\users\new folder\vae.safetensors", "pretrained_model_name_or_path": "D:\\models\\", "qwen3": "/a b/\u4e2d.safetensors",
        "dataset_config": Path("sets") / "it's.toml", "cache_latents": True, "learning_rate": 1e-4, "network_alpha": 8.0, "seed": 0,
        "optimizer_args": ["betas=0.9,0.99", "name='x'", r"path=C:\a"], "base_weights": ["a,b", "C:\\c\\", "[d]"],
        "text_encoder_lr": [1e-5, 0.0], "lr_warmup_steps": 0.25, "lr_decay_steps": 1.0, "resolution": "832,1216",
        "training_comment": 'say "hi"\n# not a comment\t\\', "caption_separator": ";", "lr_scheduler_power": 2.0,
    }  # fmt: skip
    assert reread(tmp_path, values) == values


def test_random_texts_read_back_or_are_refused(tmp_path):
    rng = random.Random(0)
    letters = "ab 0x41 un\\\\'\"#=[]{},.:/\t\n\x7f\u00e9\u4e2d\U0001f600%"
    refused = 0
    for _ in range(600):
        text = "".join(rng.choices(letters, k=rng.randint(1, 8)))
        values = {"training_comment": text, "network_args": [text, "a=1"]}
        try:
            written = config_text(GROUPS, values)
        except OptionError as error:
            assert "cannot be written to a TOML file" in str(error)
            refused += 1
            continue
        (tmp_path / "my.toml").write_bytes(written.encode())
        assert read_config(tmp_path / "my.toml", KNOWN).values == values
    assert refused < 30  # texts on which the TOML reader fails are rare


def test_defaults_secrets_and_the_dry_run_are_left_out():
    text = config_text(GROUPS, {"wandb_api_key": "hush", "dry_run": True, "network_alpha": 1.0, "loss_type": "l2", "seed": 3})
    assert text == "[run]\nseed = 3\n"


@pytest.mark.parametrize(("value", "shown"), [("12345", "***"), ("['hush']", "***")])
def test_secret_of_a_wrong_type_is_not_shown(tmp_path, value, shown):
    (problem,) = problems(tmp_path, f"wandb_api_key = {value}")
    assert problem.startswith(f"my.toml: wandb_api_key is {shown}, but must be a text")
    assert "12345" not in problem and "hush" not in problem


GUI_FILE = """
adaptive_noise_scale = 0
bucket_no_upscale = true
dynamo_backend = "no"
epoch = 1
gradient_accumulation_steps = ""
learning_rate = 0.0001
lowvram = false
lr_scheduler_args = []
max_bucket_reso = 2048
mixed_precision = ""
noise_offset_type = "Original"
resolution = "512,512"
save_n_epoch_ratio = 0
scale_weight_norms = 0
shuffle_caption = ""
stop_text_encoder_training = 10
text_encoder_lr = [0.0001, 5e-5]
xformers = true
[more]
loraplus_unet_lr_ratio = 4
epoch = 2
"""


def test_file_of_a_program_that_writes_them(tmp_path):
    given = read(tmp_path, GUI_FILE)
    assert given.problems == [] and given.values["dynamo_backend"] == "no"
    assert not {"mixed_precision", "shuffle_caption", "gradient_accumulation_steps", "epoch"} & given.values.keys()  # not set
    (warning,) = given.warnings
    assert "left out: epoch, lowvram, noise_offset_type, stop_text_encoder_training, loraplus_unet_lr_ratio; " in warning
    assert warning.startswith(str(tmp_path / "my.toml"))


def test_nothing_left_out_is_an_option(tmp_path):
    assert not LEFT_OUT.keys() & KNOWN.keys()
    assert read(tmp_path, "seed = 1\n").warnings == []
