"""Metadata of saved LoRA files: the ``ss_*`` keys that user interfaces read, and the ``modelspec.*`` keys.

Every value is text: ``str()`` of the Python value, JSON where a reader expects it. Paths, keys and tokens never get in: only
base names of files.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from library.dataset.buckets import Buckets
from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.files.model_hash import MISSING, new_hash, old_hash
from library.options.declare import groups_of, options_of
from library.options.hub import REPO_ID
from library.options.reference_table import as_dict
from library.training.models.networks import network_arguments
from library.training.preflight import CheckedRun

IMPLEMENTATION_VERSION = "atelier/1"
MODELSPEC_VERSION = "1.0.1"
# kept with --no_metadata, besides modelspec.*
MINIMUM_KEYS = ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
# ss_<name> = the option of that name; the value is what is written where an architecture has no such option
OPTION_KEYS: dict[str, Any] = {
    "output_name": None, "learning_rate": None, "unet_lr": None, "gradient_checkpointing": False,
    "gradient_accumulation_steps": 1, "lr_warmup_steps": 0, "lr_scheduler": "constant", "network_module": None,
    "network_dim": None, "network_alpha": None, "network_dropout": None, "mixed_precision": "no", "full_fp16": False,
    "v2": False, "clip_skip": None, "max_token_length": None, "lowram": False, "noise_offset": None,
    "multires_noise_iterations": None, "multires_noise_discount": None, "adaptive_noise_scale": None,
    "zero_terminal_snr": False, "noise_offset_random_strength": False, "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False, "training_comment": None, "max_grad_norm": None, "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "face_crop_aug_range": None,
    "prior_loss_weight": 1.0, "min_snr_gamma": None, "scale_weight_norms": None, "loss_type": "l2", "huber_schedule": "snr",
    "huber_scale": 1.0, "huber_c": 0.1, "fp8_base": False, "fp8_base_unet": False, "validation_seed": None,
    "validation_split": 0.0, "max_validation_steps": None, "validate_every_n_epochs": None, "validate_every_n_steps": None,
    "resize_interpolation": None,
}  # fmt: skip
# ss_<name> = the option of that name, of files the base name: written only where it is given, for whoever repeats the run
GIVEN_KEYS = (
    "self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr", "llm_adapter_lr", "network_train_unet_only",
    "network_train_text_encoder_only", "network_weights", "dim_from_weights", "lr_scheduler_type", "lr_scheduler_args",
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio", "lr_decay_steps",
    "full_bf16", "attn_mode", "xformers", "split_attn", "torch_compile", "caption_variants", "llm_adapter_path",
    "t5_tokenizer_path", "qwen3_max_token_length", "t5_max_token_length", "v_parameterization",
    "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "weighted_captions", "no_half_vae",
)  # fmt: skip
# written only where the dataset is described by flags instead of a file
FLAG_DATASET_KEYS = (
    "shuffle_caption",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
    "keep_tokens",
    "flip_aug",
    "color_aug",
    "random_crop",
)
MODEL_FILES = {"pretrained_model_name_or_path": "sd_model", "vae": "vae"}  # option -> ss_<...>_name, ss_<...>_hash
HASH_POLL_S = 0.2  # on Windows a wait without an end would hold back Ctrl-C


class LoraMetadata:
    """The metadata of one run's files.

    ``model``: what the architecture knows of itself, as whole keys (``ss_base_model_version``, ``modelspec.architecture``). A
    ``modelspec.prediction_type`` is written only where it gives one: the reference's ``epsilon`` for flow models is wrong.
    """

    def __init__(self, run: CheckedRun, *, seed: int, model: dict[str, str], optimizer: str):
        self._run = run
        self._values = as_dict(run.options)
        self._model = model
        self._constant = {
            "ss_session_id": str(secrets.randbits(32)),
            "ss_training_started_at": str(time.time()),
            "ss_seed": str(seed),
            "ss_optimizer": optimizer,
            "ss_cache_latents": str(run.options.caches.latents_cached),
            "ss_debiased_estimation": str(self._values.get("debiased_estimation_loss", False)),
            **{f"ss_{name}": str(self._values.get(name, default)) for name, default in OPTION_KEYS.items()},
            **_counts(run),
            **_text_encoder_lr(run.options),
            **_model_names(self._values),
            **_network_args(self._values),
            **_given_keys(run.options),
            **_dataset_keys(run, self._values),
        }
        is_main = os.environ.get("RANK", "0") == "0"  # the one process that saves
        self._hashes = ModelHashes(self._values if is_main and not self._values["no_metadata"] else {})

    def at(
        self, *, step: int, epoch: int, last: bool = False, wait: bool = True, notes: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """All keys for a file saved now, after ``step`` steps and ``epoch`` whole epochs.

        ``last``: the run's final file, which counts an epoch that was begun as well. ``wait`` for the hashes of the model
        files; without it those that are not ready are left out. ``notes``: whole ``ss_*`` keys of this file alone.
        """
        model_keys = {key: value for key, value in self._model.items() if key.startswith("ss_")}
        keys = {**self._constant, **model_keys, **self._hashes.keys(wait=wait), **(notes or {})}
        epoch = self._run.length.epochs if last else epoch
        keys.update(ss_steps=str(step), ss_epoch=str(epoch), ss_training_finished_at=str(time.time()))
        if self._values["no_metadata"]:
            keys = {key: value for key, value in keys.items() if key in MINIMUM_KEYS}
        return {**keys, **self._modelspec()}

    def _modelspec(self) -> dict[str, str]:
        values = self._values
        texts = {name.removeprefix("metadata_"): value for name, value in values.items() if name.startswith("metadata_")}
        spec: dict[str, Any] = {
            **texts,
            "sai_model_spec": MODELSPEC_VERSION,
            "implementation_version": IMPLEMENTATION_VERSION,
            "title": values["metadata_title"] or values["output_name"] or f"LoRA@{time.time()}",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "timestep_range": _timestep_range(values),
            "thumbnail": _thumbnail(values["metadata_thumbnail"]),
            "resolution": _resolution(self._run),
        }
        keys = {f"modelspec.{name}": str(value) for name, value in spec.items() if value is not None}
        return {**keys, **{key: value for key, value in self._model.items() if key.startswith("modelspec.")}}


def _counts(run: CheckedRun) -> dict[str, str]:
    items, length = run.training_set.items, run.length
    return {
        "ss_num_train_images": str(sum(item.repeats for item in items if not item.subset.is_reg)),
        "ss_num_reg_images": str(sum(item.repeats for item in items if item.subset.is_reg)),
        "ss_num_validation_images": str(len(run.training_set.validation)),
        "ss_num_batches_per_epoch": str(length.batches_per_epoch),
        "ss_num_epochs": str(length.epochs),
        "ss_max_train_steps": str(length.total_steps),
        "ss_sd_scripts_commit_hash": "(unknown)",
    }


def _text_encoder_lr(options: Any) -> dict[str, str]:
    """The list where the network module takes one rate per text encoder, as ours do; of others' the first one."""
    rates = options.optimizer.text_encoder_lr or options.given_text_rates
    several = str(options.network.network_module).startswith("networks.")
    return {"ss_text_encoder_lr": str(rates if several or rates is None else rates[0])}


