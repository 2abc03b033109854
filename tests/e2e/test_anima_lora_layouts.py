"""Runs that save LoRA files in the layouts of other programs, and start from such files."""

from __future__ import annotations

from library.files.safetensors_file import read_header
from networks.anima_layouts import ANIMA_NAMES
from networks.lora_formats import in_our_layout
from tests.e2e.anima_runs import CACHED, SCRIPT, lora, model_flags, run_flags, write_dataset


def test_diffusers_files_are_saved_and_gone_on_from_in_comfyui_s(run_script, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(4))
    common = [*model_flags(tiny_anima), *CACHED, "--learning_rate=0.01"]
    saving = ["--save_format=diffusers", "--save_every_n_steps=1", "--save_state", "--save_precision=bf16"]
    done = run_script(SCRIPT, *common, *run_flags(tmp_path / "one", dataset), *saving, "--max_train_steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert [file.name for file in files] == ["tiny-step00000001.safetensors", "tiny-step00000002.safetensors", "tiny.safetensors"]
    for file in files:
        header = read_header(file)
        assert all(key.startswith("transformer.") and info.dtype == "BF16" for key, info in header.tensors.items())
        assert header.metadata["ss_network_dim"] == "4" and header.metadata["sshs_model_hash"]
    state = next((tmp_path / "one" / "tiny-state").glob("*network*"))
    assert "lora_unet_blocks_0_self_attn_q_proj.alpha" in read_header(state).tensors  # states keep our names

    start = [f"--network_weights={files[-1]}", "--dim_from_weights", f"--base_weights={files[0]}", "--save_format=comfy"]
    done = run_script(
        SCRIPT, *common, *run_flags(tmp_path / "two", dataset), *start, "--max_train_steps=1", "--lr_scheduler=constant"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    comfy = lora(tmp_path / "two" / "tiny.safetensors")
    assert all(key.startswith("diffusion_model.") for key in comfy)
    before, after = (in_our_layout("file", tensors, ANIMA_NAMES) for tensors in (lora(files[-1]), comfy))
    assert before.keys() == after.keys()
    assert all(float(after[key]) == 4.0 for key in after if key.endswith(".alpha"))  # the strength is in lora_B
    moved = [(after[key] - before[key].float()).abs().max() for key in after if key.endswith("lora_up.weight")]
    assert 0 < max(moved) < 0.05  # one step from there, not from zero
