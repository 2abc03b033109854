"""--debug_dataset and --show_captions as people start them: a real process, real pictures, no model files."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.anima_runs import SCRIPT, write_dataset
from tests.e2e.kinds import KINDS, model_flags, over


@over("anima", "sd3", slow=("lumina",))
def test_page_and_captions_of_a_folder(run_script, kind, request, picture_folder, tmp_path):
    pictures = picture_folder(6)
    (pictures / "picture_02.txt").write_text("word " * 600, encoding="utf-8")
    dataset = write_dataset(tmp_path / "my.toml", pictures, shuffle_caption=True, flip_aug=True, caption_dropout_rate=0.5)
    models = (
        model_flags(kind, request.getfixturevalue(KINDS[kind].fixture)) if kind == "lumina" else []
    )  # whose tokenizer is in them
    flags = [*models, "--dataset_config", dataset, "--debug_dataset", "--show_captions=2", "--output_dir=out", "--seed=5"]
    done = run_script(KINDS[kind].script, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 6 captions" in done.stdout
    assert "does not see the last" in done.stdout
    for encoder in {"anima": ["Qwen3"], "sd3": ["CLIP-L", "T5"], "lumina": ["Gemma 2"]}[kind]:
        assert f"{encoder}: at most" in done.stdout, done.stdout
    html = (tmp_path / "out" / "dataset.html").read_text(encoding="utf-8")
    assert html.count("<article") == 6
    assert done.stdout.rstrip().splitlines()[-1].startswith("page: out")


def test_masks_validation_and_bad_images_are_on_the_page(run_script, picture_folder, tmp_path):
    from PIL import Image

    pictures, masks = picture_folder(6), tmp_path / "masks"
    masks.mkdir()
    for path in sorted(pictures.iterdir()):
        if path.suffix != ".txt":
            with Image.open(path) as picture:
                Image.new("L", picture.size, 99).save(masks / f"{path.stem}.png")
    (pictures / "broken.png").write_bytes(b"not a picture")
    dataset = write_dataset(tmp_path / "my.toml", pictures, conditioning_data_dir=str(masks))
    text = dataset.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 2\nvalidation_split = 0.3", 1)
    dataset.write_text(text, encoding="utf-8")
    flags = ["--dataset_config", dataset, "--debug_dataset", "--skip_bad_images", "--masked_loss", "--output_dir=out"]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    held_out = int(re.search(r"(\d) for validation", done.stdout)[1])
    assert 1 <= held_out <= 2
    assert "6 masked" in done.stdout
    assert "left out (--skip_bad_images): 1 bad image or caption" in done.stdout
    html = (tmp_path / "out" / "dataset.html").read_text(encoding="utf-8")
    assert html.count('class="mask"') == 6
    assert "broken.png" in html
    assert html.count('class="badge validation"') == held_out


def test_captions_need_no_folder_and_leave_nothing(run_script, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))
    done = run_script(SCRIPT, "--dataset_config", dataset, "--show_captions=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.toml", "pictures"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset_config=none.toml"], "none.toml"),
        (["--train_data_dir=none", "--resolution=64"], "none"),
        (["--train_data_dir=empty", "--resolution=64"], "empty"),
        (["--dataset_config=my.toml", "--output_dir=taken"], "--output_dir taken"),
        (["--dataset_config=my.toml", "--t5_tokenizer_path=none"], "--t5_tokenizer_path none"),
        (["--dataset_config=my.toml", "--show_captions=0"], "--show_captions is 0"),
    ],
)
def test_mistakes_end_in_one_message(run_script, picture_folder, tmp_path, flags, said):
    write_dataset(tmp_path / "my.toml", picture_folder(2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("a file")
    done = run_script(SCRIPT, "--debug_dataset", *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.html"))


def test_a_full_disk_is_told_and_leaves_nothing(run_script, picture_folder, small_disk, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(8, scale=0.5))
    done = run_script(SCRIPT, "--dataset_config", dataset, "--debug_dataset", "--output_dir", small_disk)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the disk is full" in done.stderr
    assert list(small_disk.iterdir()) == []


def test_other_processes_are_silent(run_script, picture_folder, tmp_path):
    dataset = write_dataset(tmp_path / "my.toml", picture_folder(2))
    environment = {"RANK": "1", "WORLD_SIZE": "2"}
    done = run_script(SCRIPT, "--dataset_config", dataset, "--debug_dataset", "--show_captions=1", environment=environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of a shell")
def test_a_reader_that_has_seen_enough_is_no_error(script_environment, picture_folder, tmp_path):
    pictures = picture_folder(40, scale=0.1)
    for path in pictures.glob("*.txt"):
        path.write_text("word " * 500, encoding="utf-8")  # more than a pipe holds
    dataset = write_dataset(tmp_path / "my.toml", pictures)
    command = [sys.executable, str(REPOSITORY / SCRIPT), "--dataset_config", str(dataset), "--show_captions=40"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=script_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("dataset 1")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
