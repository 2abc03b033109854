from __future__ import annotations

import hashlib

import pytest
import torch

from library.errors import CheckpointError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors, serialize
from networks.weights_file import by_module, read_lora_file, sshs_hashes, write_lora_file

METADATA = {"ss_steps": "10", "ss_title": "ä", "modelspec.title": "t", "other": "x"}


def tensors(megabytes: float) -> dict[str, torch.Tensor]:
    count = int(megabytes * (1 << 20) / 4)
    return {"b.lora_up.weight": torch.arange(count, dtype=torch.float32), "b.alpha": torch.tensor(2.0)}


def test_hashes_of_a_small_file():
    hashes = sshs_hashes(tensors(0.01), METADATA)
    assert hashes["sshs_legacy_hash"] == "e3b0c442"  # of nothing: the file is shorter than 1 MiB
    assert len(hashes["sshs_model_hash"]) == 64


def test_hashes_can_be_made_again_from_the_file(tmp_path):
    weights = tensors(1.5)
    file = tmp_path / "a.safetensors"
    save_safetensors(file, weights, {**METADATA, **sshs_hashes(weights, METADATA)})
    header = read_header(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    ss_only = {key: value for key, value in header.metadata.items() if key.startswith("ss_")}
    again = serialize(dict(read_tensors(header)), ss_only)
    assert header.metadata["sshs_legacy_hash"] == hashlib.sha256(again[0x100000:0x110000]).hexdigest()[:8] != "e3b0c442"


def test_only_tensors_move_the_model_hash():
    one, other = sshs_hashes(tensors(0.01), METADATA), sshs_hashes(tensors(0.01), {"ss_steps": "11"})
    assert one["sshs_model_hash"] == other["sshs_model_hash"] != sshs_hashes(tensors(0.02), METADATA)["sshs_model_hash"]
    titled = sshs_hashes(tensors(1.5), {**METADATA, "modelspec.title": "another one"})
    assert titled == sshs_hashes(tensors(1.5), METADATA)


def test_by_module_takes_whole_pairs():
    weights = {f"a.{part}": torch.zeros(1) for part in ("lora_down.weight", "lora_up.weight", "alpha")} | {
        "b.alpha": torch.zeros(1)
    }
    assert {name: sorted(parts) for name, parts in by_module(weights).items()} == {
        "a": ["alpha", "lora_down.weight", "lora_up.weight"]
    }


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt"])
@pytest.mark.parametrize("content", [b"", b"not a model file at all, but longer than eight bytes"])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_lora_file(tmp_path / name)


def test_pickles_hold_named_tensors_only(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="something other than named tensors"):
        read_lora_file(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a LoRA file"):  # code in a pickle is never run
        read_lora_file(tmp_path / "code.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("key", ["b.lora_up.weight", "b.lokr_w1"])
def test_values_that_are_not_finite(tmp_path, name, dtype, key):
    weights = {"a.lora_up.weight": torch.ones(2, 2), key: torch.tensor([1.0, float("nan")]).to(dtype)}
    write_lora_file(tmp_path / name, weights, None)
    with pytest.raises(
        CheckpointError, match=rf"{name}: b[^ ]* has values that are not finite \(NaN or infinite\); .* train it again"
    ):
        read_lora_file(tmp_path / name)
    write_lora_file(
        tmp_path / name, {"b.alpha": torch.tensor(float("inf")), "c.lora_down.weight": torch.tensor(-float("inf"))}, None
    )
    with pytest.raises(CheckpointError, match="b, c have values that are not finite"):
        read_lora_file(tmp_path / name)
