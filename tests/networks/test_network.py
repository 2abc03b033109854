"""The network that trainers drive, on a small module tree with real names."""

from __future__ import annotations

import errno
import gc
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import CheckpointError, NetworkError, OutputError
from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from networks import lora_anima

REPOSITORY = Path(__file__).resolve().parents[2]


def applied(unet, text_encoders=None, *, dim=4, alpha=2.0, seed=1, trained=True, **given):
    torch.manual_seed(seed)
    network = lora_anima.create_network(1.0, dim, alpha, None, text_encoders, unet, **given)
    network.apply_to(text_encoders, unet)
    for lora in network.loras if trained else ():
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    return network


def outputs(model):
    """What every Linear of the denoiser's blocks gives for one input each."""
    generator = torch.Generator().manual_seed(5)
    linears = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    return [layer(torch.randn(2, 3, layer.in_features, generator=generator)) for layer in linears]


def close(one, other, tolerance=1e-5):
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(one, other, strict=True))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_new_network_changes_nothing_and_trains_only_itself(tiny_denoiser):
    before, frozen = outputs(tiny_denoiser), [*tiny_denoiser.parameters()]
    network = applied(tiny_denoiser, trained=False)
    assert equal(outputs(tiny_denoiser), before)
    assert len([*network.parameters()]) == 2 * 20
    assert not {id(p) for p in network.parameters()} & {id(p) for p in frozen}
    assert len([*tiny_denoiser.parameters()]) == len(frozen)


def test_no_parameters_before_apply_to(tiny_denoiser):
    network = lora_anima.create_network(1.0, 4, 1.0, None, None, tiny_denoiser)
    assert not [*network.parameters()] and not network.state_dict()
    assert "forward" not in vars(tiny_denoiser.get_submodule("blocks.0.mlp.layer1"))


def test_state_dict_keys_and_order(tiny_denoiser, tiny_text_encoder):
    network = applied(tiny_denoiser, [tiny_text_encoder])
    keys = list(network.state_dict())
    assert keys[:3] == [f"lora_te_layers_0_self_attn_q_proj.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]
    assert len(keys) == 3 * 27


@pytest.mark.parametrize(("text", "unet", "count"), [(True, False, 7), (False, True, 20), (True, True, 27)])
def test_apply_to_one_model(tiny_denoiser, tiny_text_encoder, text, unet, count):
    network = lora_anima.create_network(1.0, 4, 1.0, None, [tiny_text_encoder], tiny_denoiser)
    network.apply_to([tiny_text_encoder], tiny_denoiser, text, unet)
    assert len([*network.parameters()]) == 2 * count
    assert ("forward" in vars(tiny_denoiser.get_submodule("blocks.0.mlp.layer1"))) == unet


def test_nothing_to_apply_to(tiny_denoiser):
    network = lora_anima.create_network(1.0, 4, 1.0, None, None, tiny_denoiser)
    with pytest.raises(NetworkError, match="no LoRA is left to train"):
        network.apply_to(None, tiny_denoiser, True, False)


def test_multiplier_and_enabled(tiny_denoiser):
    before = outputs(tiny_denoiser)
    network = applied(tiny_denoiser)
    full = outputs(tiny_denoiser)
    network.set_multiplier(0.0)
    assert equal(outputs(tiny_denoiser), before) and not equal(full, before)
    network.set_multiplier(0.5)
    halfway = [(a + b) / 2 for a, b in zip(before, full, strict=True)]
    assert close(outputs(tiny_denoiser), halfway)
    network.set_enabled(False)
    assert equal(outputs(tiny_denoiser), before)


def test_merge_equals_forward(tiny_denoiser):
    network = applied(tiny_denoiser)
    network.set_multiplier(0.7)
    with_lora = outputs(tiny_denoiser)
    network.merge_to(None, tiny_denoiser, network.state_dict(), torch.float32, "cpu")
    network.set_enabled(False)
    assert network.is_mergeable() and close(outputs(tiny_denoiser), with_lora)


def test_merging_can_be_undone(tiny_denoiser):
    before = outputs(tiny_denoiser)
    network = applied(tiny_denoiser)
    with_lora = outputs(tiny_denoiser)
    network.backup_weights()
    network.pre_calculation()
    assert close(outputs(tiny_denoiser), with_lora)
    network.restore_weights()
    network.set_enabled(False)
    assert equal(outputs(tiny_denoiser), before)


# --- optimizer


def groups_of(network, *rates):
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(*rates)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])
    return {name: (group["lr"], len(group["params"])) for name, group in zip(names, groups, strict=True)}


