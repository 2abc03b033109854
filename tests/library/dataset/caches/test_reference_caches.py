"""Caches of kohya-ss/sd-scripts: what fits is read, and what does not is refused with its reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.caches.latent_cache import LatentRecipe
from library.dataset.caches.reference_caches import NOTHING, MisfitError, reference_latents, reference_text
from library.dataset.caches.text_cache import TextRecipe
from library.dataset.items import Item, SubsetSettings

LATENTS = LatentRecipe(arch="plain", vae_fingerprint="v", dtype="bfloat16", channels=4)
TEXT = TextRecipe(arch="plain", encoder_fingerprint="e", dtype="bfloat16")
NAME = "a_0100x0070_plain.npz"


class PlainFormat:
    """As an architecture whose files hold unscaled latents of one size: twice the latents, and text by its length."""

    latents_ending, text_ending, has_sizes = "_plain.npz", "_plain_te.npz", False

    def scaled_latents(self, stored):
        with np.errstate(over="ignore"):
            return stored * 2

    def conditioning(self, arrays, text):
        if int(arrays["length"]) != len(text):
            raise MisfitError("another text")
        return {"rows": arrays["rows"], "ids": arrays["ids"]}


class SeveralSizes(PlainFormat):
    has_sizes = True


def make_item(folder: Path, **subset) -> Item:
    path = folder / "a.png"
    Image.new("RGB", (100, 70)).save(path)
    settings = SubsetSettings(place="test", image_dir=folder, **subset)
    return Item(index=0, key="0:0:a.png", path=path, caption="abc", dataset_index=0, subset=settings, repeats=1, size_wh=(100, 70),
                bucket_wh=(96, 64), resized_wh=(96, 67), crop_left_top=(0, 1))  # fmt: skip


def latents(seed: int = 0, shape: tuple[int, ...] = (4, 8, 12)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def save(path: Path, **arrays) -> None:
    np.savez(path, **{"original_size": np.array([100, 70]), "crop_ltrb": np.array([0, 0, 96, 64]), **arrays})
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def read(item: Item, names=("latents",), format=None):
    return reference_latents(item, names, format=format or PlainFormat(), recipe=LATENTS)


def test_latents_are_read_in_the_cache_s_number_format(tmp_path):
    item = make_item(tmp_path, flip_aug=True)
    save(tmp_path / NAME, latents=latents(0), latents_flipped=latents(1), alpha_mask=np.ones((64, 96), np.float32))
    found = read(item, ("latents", "latents_flipped"))
    assert found.keys() == {"latents", "latents_flipped"}
    assert torch.equal(found["latents"], (torch.from_numpy(latents(0)) * 2).to(torch.bfloat16))
    assert torch.equal(found["latents_flipped"], (torch.from_numpy(latents(1)) * 2).to(torch.bfloat16))
    assert read(item, ("latents",)).keys() == {"latents"}


def test_one_file_holds_several_sizes(tmp_path):
    item = make_item(tmp_path)
    arrays = {"latents_8x12": latents(0), "original_size_8x12": np.array([100, 70]), "latents_4x6": latents(1, (4, 4, 6)),
              "original_size_4x6": np.array([100, 70])}  # fmt: skip
    save(tmp_path / NAME, **arrays)
    assert torch.equal(read(item, format=SeveralSizes())["latents"], (torch.from_numpy(latents(0)) * 2).to(torch.bfloat16))
    assert "without latents of the size" in read(replace(item, bucket_wh=(64, 64), crop_left_top=(16, 1)), format=SeveralSizes())


def test_no_file_is_nothing_to_tell(tmp_path):
    item = make_item(tmp_path)
    assert read(item) == NOTHING
    assert reference_text(item, "abc", format=PlainFormat(), recipe=TEXT) == NOTHING


def unfit_files() -> dict[str, tuple[dict, str]]:
    broken = latents()
    broken[0, 0, 0] = np.nan
    large = latents()
    large[0, 0, 0] = 3e38  # finite until it is scaled
    return {
        "another image": ({"latents": latents(), "original_size": np.array([70, 100])}, "made from an image of another size"),
        "no size": ({"latents": latents(), "original_size": np.array(100)}, "made from an image of another size"),
        "another bucket": (
            {"latents": latents(shape=(4, 8, 8)), "latents_flipped": latents(shape=(4, 8, 8))},
            "another size than the image trains at",
        ),
        "another model": (
            {"latents": latents(shape=(16, 8, 12)), "latents_flipped": latents(shape=(16, 8, 12))},
            "another size than the image trains at",
        ),
        "no latents": ({"other": latents()}, "without latents of the size"),
        "no flipped latents": ({"latents": latents()}, "without flipped latents"),
        "not finite": ({"latents": broken, "latents_flipped": latents()}, "not finite"),
        "too large": ({"latents": large, "latents_flipped": latents()}, "not finite"),
        "without numbers": ({"latents": np.full((4, 8, 12), "x"), "latents_flipped": latents()}, "without numbers"),
        "pickled objects": ({"latents": np.full((4, 8, 12), {}, dtype=object)}, "without flipped"),
    }


@pytest.mark.parametrize("name", unfit_files())
def test_files_that_do_not_fit(tmp_path, name):
    arrays, reason = unfit_files()[name]
    save(tmp_path / NAME, **arrays)
    found = read(make_item(tmp_path, flip_aug=True), ("latents", "latents_flipped"))
    assert isinstance(found, str) and reason in found, found


def test_pickle_is_never_read(tmp_path):
    class Mark:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickle was run"),)

    save(tmp_path / NAME, latents=np.array([Mark()], dtype=object))
    assert "cannot be read" in read(make_item(tmp_path))
    assert not (tmp_path / "pickle was run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", None])
def test_damaged_files(tmp_path, content):
    item = make_item(tmp_path)
    save(tmp_path / NAME, latents=latents())
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert read(item) == "that cannot be read"
    np.savez(tmp_path / "a_plain_te.npz", rows=np.ones(2))
    assert reference_text(item, "abc", format=PlainFormat(), recipe=TEXT) == "that lack an array"
    (tmp_path / "a_plain_te.npz").write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert reference_text(item, "abc", format=PlainFormat(), recipe=TEXT) == "that cannot be read"


def test_a_single_array_is_no_cache(tmp_path):
    item = make_item(tmp_path)
    with (tmp_path / NAME).open("wb") as file:
        np.save(file, latents())
    assert read(item) == "that cannot be read"


def test_a_damaged_byte_is_noticed(tmp_path):
    item = make_item(tmp_path)
    save(tmp_path / NAME, latents=latents())
    data = bytearray((tmp_path / NAME).read_bytes())
    data[data.index(latents().tobytes()) + 100] ^= 1
    (tmp_path / NAME).write_bytes(data)
    assert read(item) == "that cannot be read"


def test_images_that_were_made_otherwise(tmp_path):
    item = make_item(tmp_path)
    save(tmp_path / NAME, latents=latents())
    assert isinstance(read(item), dict)
    other_filter = replace(item, subset=replace(item.subset, resize_interpolation="lanczos"))
    assert "with resize_interpolation set" in read(other_filter)
    assert "not cropped at their centre" in read(replace(item, crop_left_top=(0, 0)))
    later = (tmp_path / NAME).stat().st_mtime_ns + 1
    os.utime(item.path, ns=(later, later))
    assert "older than the image" in read(item)
    item.path.unlink()
    assert "cannot be read any more" in read(item)


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_images(tmp_path, orientation):
    """The reference sees them lying down: its file is named after that size."""
    item = make_item(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored_wh = (70, 100) if orientation == 6 else (100, 70)
    Image.new("RGB", stored_wh).save(item.path, exif=exif)
    save(tmp_path / f"a_{stored_wh[0]:04d}x{stored_wh[1]:04d}_plain.npz", latents=latents())
    assert "EXIF" in read(item)


def test_text(tmp_path):
    item = make_item(tmp_path)
    rows, ids = np.ones((3, 2), np.float32) / 3, np.arange(3, dtype=np.int32)

    def found(text="abc", **arrays):
        np.savez(tmp_path / "a_plain_te.npz", **{"length": 3, "rows": rows, "ids": ids, **arrays})
        return reference_text(item, text, format=PlainFormat(), recipe=TEXT)

    tensors = found()
    assert (
        tensors["rows"].dtype == torch.bfloat16 and tensors["ids"].dtype == torch.int32 and tensors["ids"].tolist() == [0, 1, 2]
    )
    assert found("abcd") == "another text"
    assert "not finite" in found(rows=np.full((3, 2), np.inf, np.float32))


def test_two_images_of_one_base_name_share_no_file(tmp_path):
    item = make_item(tmp_path)
    save(tmp_path / NAME, latents=latents())
    assert not isinstance(read(item), str)
    Image.new("RGB", (100, 70)).save(tmp_path / "a.BMP")
    assert read(item) == "of images beside another one of the same base name"


def test_a_small_file_that_unpacks_to_much_is_not_unpacked(tmp_path):
    item = make_item(tmp_path)
    np.savez_compressed(tmp_path / NAME, original_size=np.array([100, 70]), latents=np.zeros((70 << 20) // 4, np.float32))
    os.utime(tmp_path / NAME, ns=(2**62, 2**62))
    assert read(item) == "that cannot be read"
