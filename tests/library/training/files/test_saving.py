"""Writing LoRA files in the layout that is asked for, and removing old ones."""

from __future__ import annotations

import logging

import pytest
import torch

from library.errors import OptionError
from library.files.safetensors_file import read_header
from library.training.files.saving import check_save_format, remove_old, save_network
from tests.networks import third_party
from tests.networks.full_anima_lora import full_lora


def test_files_and_folders_go(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "inside").touch()
    remove_old(tmp_path / "file", tmp_path / "state", tmp_path / "was never there")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_told_and_the_rest_goes(tmp_path, caplog):
    (tmp_path / "file").touch()
    (tmp_path / "old").touch()
    remove_old(tmp_path / "file" / "below", tmp_path / "old")
    assert not (tmp_path / "old").exists()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"could not remove {tmp_path / 'file' / 'below'} (" in record.getMessage()


@pytest.mark.parametrize(("layout", "key"), [(None, "lora_unet_blocks_0_mlp_layer1.alpha"),
                                             ("comfy", "diffusion_model.blocks.0.mlp.layer1.alpha"),
                                             ("diffusers", "transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight")])  # fmt: skip
def test_a_network_is_saved_in_the_layout_that_is_asked_for(tmp_path, layout, key):
    network = full_lora(blocks=1, adapter_blocks=1, text_encoder=False)
    check_save_format(network, layout)
    save_network(network, tmp_path / "a.safetensors", dtype=torch.bfloat16, metadata={"ss_steps": "3"}, layout=layout)
    header = read_header(tmp_path / "a.safetensors")
    assert header.tensors[key].dtype == "BF16" and header.metadata["ss_steps"] == "3" and header.metadata["sshs_model_hash"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_network_that_the_layout_cannot_hold():
    network = full_lora(blocks=1, adapter_blocks=1, layers=1)
    check_save_format(network, "comfy")
    with pytest.raises(OptionError, match="--save_format=diffusers cannot hold this network: .* no place for 7 of its modules"):
        check_save_format(network, "diffusers")


def test_a_network_module_of_somebody_else():
    network = third_party.create_network(1.0, None, 1.0, None, [], None)
    check_save_format(network, None)
    with pytest.raises(OptionError, match="--save_format=comfy: this network module writes its files in its own way"):
        check_save_format(network, "comfy")
