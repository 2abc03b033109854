"""tools/cache_text_encoder_outputs.py, and the training that comes after both tools."""

from __future__ import annotations

from tests.e2e.anima_runs import CACHED, SCRIPT, model_flags, run_flags, same_lora, write_dataset


def test_training_after_both_tools_encodes_nothing(run_script, tiny_anima, picture_folder, tmp_path):
    """One command line for all three: the tools take it whole."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --w 64 --h 64 --s 1 --d 1 --n blurry\n")
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(5), shuffle_caption=True, flip_aug=True)

    def flags(output):
        return [*model_flags(tiny_anima), *run_flags(tmp_path / output, dataset), *CACHED, f"--sample_prompts={prompts}",
                "--sample_every_n_epochs=2", "--max_train_epochs=3", "--mixed_precision=bf16"]  # fmt: skip

    live = run_script(SCRIPT, *flags("live"), f"--cache_dir={tmp_path / 'own'}")
    assert live.returncode == 0, live.stdout + live.stderr
    for tool in ("tools/cache_latents.py", "tools/cache_text_encoder_outputs.py"):
        done = run_script(tool, "--anima", *flags("out"))
        assert done.returncode == 0, done.stdout + done.stderr
    assert "captions: up to 3 variants of " in done.stdout and not (tmp_path / "out").exists()
    trained = run_script(SCRIPT, *flags("out"))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "latents: 5 of 5 cached on disk, 0 missing" in trained.stdout
    assert "text outputs: 18 of 18 cached on disk, 0 missing" in trained.stdout  # 5 x 3 captions, the prompt's two, the empty one
    assert "made" not in trained.stdout.replace("to be made again", "")
    assert same_lora(tmp_path / "live" / "tiny.safetensors", tmp_path / "out" / "tiny.safetensors")


def test_captions_are_cached_with_nothing_but_the_encoder(run_script, tiny_anima, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(4))
    flags = ["--anima", f"--dataset_config={dataset}", f"--qwen3={tiny_anima['qwen3']}"]
    done = run_script("tools/cache_text_encoder_outputs.py", *flags, launcher=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "pictures").glob("*-text.safetensors"))) == 4
    assert "all 5 text outputs are on disk, 5 of them made now" in done.stdout
