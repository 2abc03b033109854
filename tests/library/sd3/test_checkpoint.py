from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors
from library.nn.fp8 import FP8, Fp8Linear, use_fp8
from library.sd3.checkpoint import build_denoiser, load_denoiser
from library.sd3.fp8_layers import DENOISER_FP8_LAYERS
from library.sd3.layout import mmdit_part, with_centre_of_positions
from tests.library.sd3.tiny_mmdit import KINDS, TINY, batch, save_tiny, tiny_denoiser, tiny_weights


def load(path: Path, dtype: torch.dtype = torch.float32, *, fp8: bool = False):
    part = mmdit_part(open_weights(path, flag="--model"), prefix="")
    denoiser = build_denoiser(part.config)
    if fp8:
        use_fp8(denoiser, DENOISER_FP8_LAYERS)
    load_denoiser(denoiser, part, device="cpu", dtype=dtype)
    return denoiser


def test_build_takes_no_memory():
    assert all(tensor.is_meta for tensor in build_denoiser(TINY).state_dict().values())


def test_weights_come_in_frozen(tmp_path):
    denoiser = load(save_tiny(tmp_path / "model.safetensors"))
    assert all(torch.equal(tensor, tiny_weights()[name]) for name, tensor in denoiser.state_dict().items())
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert torch.equal(denoiser(*batch()), tiny_denoiser()(*batch()))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_cast(tmp_path, stored):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {name: tensor.to(stored) for name, tensor in tiny_weights().items()})
    denoiser = load(path, torch.bfloat16)
    assert {tensor.dtype for tensor in denoiser.state_dict().values()} == {torch.bfloat16}
    expected = tiny_weights()["joint_blocks.0.x_block.mlp.fc1.weight"].to(stored).to(torch.bfloat16)
    assert torch.equal(denoiser.blocks[0].x_block.mlp.fc1.weight, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_of_the_blocks_can_be_kept_in_8_bits(kind, tmp_path):
    config = KINDS[kind]
    path = save_tiny(tmp_path / "model.safetensors", config)
    denoiser, exact = load(path, fp8=True), tiny_denoiser(config)
    in_8_bits = {name for name, weight in denoiser.named_parameters() if weight.dtype == FP8}
    assert in_8_bits == {
        name for name, tensor in tiny_weights(config).items() if name.startswith("joint_blocks.") and tensor.ndim == 2
    }
    velocity, expected = denoiser(*batch(config)), exact(*batch(config))
    assert 1e-4 < (velocity - expected).norm() / expected.norm() < 0.1


def test_a_float8_file_stays_what_it_is(tmp_path):
    """Its weights are rounded once: kept in 8 bits they are the numbers of the file."""
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {name: tensor.to(FP8) for name, tensor in tiny_weights().items()})
    rounded, plain = load(path, fp8=True), load(path)
    assert isinstance(rounded.blocks[0].x_block.mlp.fc1, Fp8Linear)
    torch.testing.assert_close(rounded(*batch()), plain(*batch()), rtol=1e-4, atol=1e-5)


def test_file_replaced_after_its_header_was_read(tmp_path):
    path = save_tiny(tmp_path / "model.safetensors")
    part = mmdit_part(open_weights(path, flag="--model"), prefix="")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="was it replaced or truncated"):
        load_denoiser(build_denoiser(part.config), part, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("sizes", "patches"), [([(64, 96), (128, 64)], 8), ([(112, 64)], 7), ([(9000, 64)], 99), ([], 1)])
def test_only_the_positions_that_are_needed_are_kept(tmp_path, sizes, patches):
    path = save_tiny(tmp_path / "model.safetensors")
    part, whole = mmdit_part(open_weights(path, flag="--model"), prefix=""), load(path)
    small = build_denoiser(with_centre_of_positions(part.config, sizes))
    load_denoiser(small, part, device="cpu", dtype=torch.float32)
    side = small.config.position_side
    assert small.pos_embed.shape[1] == side**2 and side in (patches, patches + 1, TINY.position_side)
    for rows, columns in ((4, 6), (5, 3), (2, 2), (1, 1)):
        if max(rows, columns) <= min(side, patches):
            assert torch.equal(small.positions(rows, columns, None), whole.positions(rows, columns, None))
