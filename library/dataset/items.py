"""What a dataset is made of, once its settings are resolved. Plain data; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.randomness import derive_seed

if TYPE_CHECKING:
    from library.dataset.image_records import ImageRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSettings:
    """One folder of images (or one metadata file) with every key resolved: subset > dataset > general > command line."""

    place: str  # for messages: "my.toml, [[datasets]] 1, subset 2"
    image_dir: Path | None
    metadata_file: Path | None = None  # set: a metadata-JSON subset
    conditioning_data_dir: Path | None = None  # set: a subset with mask images, each named as its image
    cache_info: bool = False  # list, captions and sizes come from metadata_cache.json in image_dir, which is made if missing
    class_tokens: str | None = None
    is_reg: bool = False
    is_validation: bool = False  # never trained: the loss on these images is what validation reports
    loss_weight: float = 1.0
    alpha_mask: bool = False  # the alpha channel is the loss mask
    custom_attributes: Mapping[str, object] = field(default_factory=dict, hash=False)
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
    token_warmup_min: int = 1  # flexible tags at step 0
    token_warmup_step: float = 0.0  # step from which on all tags are used; below 1: a share of the run
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None  # smallest and largest share of the crop's side to a face's
    resize_interpolation: str | None = None
    tags_joined: bool = False  # no key, see validation_split.without_chance: captions are cut into tags and joined, in order


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
    network_multiplier: float = 1.0  # strength of the network while images of this dataset are trained
    validation_split: float = 0.0  # share of each subset's images that validate instead of training
    validation_seed: int | None = None  # of that choice; None: --seed, else 0
    subsets: tuple[SubsetSettings, ...]
    warnings: tuple[str, ...] = ()  # found while the settings were read; scan() passes them on in TrainingSet.warnings


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image of one subset, before repeats. Sizes are pixels of the upright (EXIF-rotated) image."""

    index: int  # position in TrainingSet.all_items
    key: str  # names the item in random choices: "dataset:subset:file name", no absolute path
    path: Path
    caption: str  # as read: the first line, or all lines joined by newline where wildcards are on
    tags: str | None = None  # of a metadata file: the part of the caption that its "tags" are
    mask_path: Path | None = None  # the image in conditioning_data_dir that is this one's loss mask
    has_alpha: bool = False  # whether the image has an alpha channel, or transparency of another kind
    custom_attributes: Mapping[str, object] = field(default_factory=dict, hash=False)  # the subset's, and the image's own
    dataset_index: int
    subset_index: int = 0  # in its dataset
    subset: SubsetSettings
    repeats: int
    size_wh: tuple[int, int]
    bucket_wh: tuple[int, int]
    resized_wh: tuple[int, int]  # covers the bucket
    crop_left_top: tuple[int, int]  # of the bucket inside the resized image, unless a showing is cropped at random
    is_bucketed: bool = True  # its dataset has buckets; without them a random crop is cut from the full-size image

    @property
    def scale(self) -> float:
        """How much the image grows (above 1) or shrinks on its way into the bucket."""
        return max(self.resized_wh[0] / self.size_wh[0], self.resized_wh[1] / self.size_wh[1])

    @property
    def latent_seed(self) -> int:
        """For what an image coder draws at random: the same for all items that are one file at one size."""
        return derive_seed("latents", self.path.name, *self.bucket_wh)

    @property
    def is_masked(self) -> bool:
        """Whether its loss is weighed by a mask, from a mask image or from the alpha channel."""
        return self.mask_path is not None or (self.subset.alpha_mask and self.has_alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """All that will be trained: the datasets and their items in a fixed order.

    ``validation`` items are never trained. Their subsets have nothing random left (see ``validation_split.without_chance``),
    and their ``repeats`` are 1.
    """

    datasets: tuple[DatasetSettings, ...]
    items: tuple[Item, ...]
    validation: tuple[Item, ...] = ()
    skipped: tuple[str, ...] = ()  # bad images left out with --skip_bad_images, each with its reason
    warnings: tuple[str, ...] = field(default=())
    records: ImageRecords | None = field(default=None, compare=False, repr=False)  # of every image and mask, for the caches

    @property
    def all_items(self) -> tuple[Item, ...]:
        """What is trained, then what validates; ``Item.index`` counts in here."""
        return self.items + self.validation