def _network_args(values: dict[str, Any]) -> dict[str, str]:
    if not values["network_args"]:
        return {}
    arguments: dict[str, Any] = dict(network_arguments(values["network_args"]))
    if values["network_dropout"] is not None:
        arguments["dropout"] = values["network_dropout"]
    return {"ss_network_args": json.dumps(arguments)}


def _given_keys(options: Any) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, group in groups_of(type(options)).items():
        for option in options_of(group):
            value = getattr(getattr(options, name), option.name)
            if option.name in GIVEN_KEYS and value != option.default:
                keys[f"ss_{option.name}"] = Path(value).name if option.path else str(value)
    merged = [[Path(file).name, strength] for file, strength in options.network.weights_to_merge]
    return {**keys, "ss_base_weights": json.dumps(merged)} if merged else keys


# ---------------------------------------------------------------------- the dataset


def _dataset_keys(run: CheckedRun, values: dict[str, Any]) -> dict[str, str]:
    items = run.training_set.items
    described = [
        _dataset(dataset, [i for i in items if i.dataset_index == n])
        for n, dataset in enumerate(run.training_set.datasets)
        if _trained_subsets(dataset)
    ]
    frequency: dict[str, dict[str, int]] = {}
    for one in described:
        frequency = {**one["tag_frequency"], **frequency}  # where two datasets have a folder of one name, the first counts
    keys = {"ss_tag_frequency": json.dumps(frequency), "ss_dataset_dirs": json.dumps(_folders(items, is_reg=False))}
    if values["dataset_config"]:
        return {**keys, "ss_datasets": json.dumps(described)}
    dataset = run.training_set.datasets[0]
    batch = dataset.batch_size
    return {
        **keys,
        **{f"ss_{name}": str(values[name]) for name in FLAG_DATASET_KEYS},
        "ss_reg_dataset_dirs": json.dumps(_folders(items, is_reg=True)),
        "ss_batch_size_per_device": str(batch),
        "ss_total_batch_size": str(batch * run.processes * run.length.accumulation),
        "ss_resolution": str(tuple(dataset.resolution_wh)),
        "ss_bucket_info": json.dumps(described[0]["bucket_info"]),
    }


def _dataset(dataset: DatasetSettings, items: list[Item]) -> dict[str, Any]:
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(item.repeats for item in items if not item.subset.is_reg),
        "num_reg_images": sum(item.repeats for item in items if item.subset.is_reg),
        "resolution": list(dataset.resolution_wh),
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso,
        "max_bucket_reso": dataset.max_bucket_reso,
        "tag_frequency": _tag_frequency(items),
        "bucket_info": _bucket_info(dataset, items),
        "resize_interpolation": dataset.resize_interpolation,
        "subsets": [_subset(subset, [i for i in items if i.subset is subset]) for subset in _trained_subsets(dataset)],
    }


