"""Tiny Lumina checkpoints: the published names and sides, equal bytes for equal arguments, equal parts in all files."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.files.open_weights import open_weights
from library.files.safetensors_file import read_header, read_tensors
from library.lumina.layout import find_nextdit, nextdit_part
from library.sd.vae import load_vae
from library.sd.vae_layout import find_vae, vae_part
from tools.make_tiny_models import main
from tools.tiny_lumina import SCALE, SHIFT, WHOLE_PREFIXES, make_lumina, sizes

SPECS = Path(os.environ.get("SPECS_DIR", "specs")) / "checkpoints"
LAYER = re.compile(r"((layers|noise_refiner|context_refiner)\.)(\d+)\.")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(read_header(path)))


@pytest.mark.parametrize(("file", "published"), [("dit", "lumina2"), ("gemma2", "gemma2_2b"), ("ae", "flux_ae")])
def test_names_and_sides_are_those_of_the_published_files(file, published, tiny_lumina):
    path = SPECS / f"{published}.json.gz"
    if not path.is_file():
        pytest.skip("the published names are not here")
    theirs = json.loads(gzip.decompress(path.read_bytes()))["tensors"]
    ours = {name: info.shape for name, info in read_header(tiny_lumina[file]).tensors.items()}
    assert {LAYER.sub(r"\1N.", name) for name in ours} == {LAYER.sub(r"\1N.", name) for name in theirs}
    assert all(len(shape) == len(theirs[name][1]) for name, shape in ours.items())


def test_every_file_has_the_same_weights(tiny_lumina):
    whole = weights(tiny_lumina["whole"])
    own = {part: weights(tiny_lumina[file]) for part, file in (("nextdit", "dit"), ("gemma2", "gemma2"), ("vae", "ae"))}
    assert whole.pop("text_encoders.gemma2_2b.logit_scale") is not None
    spiece = whole.pop("text_encoders.gemma2_2b.spiece_model")
    assert torch.equal(spiece, own["gemma2"].pop("spiece_model"))
    for part, prefix in WHOLE_PREFIXES.items():
        for name, tensor in own[part].items():
            assert torch.equal(whole.pop(prefix + (name.removeprefix("model.") if part == "gemma2" else name)), tensor)
    assert not whole
    folder = open_weights(tiny_lumina["gemma2_folder"], flag="--gemma2")
    assert set(folder.shapes) == set(own["gemma2"])
    assert (tiny_lumina["gemma2_folder"] / "tokenizer.model").read_bytes() == spiece.numpy().tobytes()


def test_sizes_read_as_meant(tiny_lumina):
    model = sizes("tiny")
    for file in ("dit", "whole"):
        source = open_weights(tiny_lumina[file], flag="--pretrained_model_name_or_path")
        config = nextdit_part(source, prefix=find_nextdit(source.shapes)).config
        assert config == model.nextdit
        assert config.axes_dims == (8, 8, 8) and config.heads == 2
    for file in ("ae", "whole"):
        source = open_weights(tiny_lumina[file], flag="--ae")
        place = find_vae(source.shapes)
        assert vae_part(source, prefix=place.prefix, layout=place.layout, channels=16).config == model.vae


def test_latents_have_the_size_of_noise(tiny_lumina):
    source = open_weights(tiny_lumina["ae"], flag="--ae")
    part = vae_part(source, prefix="", layout="original", channels=16)
    vae = load_vae(part, device="cpu", dtype=torch.float32, scale=SCALE, shift=SHIFT)
    latents = vae.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, [0])
    assert 0.3 < latents.std() < 3 and latents.mean().abs() < 1


def test_equal_arguments_give_equal_bytes_in_another_process(tiny_lumina, tmp_path):
    code = f"import sys; from tools.make_tiny_models import main; main([{str(tmp_path)!r}, '--model', 'lumina'])"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    for file in ("dit", "gemma2", "ae", "whole"):
        assert (tmp_path / tiny_lumina[file].name).read_bytes() == tiny_lumina[file].read_bytes()
    other = make_lumina(tmp_path / "other", seed=1, files=("dit",))
    assert other["dit"].read_bytes() != tiny_lumina["dit"].read_bytes()


def test_the_command_line(tmp_path, capsys):
    main([str(tmp_path), "--model", "lumina", "--gemma2_folder", "--dtype", "fp32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["dit", "gemma2", "ae", "whole", "gemma2_folder"]
    assert {info.dtype for info in read_header(tmp_path / "lumina_tiny.safetensors").tensors.values()} == {"F32"}
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--model", "lumina", "--size", "deep"])
    assert end.value.code == 2 and "--size deep is not there for lumina" in capsys.readouterr().err


def test_no_weight_is_dead(tiny_lumina):
    for file in ("dit", "gemma2", "ae"):
        for name, tensor in weights(tiny_lumina[file]).items():
            assert tensor.numel() < 2 or tensor.float().std() > 0, name
