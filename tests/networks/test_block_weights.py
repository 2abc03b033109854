"""Ranks, alphas and learning-rate factors by block: how they are written, and what is refused. Numbers: tests/golden."""

from __future__ import annotations

import pytest

from library.errors import NetworkError
from networks.arguments import parse_arguments
from networks.block_weights import SD_BLOCKS, SDXL_BLOCKS, sd_block, sdxl_block
from networks.sd_arguments import Sd1Arguments, SdxlArguments


def parsed(kind=Sd1Arguments, **given):
    return parse_arguments(kind, given)


def ones(*changed: tuple[int, float], total: int = 25) -> tuple[float, ...]:
    found = [1.0] * total
    for place, value in changed:
        found[place] = value
    return tuple(found)


def test_the_counts():
    assert (SD_BLOCKS.total, SDXL_BLOCKS.total) == (25, 23)
    assert str(SD_BLOCKS) == "12 down, 1 middle, 12 up"
    assert str(SDXL_BLOCKS) == "9 down, 3 middle, 9 up and 2 around them"


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("down_blocks.0.resnets.0.conv1", 1),
        ("down_blocks.0.attentions.1.proj_in", 2),
        ("down_blocks.2.downsamplers.0.conv", 9),
        ("down_blocks.3.resnets.1.conv2", 11),
        ("mid_block.resnets.1.conv1", 12),
        ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.0.upsamplers.0.conv", 15),
        ("up_blocks.3.attentions.2.proj_out", 24),
        ("conv_in", None),
        ("time_embedding.linear_1", None),
    ],
)
def test_blocks_of_sd(path, block):
    assert sd_block(path) == block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("input_blocks.1.0.in_layers.2", 2),
        ("input_blocks.8.1.proj_in", 9),
        ("middle_block.0.in_layers.2", 10),
        ("middle_block.2.out_layers.3", 12),
        ("output_blocks.0.0.in_layers.2", 13),
        ("output_blocks.8.0.skip_connection", 21),
        ("time_embed.0", None),
        ("label_emb.0.0", None),
    ],
)
def test_blocks_of_sdxl(path, block):
    assert sdxl_block(path) == block


# --- factors


def test_a_curve_with_something_added():
    factors = parsed(SdxlArguments, up_lr_weight="reverse_linear + 0.5").factors
    assert factors == pytest.approx(ones(*((13 + n, 1.5 - n / 8) for n in range(9)), total=23))


def test_one_number_is_refused_with_what_to_write_instead():
    with pytest.raises(
        NetworkError, match=r"down_lr_weight=0.5 cannot be used: one number is no list.*or zeros\+0.5 for 0.5 in all"
    ):
        parsed(down_lr_weight="0.5")
    assert parsed(down_lr_weight="zeros+0.5").factors == ones(*((n, 0.5) for n in range(12)))


def test_too_many_values_are_left_out_with_a_warning():
    """The reference crashes when only one side is given."""
    arguments = parsed(down_lr_weight=",".join(["0.5"] * 14))
    assert arguments.factors == ones(*((n, 0.5) for n in range(12)))
    assert list(arguments.warnings()) == ["down_lr_weight has 14 values for 12 blocks: the rest is left out"]


def test_too_few_values_go_on_with_one():
    arguments = parsed(up_lr_weight="0.5,", mid_lr_weight="0.2")
    assert arguments.factors == ones((12, 0.2), (13, 0.5), (14, 0.0))
    assert list(arguments.warnings()) == ["up_lr_weight has 2 values for 12 blocks: 1 is taken for the others"]


def test_the_threshold():
    arguments = parsed(mid_lr_weight="0.3", block_lr_zero_threshold="0.3")
    assert arguments.factors == ones((12, 0.0)) and not list(arguments.warnings())
    (line,) = parsed(block_lr_zero_threshold="0.3").warnings()
    assert line.startswith("block_lr_zero_threshold does nothing without down_lr_weight, mid_lr_weight or up_lr_weight")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("down_lr_weight", "cosin", r"one of cosine, sine, linear, reverse_linear, zeros.*did you mean cosine"),
        ("down_lr_weight", "1,a,1", "give a number"),
        ("down_lr_weight", "1,-1", "numbers from 0 on"),
        ("down_lr_weight", "linear+much", "give a number"),
        ("up_lr_weight", "nan,1", "numbers from 0 on"),
        ("mid_lr_weight", "linear", "give a number"),
        ("block_lr_zero_threshold", "-1", "numbers from 0 on"),
        ("block_dims", "1,2.5", "give whole numbers from 0 on, one for each block"),
        ("block_dims", "1,,2", "give whole numbers from 0 on"),
        ("block_alphas", "1,x", "give numbers from 0 on, one for each block"),
        ("conv_dim", "-1", "a whole number, 0 or more"),
        ("conv_dim", "four", "give a whole number"),
        ("conv_alpha", "inf", "numbers from 0 on"),
    ],
)
def test_what_cannot_be_read(name, value, message):
    with pytest.raises(
        NetworkError, match=f"--network_args: {name}={value}".replace("+", r"\+") + f" cannot be used: .*{message}"
    ):
        parsed(**{name: value})


# --- sizes


def test_a_list_of_the_wrong_length_says_how_many():
    with pytest.raises(NetworkError) as caught:
        parsed(block_dims="4", conv_block_alphas=",".join(["1"] * 23))
    assert list(caught.value.problems) == [
        "--network_args: block_dims has 1 value, and this U-Net has 25 blocks (12 down, 1 middle, 12 up): give 25, with commas between them",
        "--network_args: conv_block_alphas has 23 values, and this U-Net has 25 blocks (12 down, 1 middle, 12 up): give 25, with commas between them",
    ]  # fmt: skip
    with pytest.raises(
        NetworkError, match=r"block_dims has 25 values, and this U-Net has 23 blocks \(9 down, 3 middle, 9 up and 2"
    ):
        parsed(SdxlArguments, block_dims=",".join(["4"] * 25))


def test_problems_of_both_kinds_are_told_together():
    with pytest.raises(NetworkError) as caught:
        parsed(block_dims="4", conv_dim="x")
    assert len(caught.value.problems) == 2


def test_sizes():
    run = {"rank": 16, "alpha": 8.0}
    plain = parsed()
    assert plain.size_of(3, wide=False, **run) == plain.size_of(3, wide=True, **run) == (16, 8.0)
    conv = parsed(conv_dim="4")
    assert conv.size_of(3, wide=True, **run) == (4, 1.0) and conv.size_of(3, wide=False, **run) == (16, 8.0)
    assert conv.size_of(None, wide=False, **run) == (16, 8.0)
    by_block = parsed(conv_block_dims=",".join(map(str, range(25))), conv_alpha="2", block_alphas=",".join(["0.5"] * 25))
    assert by_block.size_of(3, wide=True, **run) == (3, 2.0) and by_block.size_of(3, wide=False, **run) == (16, 0.5)
    assert by_block.has_convolutions


def test_conv_dim_of_zero_is_none_at_all():
    assert not parsed(conv_dim="0").has_convolutions
    (line,) = parsed(conv_dim="0", conv_alpha="2").warnings()
    assert line == "conv_alpha does nothing without conv_dim or conv_block_dims: 3x3 convolutions have no LoRA"