def test_learning_rates_fall_back_to_the_general_one(tiny_denoiser, tiny_text_encoder):
    network = applied(tiny_denoiser, [tiny_text_encoder])
    assert groups_of(network, None, None, 1e-4) == {"textencoder 1": (1e-4, 14), "unet": (1e-4, 40)}
    assert groups_of(network, [], 2e-4, 1e-4) == {"textencoder 1": (1e-4, 14), "unet": (2e-4, 40)}
    assert groups_of(network, [3e-4, 9.0], None, 1e-4) == {"textencoder 1": (3e-4, 14), "unet": (1e-4, 40)}
    assert groups_of(network, 3e-4, None, 1e-4)["textencoder 1"] == (3e-4, 14)


def test_a_learning_rate_of_zero_freezes(tiny_denoiser, tiny_text_encoder):
    network = applied(tiny_denoiser, [tiny_text_encoder], network_reg_lrs=".*mlp.*=0")
    assert groups_of(network, 0.0, None, 1e-4) == {"unet": (1e-4, 32)}
    assert len(network.get_trainable_params()) == 32 and len([*network.parameters()]) == 54
    network.prepare_grad_etc(None, tiny_denoiser)
    sum(output.sum() for output in outputs(tiny_denoiser)).backward()
    assert network.lora_unet_blocks_0_mlp_layer1.lora_up.weight.grad is None
    assert network.lora_unet_blocks_0_self_attn_q_proj.lora_up.weight.grad is not None


def test_lora_plus(tiny_denoiser):
    network = applied(tiny_denoiser, loraplus_lr_ratio="16", loraplus_unet_lr_ratio="4", network_reg_lrs=".*mlp.*=1e-3")
    assert groups_of(network, None, 1e-4, None) == {
        "unet reg_lr_0": (1e-3, 4),
        "unet reg_lr_0 plus": (4e-3, 4),
        "unet": (1e-4, 16),
        "unet plus": (4e-4, 16),
    }


def test_nothing_to_train(tiny_denoiser):
    with pytest.raises(NetworkError, match="every learning rate is 0"):
        applied(tiny_denoiser).prepare_optimizer_params(None, 0.0, 1e-4)


def test_a_step_of_training(tiny_denoiser):
    network = applied(tiny_denoiser, trained=False)
    groups, _ = network.prepare_optimizer_params(None, None, 1e-2)
    network.prepare_grad_etc(None, tiny_denoiser)
    network.enable_gradient_checkpointing()
    network.eval()
    network.on_epoch_start(None, tiny_denoiser)
    network.on_step_start(None, tiny_denoiser)
    assert network.training and network.unet_loras[0].training
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(4):
        loss = sum(output.square().mean() for output in outputs(tiny_denoiser))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_max_norm_leaves_small_pairs_alone(tiny_denoiser):
    network = applied(tiny_denoiser)
    nn.init.zeros_(network.unet_loras[0].lora_up.weight)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    scaled, mean, largest = network.apply_max_norm_regularization(1e6, "cpu")
    assert scaled == 0 and 0 < mean < largest
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    limit = float(largest) / 2
    scaled, _, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert scaled > 0 and abs(float(largest) - limit) < 1e-5
    assert all(lora.norm().item() <= limit * 1.00001 for lora in network.unet_loras)


