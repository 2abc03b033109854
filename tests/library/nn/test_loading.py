from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import CheckpointError
from library.nn.loading import load_into


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("table", torch.ones(2), persistent=False)


def small_on_meta() -> Small:
    with torch.device("meta"):
        module = Small()
    module._buffers["table"] = torch.ones(2)
    return module


def weights() -> dict[str, torch.Tensor]:
    return {"linear.weight": torch.randn(2, 3), "linear.bias": torch.randn(2), "count": torch.tensor([7])}


def test_tensors_take_their_places_frozen_and_cast():
    module, given = small_on_meta(), weights()
    load_into(module, given.items(), device="cpu", dtype=torch.bfloat16)
    assert torch.equal(module.linear.weight, given["linear.weight"].bfloat16())
    assert isinstance(module.linear.weight, nn.Parameter) and not module.linear.weight.requires_grad
    assert module.count.dtype == torch.int64 and module.count.item() == 7
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_float8_is_cast_up():
    given = weights()
    stored = {name: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for name, t in given.items()}
    module = small_on_meta()
    load_into(module, stored.items(), device="cpu", dtype=torch.float32)
    assert torch.equal(module.linear.weight, stored["linear.weight"].float())


def test_all_wrong_names_are_in_one_error():
    given = {"linear.weight": torch.zeros(3, 3), "stray": torch.zeros(1), "count": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_into(small_on_meta(), given.items(), device="cpu", dtype=torch.float32)
    text = str(caught.value)
    assert "1 missing: linear.bias" in text and "1 unexpected: stray" in text
    assert "linear.weight (3x3 instead of 2x3)" in text


def test_weights_lie_as_torch_would_lay_them():
    raw = bytearray(4 * 6 + 4)  # the tensor begins 4 bytes into the buffer, as it may after reading a file
    misaligned = torch.frombuffer(raw, dtype=torch.float32, offset=4).reshape(2, 3)
    module = small_on_meta()
    load_into(module, {**weights(), "linear.weight": misaligned}.items(), device="cpu", dtype=torch.float32)
    assert module.linear.weight.data_ptr() % 64 == 0