def _trained_subsets(dataset: DatasetSettings) -> list[SubsetSettings]:
    """Readers take what a file describes for what was trained, so subsets that only validate are left out."""
    return [subset for subset in dataset.subsets if not subset.is_validation]


SUBSET_KEYS = ("num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
               "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation")  # fmt: skip


def _subset(subset: SubsetSettings, items: list[Item]) -> dict[str, Any]:
    described: dict[str, Any] = {"img_count": len(items)}
    described.update({name: getattr(subset, name) for name in SUBSET_KEYS})
    if subset.image_dir is not None:
        described["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return {**described, "metadata_file": subset.metadata_file.name}
    return {**described, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _source_name(subset: SubsetSettings) -> str:
    source = subset.metadata_file or subset.image_dir
    return source.name if source is not None else ""


def _tag_frequency(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    """Per folder or metadata file: how often each tag occurs, in lower case, not weighted by repeats.

    Tags are what commas and line ends separate in a caption file; of a metadata file only its "tags" count.
    """
    folders: dict[str, Counter[str]] = {}
    for item in items:
        text = item.caption if item.subset.metadata_file is None else item.tags or ""
        tags = (tag.strip().lower() for tag in re.split(r"[,\n]", text))
        folders.setdefault(_source_name(item.subset), Counter()).update(tag for tag in tags if tag)
    return {name: dict(counter) for name, counter in folders.items()}


def _folders(items: Sequence[Item], *, is_reg: bool) -> dict[str, dict[str, int]]:
    counts: dict[int, dict[str, int]] = {}
    names: dict[int, str] = {}
    for item in items:
        if item.subset.is_reg == is_reg:
            entry = counts.setdefault(id(item.subset), {"n_repeats": item.subset.num_repeats, "img_count": 0})
            entry["img_count"] += 1
            names[id(item.subset)] = _source_name(item.subset)
    result: dict[str, dict[str, int]] = {}
    for subset_id, entry in counts.items():
        name, number = names[subset_id], 2
        while name in result:
            name, number = f"{names[subset_id]} ({number})", number + 1
        result[name] = entry
    return result


def _bucket_info(dataset: DatasetSettings, items: Sequence[Item]) -> dict[str, Any] | None:
    """The buckets in use, by their number among all buckets of the dataset; with bucket_no_upscale those in use are all."""
    if not dataset.enable_bucket:
        return None
    counts: Counter[tuple[int, int]] = Counter()
    error = 0.0
    for item in items:
        counts[item.bucket_wh] += item.repeats
        (width, height), (bucket_w, bucket_h) = item.size_wh, item.bucket_wh
        error += abs(width / height - bucket_w / bucket_h)
    sizes = Buckets(dataset).sizes or sorted(counts)
    buckets = {str(n): {"resolution": list(size), "count": counts[size]} for n, size in enumerate(sizes) if counts[size]}
    return {"buckets": buckets, "mean_img_ar_error": error / max(len(items), 1)}


# ---------------------------------------------------------------------- model files and modelspec


def _model_names(values: dict[str, Any]) -> dict[str, str]:
    return {f"ss_{key}_name": _model_name(values[option]) for option, key in MODEL_FILES.items() if values.get(option)}


def _model_name(place: str) -> str:
    """The base name of a file or folder; a repository of the hub, OWNER/NAME, as it is."""
    return place if REPO_ID.fullmatch(place) and not Path(place).exists() else Path(place).name


class ModelHashes:
    """The ``ss_*_hash`` keys of the model files, found by a thread: it reads all of each file, and no exit waits for it."""

    def __init__(self, values: dict[str, Any]):
        self._found: dict[str, str] = {}
        self._thread = Thread(target=self._find, args=(values,), daemon=True, name="model-hash")
        self._thread.start()

    def keys(self, *, wait: bool) -> dict[str, str]:
        while wait and self._thread.is_alive():
            self._thread.join(HASH_POLL_S)
        return dict(self._found)

    def _find(self, values: dict[str, Any]) -> None:
        hashes: tuple[tuple[str, Callable[[Path], str]], ...] = (("ss_{}_hash", old_hash), ("ss_new_{}_hash", new_hash))
        for name, hash_of in hashes:  # the quick ones first
            for option, key in MODEL_FILES.items():
                found = hash_of(Path(values[option])) if values.get(option) else MISSING
                if found != MISSING:
                    self._found[name.format(key)] = found


def _resolution(run: CheckedRun) -> str:
    width, height = run.training_set.datasets[0].resolution_wh
    return f"{width}x{height}"


def _timestep_range(values: dict[str, Any]) -> str | None:
    low, high = values.get("min_timestep"), values.get("max_timestep")
    if low is None and high is None:
        return None
    return f"{low or 0},{1000 if high is None else high}"


def _thumbnail(value: str | None) -> str | None:
    """A data URL as it is, a picture file as one."""
    if not value or value.startswith("data:"):
        return value
    path = Path(value)
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
