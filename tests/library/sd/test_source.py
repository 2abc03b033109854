"""Where a model's parts are: files, folders, and repositories on a hub of our own (tests/fake_hub.py)."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from library.errors import CheckpointError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from library.sd.source import chosen_files, find_model, find_vae, is_remote
from tests.fake_hub import FakeHub, Repository, asked

PARTS = ("unet", "text_encoder", "vae")
REPO = "someone/tiny"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.safetensors"]),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"], ["diffusion_pytorch_model.fp16.safetensors"]),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.safetensors"]),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
         ["diffusion_pytorch_model.fp16.safetensors"]),
        (["model.fp16.safetensors", "model.onnx", "flax_model.msgpack"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "pytorch_model.fp16.bin"], ["pytorch_model.bin"]),
        (["openvino_model.bin", "model.onnx_data"], []),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
          "model.fp16-00001-of-00002.safetensors"],
         ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors", "model-00001-of-00001.bf16.safetensors"],
         ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors"]),
        (["diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model-00001-of-00001.bin"],
         ["diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model-00001-of-00001.bin"]),
    ],
)  # fmt: skip
def test_the_best_weights_of_a_folder_are_chosen(names, chosen):
    assert chosen_files(names) == chosen


def test_what_is_a_repository_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_remote("runwayml/stable-diffusion-v1-5") and is_remote("a/b.c_d")
    for path in ("models/gone", "./a/b", "../a/b", "a/b/c", "a", "/a/b", "a/b.safetensors", "a/b.ckpt", "a\\b"):
        assert not is_remote(path), path


# ---------------------------------------------------------------- folders


def test_variants_pickles_and_shards_of_a_folder_are_read(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd["sd1_folder"], tmp_path / "model")
    unet, vae = (folder / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    expected = {part: find_model(str(folder), parts=PARTS).part(part).shapes for part in PARTS}
    tensors = dict(read_tensors(read_header(unet)))
    unet.unlink()
    halves = {f"diffusion_pytorch_model-0000{n}-of-00002.fp16.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for name, own in halves.items():
        save_safetensors(unet.with_name(name), {key: tensors[key] for key in own})
    weight_map = {key: name for name, own in halves.items() for key in own}
    unet.with_name("diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save(dict(read_tensors(read_header(vae))), vae.with_suffix(".bin"))
    vae.unlink()
    text = folder / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("model.fp16.safetensors"))
    found = find_model(str(folder), parts=PARTS)
    assert {part: found.part(part).shapes for part in PARTS} == expected


def test_a_folder_that_is_none_names_the_models_in_it(tmp_path):
    (tmp_path / "sdxl.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="has neither model_index.json nor unet/; name a file in it: sdxl.safetensors"):
        find_model(str(tmp_path), parts=PARTS)
    with pytest.raises(CheckpointError, match="--pretrained_model_name_or_path is missing"):
        find_model(None, parts=PARTS)


def test_a_part_that_is_missing_is_named(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd["sd1_folder"], tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "other.onnx")
    shutil.rmtree(folder / "text_encoder")
    found = find_model(str(folder), parts=PARTS)
    with pytest.raises(
        CheckpointError, match=r"model/unet holds no weights of a diffusers model \(in it: config.json, other.onnx\)"
    ):
        found.part("unet")
    with pytest.raises(CheckpointError, match="model/text_encoder is not there"):
        found.part("text_encoder")
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="scheduler_config.json is not readable as JSON"):
        found.settings("scheduler/scheduler_config.json")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    with asked(monkeypatch, tmp_path) as server:
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with the names of a model's files, and one number in each: a hub over HTTP is slow."""
    folder = tmp_path / "small"
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        save_safetensors(folder / part / f"{stem}.safetensors", {f"of the {part}": torch.zeros(1)})
        (folder / part / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    (folder / "model_index.json").write_text("{}")
    return folder


def publish(hub: FakeHub, folder: Path, name: str = REPO, **more: bytes) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories["model", name] = Repository(private=False, files={**files, **more})


def test_only_what_is_needed_is_fetched_and_once(hub, model, monkeypatch):
    publish(hub, model, **{"unet/diffusion_pytorch_model.bin": b"x", "unet/diffusion_pytorch_model.fp16.safetensors": b"x",
                                           "v1-5.ckpt": b"x", "safety_checker/model.safetensors": b"x", "README.md": b"x"})  # fmt: skip
    found = find_model(REPO, parts=("unet", "text_encoder"), token="hf_good")
    local = find_model(str(model), parts=())
    assert found.part("unet").shapes == local.part("unet").shapes
    assert found.settings("scheduler/scheduler_config.json") == local.settings("scheduler/scheduler_config.json")
    assert found.part("unet").path.with_name("config.json").is_file()
    kept = {path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file()}
    assert kept == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json",
                    "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}  # fmt: skip
    fetched = hub.asked("GET", "/resolve/")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert find_model(REPO, parts=("unet", "text_encoder"), token="hf_good").folder == found.folder
    assert hub.asked("GET", "/resolve/") == fetched
    with pytest.raises(CheckpointError, match="vae is not there"):
        found.part("vae")


@pytest.mark.parametrize("folder", ["", "vae"])
def test_a_vae_of_its_own_repository_or_of_a_models(folder, hub, model):
    publish(hub, model / folder)
    source = find_vae(REPO, token="hf_good")
    assert set(source.shapes) == {"of the vae"}
    assert hub.asked("GET", "unet") == 0


def test_without_the_network_the_cache_is_taken(hub, model, monkeypatch):
    publish(hub, model, **{"unet/diffusion_pytorch_model.bin": b"x", "README.md": b"x"})  # which nobody fetches
    found = find_model(REPO, parts=PARTS, token="hf_good")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert find_model(REPO, parts=PARTS, token="hf_good").folder == found.folder
    assert len(hub.requests) == asked
    with pytest.raises(
        CheckpointError, match="other/model is no file or folder here, and on the hub nothing is asked, since HF_HUB_OFFLINE"
    ):
        find_model("other/model", parts=PARTS)


def test_a_cache_that_lacks_a_part_is_not_taken(hub, model, monkeypatch):
    publish(hub, model)
    find_model(REPO, parts=("unet",), token="hf_good")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    find_model(REPO, parts=("unet",), token="hf_good")
    for find in (lambda: find_model(REPO, parts=("unet", "vae")), lambda: find_vae(REPO)):
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the cache does not have it"):
            find()


def test_a_download_that_breaks_off_leaves_no_model(hub, model, monkeypatch):
    publish(hub, model)

    def breaks_off(repo_id: str, *, allow_patterns: list[str], **where: Any) -> str:
        if where.get("local_files_only"):
            return whole(repo_id, allow_patterns=allow_patterns, **where)
        whole(repo_id, allow_patterns=allow_patterns[:2], **where)
        raise ConnectionError("reset")

    whole = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(CheckpointError, match="on the hub it cannot be looked for .ConnectionError: reset"):
        find_model(REPO, parts=PARTS, token="hf_good")


def test_with_a_hub_that_does_not_answer_the_cache_is_taken(hub, model, monkeypatch):
    publish(hub, model)
    found = find_model(REPO, parts=PARTS, token="hf_good")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert find_model(REPO, parts=PARTS, token="hf_good").folder == found.folder
    with pytest.raises(
        CheckpointError, match="other/model is no file or folder here, and on the hub it cannot be looked for"
    ) as caught:
        find_model("other/model", parts=PARTS, token="hf_good")
    assert "hf_good" not in str(caught.value)


def test_a_repository_that_is_not_there_or_holds_no_model(hub):
    with pytest.raises(CheckpointError, match="there is no such repository, or this access token may not see it") as caught:
        find_model("other/model", parts=PARTS, token="hf_good")
    assert len(caught.value.problems) == 1 and "hf_good" not in str(caught.value)
    hub.repositories["model", REPO] = Repository(private=False, files={"README.md": b"x", "model.safetensors": b"x"})
    with pytest.raises(
        CheckpointError, match="someone/tiny: this repository on the hub holds no model in the layout of diffusers"
    ):
        find_model(REPO, parts=PARTS, token="hf_good")


def test_a_wrong_token_is_not_told(hub):
    with pytest.raises(CheckpointError, match="may not see it: check the name") as caught:
        find_model("other/model", parts=PARTS, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