# --- files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_save_then_load_is_exact(tiny_denoiser, tmp_path, suffix):
    network = applied(tiny_denoiser)
    expected = {key: value.clone() for key, value in network.state_dict().items()}
    network.save_weights(str(tmp_path / f"a{suffix}"), None, {"ss_note": "x"})
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    report = network.load_weights(str(tmp_path / f"a{suffix}"))
    assert (report.loaded, report.missing, report.unexpected) == (20, (), ())
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_saved_dtype(tiny_denoiser, tmp_path):
    network = applied(tiny_denoiser)
    network.save_weights(tmp_path / "a.safetensors", torch.bfloat16, None)
    saved = dict(read_tensors(read_header(tmp_path / "a.safetensors")))
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert network.unet_loras[0].lora_up.weight.dtype == torch.float32
    network.load_weights(tmp_path / "a.safetensors")
    assert network.unet_loras[0].lora_up.weight.dtype == torch.float32


def test_loaded_alpha_sets_the_strength(tiny_denoiser, tmp_path):
    network = applied(tiny_denoiser, alpha=2.0)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    other = applied(tiny_denoiser, alpha=4.0, seed=2)
    other.load_weights(tmp_path / "a.safetensors")
    assert {lora.scale for lora in other.unet_loras} == {0.5}


def test_partial_files_are_reported(tiny_denoiser, tmp_path, caplog):
    applied(tiny_denoiser, exclude_patterns=".*mlp.*").save_weights(tmp_path / "a.safetensors", None, {})
    network = applied(tiny_denoiser, exclude_patterns=".*self_attn.*")
    report = network.load_weights(tmp_path / "a.safetensors")
    assert (report.loaded, len(report.missing), len(report.unexpected)) == (8, 4, 8)
    assert str(report) == (
        "8 LoRA modules loaded; "
        "4 are not in it and start anew (lora_unet_blocks_0_mlp_layer1, lora_unet_blocks_0_mlp_layer2, lora_unet_blocks_1_mlp_layer1 and 1 more)"
    )  # fmt: skip
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"warning: {tmp_path / 'a.safetensors'}: 8 modules have no place in this network and what the file learned there is left "
        "out (lora_unet_blocks_0_self_attn_k_proj, lora_unet_blocks_0_self_attn_output_proj, lora_unet_blocks_0_self_attn_q_proj "
        "and 5 more): the network arguments, the trained parts or the model are not those of the file; --dim_from_weights takes "
        "its modules"
    ]


@pytest.mark.parametrize(
    ("text", "unet", "prefix", "other"), [(True, False, "lora_te_", "lora_unet_"), (False, True, "lora_unet_", "lora_te_")]
)
def test_one_part_of_two(tiny_denoiser, tiny_text_encoder, tmp_path, caplog, text, unet, prefix, other):  # noqa: PLR0913
    """A network of which one part is dropped saves, trains and loads what is left, and says what of a file has no place."""
    applied(tiny_denoiser, [tiny_text_encoder]).save_weights(tmp_path / "both.safetensors", None, {})
    network = lora_anima.create_network(1.0, 4, 2.0, None, [tiny_text_encoder], tiny_denoiser)
    network.apply_to([tiny_text_encoder], tiny_denoiser, text, unet)
    assert list(groups_of(network, 1e-4, 1e-4)) == ["textencoder 1" if text else "unet"]
    report = network.load_weights(tmp_path / "both.safetensors")
    count = 7 if text else 20
    assert (report.loaded, report.missing, len(report.unexpected)) == (count, (), 27 - count)
    assert (
        f"{27 - count} modules have no place in this network and what the file learned there is left out ({other}" in caplog.text
    )
    assert ("the denoiser" if text else "this text encoder") + " is not trained" in caplog.text
    assert "merge it with --base_weights" in caplog.text and "--dim_from_weights" not in caplog.text
    network.save_weights(tmp_path / "one.safetensors", None, {})
    keys = list(read_header(tmp_path / "one.safetensors").tensors)
    assert len(keys) == 3 * count and all(key.startswith(prefix) for key in keys)


def test_a_dropped_part_does_not_keep_its_model(tiny_denoiser):
    encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(4, 4)})})])})
    layer = weakref.ref(encoder["layers"][0]["mlp"]["up_proj"])
    network = lora_anima.create_network(1.0, 4, 2.0, None, [encoder], tiny_denoiser)
    network.apply_to([encoder], tiny_denoiser, False, True)
    del encoder
    gc.collect()
    assert layer() is None


