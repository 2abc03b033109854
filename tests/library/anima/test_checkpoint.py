from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.anima.checkpoint import build_denoiser, load_denoiser
from library.anima.layout import AdapterConfig, DenoiserConfig, expected_shapes, read_denoiser_layout
from library.errors import CheckpointError
from library.files.safetensors_file import save_safetensors
from tests.library.anima.tiny_dit import TINY, batch, save_tiny, tiny_denoiser, tiny_weights

ROOT = Path(__file__).resolve().parents[3]


def load(path: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32):
    layout = read_denoiser_layout(path, adapter)
    denoiser = build_denoiser(layout.config)
    load_denoiser(denoiser, layout, device="cpu", dtype=dtype)
    return denoiser


def test_build_takes_no_memory():
    assert all(tensor.is_meta for tensor in build_denoiser(TINY).parameters())


def test_weights_come_in_frozen(tmp_path):
    denoiser = load(save_tiny(tmp_path / "dit.safetensors"))
    weights = tiny_weights()
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(parameter, weights.pop(name)) and not parameter.requires_grad
    assert not weights
    assert torch.equal(denoiser(*batch()), tiny_denoiser()(*batch()))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_cast(tmp_path, stored):
    changes = {name.replace(".", "__"): tensor.to(stored) for name, tensor in tiny_weights().items()}
    denoiser = load(save_tiny(tmp_path / "dit.safetensors", **changes), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    expected = tiny_weights()["blocks.0.mlp.layer1.weight"].to(stored).to(torch.bfloat16)
    assert torch.equal(denoiser.blocks[0].mlp.layer1.weight, expected)


def test_given_adapter_is_the_one_loaded(tmp_path):
    dit = save_tiny(tmp_path / "dit.safetensors")
    other = {name: tensor for name, tensor in tiny_weights(seed=9).items() if name.startswith("llm_adapter.")}
    save_safetensors(tmp_path / "adapter.safetensors", other)
    denoiser = load(dit, tmp_path / "adapter.safetensors")
    assert torch.equal(denoiser.llm_adapter.embed.weight, other["llm_adapter.embed.weight"])
    assert torch.equal(denoiser.blocks[0].mlp.layer1.weight, tiny_weights()["blocks.0.mlp.layer1.weight"])


def test_file_replaced_after_its_header_was_read(tmp_path):
    path = save_tiny(tmp_path / "dit.safetensors")
    layout = read_denoiser_layout(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="was it replaced or truncated"):
        load_denoiser(build_denoiser(layout.config), layout, device="cpu", dtype=torch.float32)


MEASURE = """
import re, sys, torch
from library.anima.checkpoint import build_denoiser, load_denoiser
from library.anima.layout import read_denoiser_layout
# ru_maxrss would begin with the peak of the process that started this one
def peak_kib(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
layout = read_denoiser_layout(sys.argv[1])
before = peak_kib()
denoiser = build_denoiser(layout.config)
load_denoiser(denoiser, layout, device="cpu", dtype=torch.bfloat16)
assert not any(p.is_meta for p in denoiser.parameters())
print((peak_kib() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_file_and_little_more(tmp_path):
    adapter = AdapterConfig(vocabulary=8000, width=1024, source_width=64, blocks=1, heads=16, head_dim=64, mlp_hidden=64)
    config = DenoiserConfig(width=1024, blocks=8, heads=8, head_dim=128, mlp_hidden=4096, adaln_dim=64, adapter=adapter)
    path = tmp_path / "dit.safetensors"
    save_safetensors(path, {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in expected_shapes(config).items()})
    size = path.stat().st_size
    assert size > 280 * 2**20
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    print(f"file {size / 2**20:.0f} MiB, peak above imports {int(done.stdout) / 2**20:.0f} MiB")
    assert size / 2 < int(done.stdout) < size + 300 * 2**20
