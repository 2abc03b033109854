"""Which images are trained, at which sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.options.declare import opt
from library.options.kinds import NUMBER_RANGE, RESOLUTION
from library.options.rules import at_least

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")  # a dataset file may also name box

BUCKET_SIDES_PX = {"min_bucket_reso": 256, "max_bucket_reso": 1024}  # unless flags say otherwise
MAX_SIDE_PX = 16_384  # of a resolution; as of sample pictures
MAX_AREA_PX = 2**27  # of a resolution: 8192 x 16384; a picture that covers it may be a third larger (verify.MAX_PIXELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetOptions:
    """Dataset: the images, and the sizes they are trained at. Most of these stand in where a dataset file is silent."""

    dataset_config: Path | None = opt(None, "TOML or JSON file that describes the datasets; see docs/dataset_config.md")
    train_data_dir: str | None = opt(
        None, "folder of image folders named N_words (N = repeats), or the image folder of --in_json", path=True
    )
    reg_data_dir: str | None = opt(None, "folder of image folders named N_words with regularisation images", path=True)
    conditioning_data_dir: str | None = opt(
        None, "folder of loss masks for --masked_loss, each named as its image; see docs/masked_loss.md", path=True
    )
    masked_loss: bool = opt(False, "weigh the loss by mask images (white = counts, black = does not)")
    alpha_mask: bool = opt(False, "use the images' alpha channel as loss mask (opaque = counts)")
    cache_info: bool = opt(False, "keep image lists, sizes and captions in metadata_cache.json in each image folder")
    in_json: str | None = opt(None, "metadata file (JSON or JSONL) with image paths, captions and tags", path=True)
    dataset_repeats: int = opt(1, "how often an epoch shows each image of a subset that sets no repeats")
    resolution: str | None = opt(None, "training size in pixels: N for N x N, or WIDTH,HEIGHT", kind=RESOLUTION)
    train_batch_size: int = opt(1, "images per process in one batch")
    enable_bucket: bool = opt(False, "sort images into buckets by aspect ratio instead of cropping all to one size")
    min_bucket_reso: int = opt(BUCKET_SIDES_PX["min_bucket_reso"], "shortest side of a bucket in pixels")
    max_bucket_reso: int = opt(BUCKET_SIDES_PX["max_bucket_reso"], "longest side of a bucket in pixels")
    bucket_reso_steps: int = opt(64, "sides of buckets are multiples of this many pixels")
    bucket_no_upscale: bool = opt(False, "never enlarge an image: buckets are made from the images' own sizes")
    resize_interpolation: str | None = opt(
        None, "filter for resizing images (not set = area to shrink, lanczos to enlarge)", choices=INTERPOLATIONS
    )
    flip_aug: bool = opt(False, "mirror each image left to right half of the time")
    color_aug: bool = opt(False, "change hue or brightness a little at random; needs images that are encoded at each step")
    random_crop: bool = opt(False, "crop at a random place instead of the centre; needs images that are encoded at each step")
    face_crop_aug_range: str | None = opt(
        None,
        "crop around the face named in the file name, MIN to MAX times as large as it; needs buckets off (not set = do not)",
        kind=NUMBER_RANGE,
    )
    prior_loss_weight: float = opt(1.0, "weight of regularisation images in the loss (1 = as much as training images)")
    dataset_class: str | None = opt(None, "a dataset class written for kohya-ss/sd-scripts; refused (not set = none)")
    skip_bad_images: bool = opt(
        False, "leave out images and captions that cannot be read, naming each; otherwise they end the run"
    )
    max_data_loader_n_workers: int = opt(
        8, "threads that read and decode images, at most one per CPU core (0 = no extra threads)"
    )
    persistent_data_loader_workers: bool = opt(False, "for commands that have it: the threads always live on between epochs")

    def problems(self) -> Iterator[str]:
        yield from at_least(
            self, 1, "dataset_repeats", "train_batch_size", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"
        )
        yield from at_least(self, 0, "prior_loss_weight", "max_data_loader_n_workers")
        if self.dataset_class:
            yield (
                f"--dataset_class={self.dataset_class} cannot be used: a class written for kohya-ss/sd-scripts needs its dataset "
                "code, which is not here; drop it, and describe the images with --dataset_config or --train_data_dir"
            )
        yield from self._source_problems()
        if self.resolution is not None and (problem := _resolution_problem(self.resolution)):
            yield f"--resolution {problem}"
        if self.enable_bucket and self.min_bucket_reso > self.max_bucket_reso:
            yield (
                f"--min_bucket_reso is {self.min_bucket_reso}, above --max_bucket_reso, which is {self.max_bucket_reso}: "
                "lower the first or raise the second"
            )

    def warnings(self) -> Iterator[str]:
        sources = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
        ignored = [name for name in sources if getattr(self, name)]
        if self.dataset_config and ignored:
            yield f"--dataset_config describes the dataset; ignored: {', '.join(f'--{name}' for name in ignored)}"

        sizes = ("min_bucket_reso", "max_bucket_reso")
        given = [f"--{name}={getattr(self, name)}" for name in sizes if getattr(self, name) != BUCKET_SIDES_PX[name]]
        if self.enable_bucket and self.bucket_no_upscale and given and not self.dataset_config:
            yield (
                f"{' and '.join(given)}: not used with --bucket_no_upscale, which makes buckets from the images' own sizes, "
                "bounded by the area of --resolution alone"
            )

    def missing(self) -> Iterator[str]:
        """For whoever needs a dataset."""
        if not (self.dataset_config or self.train_data_dir or self.in_json):
            yield "there is nothing to train on: give --dataset_config (a dataset file), --train_data_dir or --in_json"

    def _source_problems(self) -> Iterator[str]:
        if self.dataset_config:
            return
        if self.resolution is None and (self.train_data_dir or self.in_json):
            yield "--resolution is missing: without --dataset_config give the training size in pixels, such as --resolution=1024"
        if self.conditioning_data_dir and not self.masked_loss:
            yield "--conditioning_data_dir needs --masked_loss: give it too, or drop --conditioning_data_dir"
        if self.reg_data_dir and self.in_json:
            yield "--reg_data_dir cannot be combined with --in_json: describe both in a dataset file and give --dataset_config"


def _resolution_problem(text: str) -> str | None:
    try:
        return too_large_problem(parse_resolution(text))
    except ValueError as error:
        return str(error)


def too_large_problem(resolution_wh: tuple[int, int]) -> str | None:
    """What is wrong with a resolution that nothing can be trained at, as words behind its name."""
    width, height = resolution_wh
    if max(width, height) <= MAX_SIDE_PX and width * height <= MAX_AREA_PX:
        return None
    return f"is {width}x{height} px: a side can have at most {MAX_SIDE_PX} px, the area at most {MAX_AREA_PX:,} pixels"


def parse_resolution(text: str) -> tuple[int, int]:
    """``"1024"`` -> (1024, 1024), ``"832,1216"`` -> (832, 1216): width, height in pixels. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    sides = [int(part) for part in parts if part.isdecimal()]
    if len(sides) != len(parts) or len(sides) not in (1, 2) or not all(sides):
        raise ValueError(f"is {text!r}: give N or WIDTH,HEIGHT in pixels, for example 1024 or 832,1216")
    return sides[0], sides[-1]
