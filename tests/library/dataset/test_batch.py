from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from library.dataset.batch import MOVED, Batch
from tests.library.dataset.caches.cache_parts import TinyConditioning, TinyTextEncoder


def make_batch(**changes) -> Batch:
    settings = {
        "pixels": torch.zeros(2, 3, 16, 8),
        "latents": torch.zeros(2, 4, 2, 1),
        "mask": torch.ones(2, 1, 2, 1),
        "text": TinyTextEncoder()(["a", "bcd"]),
        "captions": ("a", "bcd"),
        "loss_weights": torch.ones(2),
        "original_wh": torch.tensor([[8, 16], [9, 18]]),
        "crop_left_top": torch.tensor([[0, 0], [1, 2]]),
        "target_wh": (8, 16),
        "network_multiplier": 1.0,
        "custom_attributes": ({}, {}),
        "positions": (0, 1),
        "global_size": 2,
        "item_keys": ("x", "y"),
    }
    return Batch(**{**settings, **changes})


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    values = [getattr(batch, one.name) for one in fields(batch)]
    values += [batch.text.embeds, batch.text.mask] if isinstance(batch.text, TinyConditioning) else []
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_every_tensor_moves_and_nothing_else_changes() -> None:
    batch = make_batch()
    moved = batch.to("meta")
    assert len(tensors_of(moved)) == len(MOVED) + 1  # the text has two
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(batch)} == {"cpu"}
    for one in fields(Batch):
        if one.name not in MOVED:
            assert getattr(moved, one.name) == getattr(batch, one.name)


def test_what_is_not_there_stays_away() -> None:
    moved = make_batch(pixels=None, mask=None, text=None).to("meta")
    assert (moved.pixels, moved.mask, moved.text) == (None, None, None)
    assert moved.latents is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_reach_the_device() -> None:
    batch = make_batch(pixels=None).pin_memory()
    assert all(tensor.is_pinned() for tensor in tensors_of(batch))
    moved = batch.to("cuda", non_blocking=True)
    assert all(tensor.device.type == "cuda" for tensor in tensors_of(moved))
    assert moved.crop_left_top.tolist() == [[0, 0], [1, 2]]
