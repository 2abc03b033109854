"""What a dataset is made of, once its settings are resolved. Plain data; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSettings:
    """One folder of images (or one metadata file) with every key resolved: subset > dataset > general > command line."""

    place: str  # for messages: "my.toml, [[datasets]] 1, subset 2"
    image_dir: Path | None
    metadata_file: Path | None = None  # set: a metadata-JSON subset
    class_tokens: str | None = None
    is_reg: bool = False
    num_repeats: int = 1
    caption_extension: str = ".caption"
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    flip_aug: bool = False
    resize_interpolation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """Subsets that share resolution, batch size and buckets."""

    place: str
    resolution_wh: tuple[int, int]
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    resize_interpolation: str | None = None  # for the metadata of LoRA files; what counts is the subset's
    subsets: tuple[SubsetSettings, ...]
    warnings: tuple[str, ...] = ()  # found while the settings were read; scan() passes them on in TrainingSet.warnings


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image of one subset, before repeats. Sizes are pixels of the upright (EXIF-rotated) image."""

    index: int  # position in TrainingSet.items
    key: str  # names the item in random choices: "dataset:subset:file name", no absolute path
    path: Path
    caption: str  # as read: the first line, or all lines joined by newline where wildcards are on
    tags: str | None = None  # of a metadata file: the part of the caption that its "tags" are
    dataset_index: int
    subset: SubsetSettings
    repeats: int
    size_wh: tuple[int, int]
    bucket_wh: tuple[int, int]
    resized_wh: tuple[int, int]  # covers the bucket
    crop_left_top: tuple[int, int]  # of the bucket inside the resized image


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """All that will be trained: the datasets and their items in a fixed order."""

    datasets: tuple[DatasetSettings, ...]
    items: tuple[Item, ...]
    skipped: tuple[str, ...] = ()  # bad images left out with --skip_bad_images, each with its reason
    warnings: tuple[str, ...] = field(default=())
