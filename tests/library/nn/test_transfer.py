"""Small tensors on their way to the device."""

from __future__ import annotations

import pytest
import torch

from library.nn.transfer import sent


def test_on_the_cpu_it_is_the_tensor_itself():
    ids = torch.arange(3)
    assert sent(ids, torch.device("cpu")) is ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait():
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sent(torch.arange(3), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.device.type == "cuda" and found.tolist() == [0, 1, 2]
