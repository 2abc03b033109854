"""Options as tables."""

from pathlib import Path

from library.options.anima import AnimaOptions, AnimaTrainOptions
from library.options.caches import CacheOptions
from library.options.declare import groups_of, options_of
from library.options.models import ModelOptions
from library.options.network import NetworkOptions
from library.options.reference_table import as_dict, markdown, option_rows, redacted
from library.options.saving import SavingOptions
from library.options.trackers import LoggingOptions

OPTIONS = AnimaTrainOptions(
    model=ModelOptions(pretrained_model_name_or_path="/private/dit.safetensors", vae="/private/vae"),
    anima=AnimaOptions(qwen3="/private/qwen3"),
    caches=CacheOptions(cache_dir=Path("/private/cache")),
    network=NetworkOptions(network_args=["conv_dim=4", "x=1"], base_weights=["/private/base"], network_dim=8),
    saving=SavingOptions(output_dir="/private/out", output_name="mine"),
    logging=LoggingOptions(logging_dir="/private/logs", wandb_api_key="secret-private"),
)


def test_every_option_has_a_row():
    flags = [row.flag for row in option_rows(AnimaTrainOptions)]
    assert flags == [option.flag for group in groups_of(AnimaTrainOptions).values() for option in options_of(group)]
    by_flag = {row.flag: row for row in option_rows(AnimaTrainOptions)}
    assert (by_flag["--cache_latents"].type, by_flag["--cache_latents"].default) == ("switch", "off")
    assert by_flag["--mixed_precision"].choices == "no, fp16, bf16"
    assert by_flag["--lr_warmup_steps"].type == "N|SHARE"


def test_markdown_has_a_table_per_group():
    text = markdown(AnimaTrainOptions)
    assert text.count("| Flag | Value | Default | Meaning |") == len(groups_of(AnimaTrainOptions))
    assert "| `--lr_warmup_steps` | N\\|SHARE | 0 | " in text
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(option_rows(AnimaTrainOptions))
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)


def test_as_dict_is_flat_and_whole():
    values = as_dict(OPTIONS)
    assert len(values) == len(option_rows(AnimaTrainOptions))
    assert (
        values["network_dim"] == 8
        and values["network_args"] == ["conv_dim=4", "x=1"]
        and values["wandb_api_key"] == "secret-private"
    )


def test_redacted_names_no_place_and_no_key():
    values = redacted(OPTIONS)
    assert "private" not in repr(values)
    assert values["network_args"] == "conv_dim=4 x=1" and values["output_name"] == "mine"
    dropped = set(as_dict(OPTIONS)) - set(values)
    # what the reference keeps back; the rest of ``dropped`` names places as well
    assert dropped >= {
        "wandb_api_key",
        "pretrained_model_name_or_path",
        "vae",
        "train_data_dir",
        "reg_data_dir",
        "output_dir",
        "logging_dir",
    }
    assert dropped >= {"qwen3", "cache_dir", "base_weights", "dataset_config", "sample_prompts", "resume"}