def test_half_a_pair_is_a_damaged_file(tiny_denoiser, tmp_path):
    network = applied(tiny_denoiser)
    halves = {key: value for key, value in network.state_dict().items() if key != "lora_unet_blocks_0_mlp_layer1.lora_up.weight"}
    save_safetensors(tmp_path / "torn.safetensors", halves)
    for read in (network.load_weights, lambda file: lora_anima.create_network_from_weights(1.0, file, None, [], tiny_denoiser)):
        with pytest.raises(
            CheckpointError, match=r"only one of lora_down and lora_up \(lora_unet_blocks_0_mlp_layer1\).*damaged"
        ):
            read(tmp_path / "torn.safetensors")


def test_another_rank_is_refused_once(tiny_denoiser, tmp_path):
    applied(tiny_denoiser, dim=8).save_weights(tmp_path / "a.safetensors", None, {})
    network = applied(tiny_denoiser, dim=4)
    with pytest.raises(NetworkError, match=r"lora_unet_blocks_0_self_attn_q_proj \(rank 8 in the file, 4 here\).*and 17 more.*"
                                           r"--dim_from_weights") as caught:  # fmt: skip
        network.load_weights(tmp_path / "a.safetensors")
    assert len(caught.value.problems) == 1


def test_nothing_fits(tiny_denoiser, tmp_path):
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(NetworkError, match="holds no LoRA modules"):
        applied(tiny_denoiser).load_weights(tmp_path / "a.pt")


def test_a_disk_that_fills_up_in_a_pickle_is_told(tiny_denoiser, small_disk):
    with pytest.raises(OutputError, match=r"a\.ckpt: the disk is full"):
        applied(tiny_denoiser, dim=2048).save_weights(small_disk / "a.ckpt", None, {})
    assert list(small_disk.iterdir()) == []


def test_full_disk_keeps_the_old_file(tiny_denoiser, tmp_path, monkeypatch):
    network = applied(tiny_denoiser)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    before = (tmp_path / "a.safetensors").read_bytes()

    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OutputError, match=r"a\.safetensors: the disk is full"):
        network.save_weights(tmp_path / "a.safetensors", torch.float16, {})
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


SAVE = """
import sys, torch
from torch import nn
from networks import lora_anima
torch.manual_seed(7)
model = nn.Module()
model.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"layer1": nn.Linear(8, 16)})})])
network = lora_anima.create_network(1.0, 4, 1.0, None, None, model)
network.apply_to(None, model)
names = {f"ss_{name}": name for name in sys.argv[2:]}
network.save_weights(sys.argv[1], torch.bfloat16, {**names, "modelspec.title": "t"})
"""


def test_equal_networks_give_equal_bytes_in_every_process(tmp_path):
    found = []
    for seed in ("1", "2"):
        file = tmp_path / f"{seed}.safetensors"
        names = ["b", "a", "c"] if seed == "1" else ["c", "a", "b"]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY), "PATH": ""}
        subprocess.run([sys.executable, "-c", SAVE, file, *names], check=True, env=environment, cwd=tmp_path)
        found.append(file.read_bytes())
    assert found[0] == found[1]


def test_the_base_model_of_a_file_is_named(tiny_denoiser, tmp_path, caplog):
    file = tmp_path / "a.safetensors"
    applied(tiny_denoiser, exclude_patterns=".*mlp.*").save_weights(file, None, {"ss_base_model_version": "sd_v1"})
    applied(tiny_denoiser, exclude_patterns=".*self_attn.*").load_weights(file)
    assert "those of the file (its metadata names the base model sd_v1); --dim_from_weights" in caplog.text


def test_ranks_that_no_layer_can_use_are_warned_of(tiny_denoiser, caplog):
    targets = lora_anima.create_network(1.0, 4, 1.0, None, None, tiny_denoiser)._targets.values()
    largest = max(min(target.candidate.module.weight.shape) for target in targets)
    lora_anima.create_network(1.0, largest, 1.0, None, None, tiny_denoiser)
    assert "--network_dim" not in caplog.text
    lora_anima.create_network(1.0, largest + 1, 1.0, None, None, tiny_denoiser)
    assert f"warning: --network_dim={largest + 1} is more than any layer can use: the largest has rank {largest}" in caplog.text
