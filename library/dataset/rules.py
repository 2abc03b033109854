"""Settings that cannot work together, or that do not do what one may think. Each message names every place that has a part in it.

The settings are resolved here: a rule judges what will really be trained, wherever the values stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.dataset.items import DatasetSettings, SubsetSettings
from library.dataset.schema import PRESERVATION
from library.errors import did_you_mean

if TYPE_CHECKING:
    from library.options.train import TrainOptions

Spots = Mapping[
    str, str
]  # key -> where its value stands: "my.toml, [general]: flip_aug" or "--flip_aug"; built-in defaults are not in it
CHANGE_OF_PIXELS = {
    "random_crop": "crops each showing elsewhere",
    "color_aug": "colours each showing differently",
    "face_crop_aug_range": "crops each showing elsewhere",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSubset:
    """The settings of a subset, and where each of them stands."""

    settings: SubsetSettings
    spots: Spots

    @property
    def is_trained(self) -> bool:
        return not self.settings.is_validation


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedDataset:
    """The settings of a dataset, and where each of them stands. ``subsets`` are those of ``settings``."""

    settings: DatasetSettings
    spots: Spots
    subsets: tuple[PlacedSubset, ...]

    @property
    def only_validates(self) -> bool:
        """Whether no image is trained, regularisation images aside, which only accompany others."""
        own = [subset for subset in self.subsets if not subset.settings.is_reg]
        return bool(own) and not any(subset.is_trained for subset in own)


Datasets = Sequence[PlacedDataset]
Rule = Callable[[Datasets, "TrainOptions"], Iterator[str]]


def clashes(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    """What is there and cannot be combined. One sentence for each pair of places, however many subsets it reaches."""
    return _once(CLASHES, datasets, options)


def gaps(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    """What is missing everywhere. Only to be asked of datasets that were read without problems."""
    return _once(GAPS, datasets, options)


def notices(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    """What is allowed, but is perhaps not meant."""
    return _once(NOTICES, datasets, options)


def _once(rules: Sequence[Rule], datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    yield from dict.fromkeys(text for rule in rules for text in rule(datasets, options))


def _subsets(datasets: Datasets) -> Iterator[PlacedSubset]:
    return (subset for dataset in datasets for subset in dataset.subsets)


# ---------------------------------------------------------------------- clashes


def _chance_in_cached_latents(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    caches = options.caches
    if not caches.latents_cached:
        return
    flag = "--cache_latents_to_disk" if caches.cache_latents_to_disk else "--cache_latents"
    for subset in _subsets(datasets):
        for key, effect in CHANGE_OF_PIXELS.items():
            if subset.is_trained and getattr(subset.settings, key):
                yield (
                    f"{subset.spots[key]} cannot be combined with {flag}: it {effect}, "
                    "and cached latents are made once; drop one of the two"
                )


def _warmup_in_cached_text(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    caches = options.caches
    if not caches.text_cached:
        return
    to_disk = caches.cache_text_encoder_outputs_to_disk
    flag = "--cache_text_encoder_outputs_to_disk" if to_disk else "--cache_text_encoder_outputs"
    for subset in _subsets(datasets):
        if subset.is_trained and subset.settings.token_warmup_step > 0:
            yield (
                f"{subset.spots['token_warmup_step']} cannot be combined with {flag}: a cached caption does not grow with the "
                "steps; drop one of the two (shuffle_caption and caption_tag_dropout_rate do work with cached captions)"
            )


def _face_crop_with_buckets(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    for dataset in datasets:
        for subset in dataset.subsets:
            if dataset.settings.enable_bucket and subset.is_trained and subset.settings.face_crop_aug_range:
                yield (
                    f"{subset.spots['face_crop_aug_range']} cannot be combined with {dataset.spots['enable_bucket']}: "
                    "crops around faces all have the size of the resolution; drop one of the two"
                )


def _regularisation_that_validates(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    for subset in _subsets(datasets):
        if subset.settings.is_reg and subset.settings.is_validation:
            yield (
                f"{subset.spots['is_reg']} cannot be combined with {subset.spots['is_validation']}: "
                "regularisation images are trained, validation images never are; take one of the two out"
            )


def _split_of_nothing_but_validation(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    """A split in a dataset that already validates as a whole. One for all datasets may stand: it is meant for the others."""
    for dataset in datasets:
        spot = dataset.spots.get("validation_split", "")
        own = spot.startswith(f"{dataset.settings.place}: ")
        marked = next((s.spots["is_validation"] for s in dataset.subsets if s.settings.is_validation), None)
        if own and 0 < dataset.settings.validation_split < 1 and marked and dataset.only_validates:
            yield (
                f"{spot} cannot be combined with {marked}: all images of this dataset validate already, "
                "so that there is nothing to split; take one of the two out"
            )


def _masks_that_are_not_used(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    if options.dataset.masked_loss:
        return
    for subset in _subsets(datasets):
        if subset.settings.conditioning_data_dir is not None:
            yield (
                f"{subset.spots['conditioning_data_dir']} names mask images, which are only used with --masked_loss: "
                "give --masked_loss, or take conditioning_data_dir out"
            )


def _no_strength(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    for dataset in datasets:
        if dataset.settings.network_multiplier == 0 and not dataset.only_validates:
            yield (
                f"{dataset.spots['network_multiplier']} is 0, the model without the network, so that nothing could be learned "
                "from these images: take the dataset out, or give another strength (1 = the usual one)"
            )


# ---------------------------------------------------------------------- gaps


def _no_masks(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    masked = any(subset.settings.conditioning_data_dir or subset.settings.alpha_mask for subset in _subsets(datasets))
    if options.dataset.masked_loss and not masked:
        name = _source_name(datasets)
        how = "give --conditioning_data_dir" if name.startswith("--") else "set conditioning_data_dir in a subset"
        yield (
            f"--masked_loss finds no masks, because no subset of {name} has any: {how} (a folder of mask images), "
            "or alpha_mask where the images are transparent, or drop --masked_loss"
        )


def _nothing_trained(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    if all(dataset.only_validates for dataset in datasets):
        spots = dict.fromkeys(subset.spots["is_validation"] for subset in _subsets(datasets) if subset.settings.is_validation)
        yield f"all images validate, so that nothing is left to train: {', '.join(spots)}; leave some images for training"


def _no_validation(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    validation = options.validation
    values = {
        "--validate_every_n_steps": validation.validate_every_n_steps,
        "--validate_every_n_epochs": validation.validate_every_n_epochs,
        "--max_validation_steps": validation.max_validation_steps,
        "--save_best": validation.save_best,
    }
    given = [flag for flag, value in values.items() if value]
    if given and not _validates(datasets):
        verb = "needs" if len(given) == 1 else "need"
        yield (
            f"{' and '.join(given)} {verb} validation images, and {_source_name(datasets)} has none: set validation_split in a "
            f"dataset (or --validation_split), mark a subset with is_validation = true, or drop {' and '.join(given)}"
        )


def _validates(datasets: Datasets) -> bool:
    return any(
        subset.settings.is_validation or (dataset.settings.validation_split > 0 and not subset.settings.is_reg)
        for dataset in datasets
        for subset in dataset.subsets
    )


def _source_name(datasets: Datasets) -> str:
    """The file, or the flags, that the datasets come from."""
    return datasets[0].settings.place.partition(", [[datasets]]")[0]


# ---------------------------------------------------------------------- notices


def _two_masks(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    """The flag --alpha_mask reaches all subsets: one sentence for all that it is not used in."""
    masked: dict[str, list[str]] = {}
    for subset in _subsets(datasets):
        if subset.settings.conditioning_data_dir is not None and subset.settings.alpha_mask:
            masked.setdefault(subset.spots["alpha_mask"], []).append(subset.spots["conditioning_data_dir"])
    for spot, others in masked.items():
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield f"{spot} is not used where there are mask images: {others[0]}{more}"


def _always_empty(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    for subset in _subsets(datasets):
        for key in ("caption_dropout_every_n_epochs", "caption_dropout_rate"):
            if subset.is_trained and getattr(subset.settings, key) == 1:
                yield f"{subset.spots[key]} is 1: every showing trains with an empty caption"


def _seed_of_nothing(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    if not _validates(datasets):
        for dataset in datasets:
            if "validation_seed" in dataset.spots:
                yield f"{dataset.spots['validation_seed']} does nothing: no images validate (see validation_split)"


def _misspelt_attributes(datasets: Datasets, options: TrainOptions) -> Iterator[str]:
    for subset in _subsets(datasets):
        for name in subset.settings.custom_attributes:
            if name != PRESERVATION and (near := did_you_mean(name, [PRESERVATION])):
                yield f"{subset.spots['custom_attributes']}: {name} is an attribute that training does not know{near}"


CLASHES: tuple[Rule, ...] = (
    _chance_in_cached_latents,
    _warmup_in_cached_text,
    _face_crop_with_buckets,
    _regularisation_that_validates,
    _split_of_nothing_but_validation,
    _masks_that_are_not_used,
    _no_strength,
)
GAPS: tuple[Rule, ...] = (_no_masks, _nothing_trained, _no_validation)
NOTICES: tuple[Rule, ...] = (_two_masks, _always_empty, _seed_of_nothing, _misspelt_attributes)
