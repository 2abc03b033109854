from __future__ import annotations

import builtins
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import CheckpointError
from library.files.open_weights import open_weights
from library.files.safetensors_file import save_safetensors

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5, dtype=torch.float16), "n": torch.tensor(7)}
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
KINDS = ("weights.safetensors", "weights.ckpt", "safetensors named.ckpt", "pickle named.safetensors")


def write(path: Path, tensors: dict = TENSORS) -> Path:
    """A file of either kind under a name that may be of the other."""
    if path.name in ("weights.safetensors", "safetensors named.ckpt"):
        save_safetensors(path, tensors, {"modelspec.title": "x"})
    else:
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_names_shapes_and_tensors_of_every_kind_of_file(tmp_path, name):
    source = open_weights(write(tmp_path / name), flag="--vae")
    assert source.path == tmp_path / name
    assert source.shapes == {"a": (3, 4), "b": (5,), "n": ()}
    read = dict(source.tensors(["b", "a"]))
    assert set(read) == {"a", "b"}
    assert all(torch.equal(tensor, TENSORS[key]) and tensor.dtype == TENSORS[key].dtype for key, tensor in read.items())
    assert source.metadata.get("modelspec.title") == ("x" if "safetensors" in name.partition(" ")[0] else None)


def test_safetensors_need_no_torch(tmp_path):
    path = write(tmp_path / "weights.safetensors")
    code = "import sys; from pathlib import Path; from library.files.open_weights import open_weights; "
    code += f"print(len(open_weights(Path({str(path)!r}), flag='').shapes), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout.split() == ["3", "False"]


@FORMATS
def test_only_tensors_of_a_pickle_are_seen(tmp_path, is_zip):
    content = {**TENSORS, "step": 3, "list": [torch.ones(2)], 5: torch.ones(1), "number": np.float64(3.0), "type": np.dtype("f4")}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    assert set(open_weights(tmp_path / "x.pt", flag="--vae").shapes) == set(TENSORS)


@FORMATS
@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": None}, {"epoch": 1}, torch.ones(3)])
def test_a_pickle_without_named_tensors_is_named(tmp_path, is_zip, content):
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="--vae .*x.pt holds no named tensors"):
        open_weights(tmp_path / "x.pt", flag="--vae")


@FORMATS
def test_the_trainer_in_old_checkpoints_is_left_out_without_running_it(tmp_path, is_zip, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    package = type(sys)(name)
    callback = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    package.ModelCheckpoint = callback
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, type(sys)(part))
    monkeypatch.setitem(sys.modules, name, package)
    instance = callback()
    instance.best = 3
    content = {"state_dict": TENSORS, "callbacks": {callback: {"best": 1}, "other": instance}}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    monkeypatch.delitem(sys.modules, name)
    source = open_weights(tmp_path / "x.ckpt", flag="--vae")
    assert torch.equal(dict(source.tensors(["a"]))["a"], TENSORS["a"])
    assert name not in sys.modules


class Opens:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


class Runs(Opens):
    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@FORMATS
@pytest.mark.parametrize("kind", [Opens, Runs])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, is_zip, kind):
    trace = tmp_path / "it ran"
    content = {"state_dict": TENSORS, "extra": kind(trace)}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        CheckpointError, match=r"x.ckpt holds more than weights: reading it would run [\w.]+, .* nothing ran"
    ) as caught:
        open_weights(tmp_path / "x.ckpt", flag="--pretrained_model_name_or_path")
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_with_code_is_refused_too(tmp_path, protocol):
    trace = tmp_path / "it ran"
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": Runs(trace)}, protocol))
    with pytest.raises(CheckpointError, match="nothing (of it )?ran"):
        open_weights(tmp_path / "x.bin", flag="--vae")
    assert not trace.exists()


@FORMATS
def test_a_cut_pickle_is_one_message(tmp_path, is_zip):
    torch.save(TENSORS, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    whole = (tmp_path / "x.ckpt").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="--vae .*cut.ckpt .*(nothing (of it )?ran|is empty)") as caught:
            open_weights(tmp_path / "cut.ckpt", flag="--vae")
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_text_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="--vae .*gone.ckpt cannot be read: No such file"):
        open_weights(tmp_path / "gone.ckpt", flag="--vae")
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="page.ckpt is damaged"):
        open_weights(tmp_path / "page.ckpt", flag="--vae")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="page.safetensors is not a safetensors file"):
        open_weights(tmp_path / "page.safetensors", flag="--vae")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_one_model(tmp_path, ending):
    names = {"a": f"m-1.{ending}", "b": f"m-2.{ending}", "n": f"m-2.{ending}"}
    for shard in set(names.values()):
        part = {key: TENSORS[key] for key, name in names.items() if name == shard}
        (save_safetensors if ending == "safetensors" else lambda path, part: torch.save(part, path))(tmp_path / shard, part)
    (tmp_path / f"m.{ending}.index.json").write_text(json.dumps({"weight_map": names}))
    source = open_weights(tmp_path, flag="--vae")
    assert source.path == tmp_path and source.shapes == {"a": (3, 4), "b": (5,), "n": ()}
    assert {key: tensor.tolist() for key, tensor in source.tensors(["n", "a"])} == {"a": TENSORS["a"].tolist(), "n": 7}
    (tmp_path / f"m-2.{ending}").unlink()
    with pytest.raises(CheckpointError, match=f"1 of 2 files that it names are missing .m-2.{ending}"):
        open_weights(tmp_path, flag="--vae")


@pytest.mark.parametrize(
    "index", ["[]", "{}", "no json", '{"weight_map": {"a": "../x.bin"}}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="is no list of weight files"):
        open_weights(tmp_path, flag="--vae")


def test_the_one_file_of_a_folder_is_taken(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weight files"):
        open_weights(tmp_path, flag="--vae")
    torch.save(TENSORS, tmp_path / "a.bin")
    assert open_weights(tmp_path, flag="--vae").shapes
    save_safetensors(tmp_path / "b.safetensors", {"b": TENSORS["b"]})
    assert set(open_weights(tmp_path, flag="--vae").shapes) == {"b"}
    save_safetensors(tmp_path / "c.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match="several weight files .b.safetensors, c.safetensors"):
        open_weights(tmp_path, flag="--vae")


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_while_reading_a_pickle_is_the_model_and_one_tensor(tmp_path):
    """What has been copied from the mapped file does not count twice."""
    torch.save({str(number): torch.full((8, 2**20), float(number)) for number in range(6)}, tmp_path / "x.ckpt")  # 32 MiB each
    source = open_weights(tmp_path / "x.ckpt", flag="--vae")
    before, kept = resident_mib(), []
    for index, (_, tensor) in enumerate(source.tensors(source.shapes), 1):
        kept.append(tensor)
        assert resident_mib() - before < 32 * index + 40
    assert [int(tensor[0, 0]) for tensor in kept] == list(range(6))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
