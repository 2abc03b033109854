"""Masked training of a real run, from mask images and from the alpha channel, with and without caches."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.e2e.kinds import CACHED, KINDS, lora, model_flags, over, run_flags, same_lora, write_dataset

STEPS, ALONE = "--max_train_steps=4", "--network_train_unet_only"


def write_masks(images: Path, folder: Path) -> Path:
    """A mask for each picture: white to the left of the middle."""
    folder.mkdir()
    for path in images.glob("*.png"):
        with Image.open(path) as picture:
            width, height = picture.size
        mask = Image.new("L", (width, height), 0)
        ImageDraw.Draw(mask).rectangle((0, 0, width // 2, height), fill=255)
        mask.save(folder / f"{path.stem}.png")
    return folder


@pytest.fixture
def images(picture_folder) -> Path:
    """Without EXIF orientation and transparency, so that the masks above fit."""
    folder = picture_folder(5)
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.suffix != ".txt")):
        with Image.open(path) as picture:
            plain = picture.convert("RGB").resize((96 + 16 * (number % 3), 96))
        path.unlink()
        plain.save(path.with_suffix(".png"))
    return folder


@pytest.fixture
def masked(run_script, kind, request, images, tmp_path):
    """``masked("name", "--flag", masks=folder, key=value)`` trains and returns the LoRA's path."""

    models = model_flags(kind, request.getfixturevalue(KINDS[kind].fixture))

    def run(name: str, *flags: str, masks: Path | None = None, **subset: object) -> Path:
        keys = {**subset, **({"conditioning_data_dir": masks.as_posix()} if masks else {})}
        dataset = write_dataset(tmp_path / f"{name}.toml", images, kind, flip_aug=True, **keys)
        arguments = [*models, *run_flags(kind, tmp_path / name, dataset), STEPS, ALONE, "--learning_rate=1e-2", *flags]
        done = run_script(KINDS[kind].script, *arguments, *(["--masked_loss"] if masks else []))
        assert done.returncode == 0, done.stdout + done.stderr
        if masks:
            assert "5 masked" in done.stdout
        return tmp_path / name / "tiny.safetensors"

    return run


@over(slow=("anima", "sd3", "lumina"))
def test_half_a_mask_trains_otherwise_and_caches_hold_it(masked, images, tmp_path):
    masks = write_masks(images, tmp_path / "half")
    plain = masked("plain", *CACHED)
    cached, live = masked("cached", *CACHED, masks=masks), masked("live", masks=masks)
    assert not same_lora(plain, cached)
    a, b = lora(cached), lora(live)
    # images that are encoded together round otherwise, which Adam makes much of where a gradient is next to nothing
    assert all((a[key] - b[key]).norm() <= 1e-5 + 2e-3 * a[key].norm() for key in a)


@over("anima", slow=("sd3", "lumina"))
def test_the_alpha_channel_is_a_mask_as_well(masked, images, tmp_path):
    by_image = masked("images", *CACHED, masks=write_masks(images, tmp_path / "half"))
    for path in images.glob("*.png"):
        with Image.open(path) as picture, Image.open(tmp_path / "half" / path.name) as mask:
            picture.load()
            picture.putalpha(mask)
        picture.save(path)
    assert same_lora(by_image, masked("alpha", *CACHED, alpha_mask=True))
