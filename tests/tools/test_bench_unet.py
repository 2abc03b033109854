"""The benchmark of a U-Net with LoRA, on a tiny one."""

from __future__ import annotations

import torch

from tests.library.sd.tiny_unets import SDXL
from tools.bench_parts.unet import make_inputs, measure, twins, with_loras


def test_it_measures_one_ratio():
    (figure,) = measure(1, config=SDXL, side=8, rank=2)
    assert figure.unit == "x" and figure.value > 0 and figure.at_most == 1.15


def test_both_sides_compute_the_same_model_until_there_are_loras():
    plain, adapted = twins(SDXL)
    inputs = make_inputs(SDXL, 8)
    assert torch.equal(plain.predict(*inputs), adapted.predict(*inputs)) and plain.predict(*inputs).isfinite().all()
    loras = with_loras(adapted, 2)
    blocks = sum(len(getattr(module, "transformer_blocks", ())) for module in plain.modules())
    transformers = sum(hasattr(module, "transformer_blocks") for module in plain.modules())
    assert len(loras) == 10 * blocks + 2 * transformers
    assert not torch.equal(plain.predict(*inputs), adapted.predict(*inputs))
