from __future__ import annotations

from pathlib import Path

import pytest

from library.files.model_parts import listed, model_line, short_name


def test_what_lies_in_the_model_and_what_beside_it():
    model, t5 = Path("a/sd35.safetensors"), Path("b/t5.safetensors")
    inside = [(name, model) for name in ("CLIP-L", "CLIP-G", "VAE")]
    assert model_line("SD 3.5 medium", model, [*inside, ("T5-XXL", t5)]) == (
        "model: SD 3.5 medium, sd35.safetensors; CLIP-L, CLIP-G and VAE in it; T5-XXL t5.safetensors"
    )
    assert model_line("Anima", model, [("VAE", t5)]) == "model: Anima, sd35.safetensors; VAE t5.safetensors"


@pytest.mark.parametrize(("path", "name"), [
    ("x/vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
    ("gemma/model.safetensors", "gemma/model.safetensors"), ("models/gemma", "gemma"), ("models/ae.safetensors", "ae.safetensors"),
    (".", "."),
])  # fmt: skip
def test_files_that_are_called_alike_are_told_by_their_folder(path, name):
    assert short_name(Path(path)) == name


def test_lists():
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
