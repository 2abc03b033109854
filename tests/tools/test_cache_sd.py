"""The caching tools for Stable Diffusion and SDXL as real processes, and the trainings that come after them."""

from __future__ import annotations

import pytest

from tests.e2e.sd_runs import SCRIPTS, model_flags, run_flags, write_dataset

TOOLS = ("tools/cache_latents.py", "tools/cache_text_encoder_outputs.py")
CACHES = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only")


@pytest.fixture
def dataset(picture_folder, tmp_path):
    return write_dataset(tmp_path / "my.toml", picture_folder(4))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "switch"), [("sd2", ()), ("sdxl", ("--sdxl",))])
def test_training_after_both_tools_encodes_nothing(kind, switch, run_script, tiny_sd, dataset, tmp_path):
    """One command line for all three: the tools take it whole."""
    flags = [*model_flags(kind, tiny_sd), *run_flags(tmp_path / "out", dataset), *CACHES, "--max_train_steps=2"]
    for tool, made in zip(TOOLS, ("all 4 latents", "all 5 text outputs"), strict=True):  # 4 captions and the empty one
        done = run_script(tool, *switch, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{made} are on disk" in done.stdout and not (tmp_path / "out").exists()
    trained = run_script(SCRIPTS[kind], *flags, "--dry_run")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "latents: 4 of 4 cached on disk, 0 missing" in trained.stdout
    assert "text outputs: 5 of 5 cached on disk, 0 missing" in trained.stdout


def test_latents_need_nothing_but_a_vae(run_script, tiny_sd, dataset, tmp_path):
    done = run_script(TOOLS[0], f"--dataset_config={dataset}", f"--vae={tiny_sd['vae']}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "pictures").glob("*.sd-latents.safetensors"))) == 4


def test_sdxl_without_its_switch_is_told(run_script, tiny_sd, dataset):
    done = run_script(TOOLS[1], f"--dataset_config={dataset}", f"--pretrained_model_name_or_path={tiny_sd['sdxl']}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is an SDXL checkpoint (add --sdxl), not a Stable Diffusion 1.x or 2.x checkpoint" in done.stderr
