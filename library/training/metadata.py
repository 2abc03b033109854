"""Metadata of saved LoRA files: the ``ss_*`` keys that user interfaces read, and the ``modelspec.*`` keys.

Every value is text: ``str()`` of the Python value, JSON where a reader expects it. Paths, keys and tokens never get in: only
base names of files.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import secrets
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from library.dataset.items import DatasetSettings, Item, SubsetSettings
from library.files.model_hash import new_hash, old_hash
from library.options.reference_table import as_dict
from library.training.networks import network_arguments
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
    "v2": False, "clip_skip": None, "max_token_length": None, "cache_latents": False, "lowram": False, "noise_offset": None,
    "multires_noise_iterations": None, "multires_noise_discount": None, "adaptive_noise_scale": None,
    "zero_terminal_snr": False, "noise_offset_random_strength": False, "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False, "training_comment": None, "max_grad_norm": None, "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "face_crop_aug_range": None,
    "prior_loss_weight": 1.0, "min_snr_gamma": None, "scale_weight_norms": None, "loss_type": "l2", "huber_schedule": "snr",
    "huber_scale": 1.0, "huber_c": 0.1, "fp8_base": False, "fp8_base_unet": False, "validation_seed": None,
    "validation_split": 0.0, "max_validation_steps": None, "validate_every_n_epochs": None, "validate_every_n_steps": None,
    "resize_interpolation": None,
}  # fmt: skip
# written only where the dataset is described by flags instead of a file
FLAG_DATASET_KEYS = (
    "shuffle_caption",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
    "keep_tokens",
    "flip_aug",
)


class LoraMetadata:
    """The metadata of one run's files. Model files are hashed in the background, since that reads all of them."""

    def __init__(self, run: CheckedRun, *, seed: int, model: dict[str, str], optimizer: str):
        self._run = run
        self._values = as_dict(run.options)
        self._model = model
        self._constant = {
            "ss_session_id": str(secrets.randbits(32)),
            "ss_training_started_at": str(time.time()),
            "ss_seed": str(seed),
            "ss_optimizer": optimizer,
            "ss_debiased_estimation": str(self._values.get("debiased_estimation_loss", False)),
            **{f"ss_{name}": str(self._values.get(name, default)) for name, default in OPTION_KEYS.items()},
            **_counts(run),
            **_text_encoder_lr(self._values),
            **_network_args(self._values),
            **_dataset_keys(run, self._values),
        }
        self._hashes = _start_hashing(self._values)

    def at(self, *, step: int, epoch: int) -> dict[str, str]:
        """All keys for a file saved now, after ``step`` steps and ``epoch`` whole epochs."""
        model_keys = {key: value for key, value in self._model.items() if key.startswith("ss_")}
        keys = {**self._constant, **model_keys, **{key: future.result() for key, future in self._hashes.items()}}
        keys.update(ss_steps=str(step), ss_epoch=str(epoch), ss_training_finished_at=str(time.time()))
        if self._values["no_metadata"]:
            keys = {key: value for key, value in keys.items() if key in MINIMUM_KEYS}
        return {**keys, **self._modelspec()}

    def _modelspec(self) -> dict[str, str]:
        values = self._values
        spec: dict[str, Any] = {
            "sai_model_spec": MODELSPEC_VERSION,
            "implementation_version": IMPLEMENTATION_VERSION,
            "title": values["metadata_title"] or values["output_name"] or f"LoRA@{time.time()}",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "timestep_range": _timestep_range(values),
            "thumbnail": _thumbnail(values["metadata_thumbnail"]),
            "resolution": _resolution(self._run),
        }
        named = ("author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
                 "is_negative_embedding")  # fmt: skip
        spec.update({name: values[f"metadata_{name}"] for name in named})
        keys = {f"modelspec.{name}": str(value) for name, value in spec.items() if value is not None}
        return {**keys, **{key: value for key, value in self._model.items() if key.startswith("modelspec.")}}


def _counts(run: CheckedRun) -> dict[str, str]:
    items, length = run.training_set.items, run.length
    return {
        "ss_num_train_images": str(sum(item.repeats for item in items if not item.subset.is_reg)),
        "ss_num_reg_images": str(sum(item.repeats for item in items if item.subset.is_reg)),
        "ss_num_validation_images": "0",
        "ss_num_batches_per_epoch": str(length.batches_per_epoch),
        "ss_num_epochs": str(length.epochs),
        "ss_max_train_steps": str(length.total_steps),
        "ss_sd_scripts_commit_hash": "(unknown)",
    }


def _text_encoder_lr(values: dict[str, Any]) -> dict[str, str]:
    rates = values.get("text_encoder_lr")
    return {"ss_text_encoder_lr": str(rates[0] if rates else None)}


def _network_args(values: dict[str, Any]) -> dict[str, str]:
    if not values["network_args"]:
        return {}
    arguments: dict[str, Any] = dict(network_arguments(values["network_args"]))
    if values["network_dropout"] is not None:
        arguments["dropout"] = values["network_dropout"]
    return {"ss_network_args": json.dumps(arguments)}


# ---------------------------------------------------------------------- the dataset


def _dataset_keys(run: CheckedRun, values: dict[str, Any]) -> dict[str, str]:
    items = run.training_set.items
    keys = {
        "ss_tag_frequency": json.dumps(_tag_frequency(items)),
        "ss_dataset_dirs": json.dumps(_folders(items, is_reg=False)),
    }
    if values["dataset_config"]:
        described = [
            _dataset(dataset, [i for i in items if i.dataset_index == n]) for n, dataset in enumerate(run.training_set.datasets)
        ]
        return {**keys, "ss_datasets": json.dumps(described)}
    dataset = run.training_set.datasets[0]
    batch = dataset.batch_size
    return {
        **keys,
        **{f"ss_{name}": str(values[name]) for name in FLAG_DATASET_KEYS},
        "ss_color_aug": "False",
        "ss_random_crop": "False",
        "ss_reg_dataset_dirs": json.dumps(_folders(items, is_reg=True)),
        "ss_batch_size_per_device": str(batch),
        "ss_total_batch_size": str(batch * run.processes * run.length.accumulation),
        "ss_resolution": str(tuple(dataset.resolution_wh)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset, list(items))),
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
        "subsets": [_subset(subset, [i for i in items if i.subset is subset]) for subset in dataset.subsets],
    }


SUBSET_KEYS = ("num_repeats", "flip_aug", "shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator",
               "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation")  # fmt: skip


def _subset(subset: SubsetSettings, items: list[Item]) -> dict[str, Any]:
    described: dict[str, Any] = {"img_count": len(items), "color_aug": False, "random_crop": False}
    described.update({name: getattr(subset, name) for name in SUBSET_KEYS})
    if subset.image_dir is not None:
        described["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return {**described, "metadata_file": subset.metadata_file.name}
    return {**described, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _source_name(subset: SubsetSettings) -> str:
    source = subset.metadata_file or subset.image_dir
    return source.name if source is not None else ""


def _tag_frequency(items: tuple[Item, ...] | list[Item]) -> dict[str, dict[str, int]]:
    """Per folder: how many images carry each tag (lower case, split at commas), not weighted by repeats."""
    folders: dict[str, Counter[str]] = {}
    for item in items:
        tags = (tag.strip().lower() for tag in item.caption.split(","))
        folders.setdefault(_source_name(item.subset), Counter()).update(tag for tag in tags if tag)
    return {name: dict(counter) for name, counter in folders.items()}


def _folders(items: tuple[Item, ...], *, is_reg: bool) -> dict[str, dict[str, int]]:
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


def _bucket_info(dataset: DatasetSettings, items: list[Item]) -> dict[str, Any] | None:
    if not dataset.enable_bucket:
        return None
    counts: Counter[tuple[int, int]] = Counter()
    error = 0.0
    for item in items:
        counts[item.bucket_wh] += item.repeats
        (width, height), (bucket_w, bucket_h) = item.size_wh, item.bucket_wh
        error += abs(width / height - bucket_w / bucket_h) * item.repeats
    buckets = {str(n): {"resolution": list(size), "count": count} for n, (size, count) in enumerate(sorted(counts.items()))}
    return {"buckets": buckets, "mean_img_ar_error": error / max(sum(counts.values()), 1)}


# ---------------------------------------------------------------------- model files and modelspec


def _start_hashing(values: dict[str, Any]) -> dict[str, Future[str]]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-hash")
    futures: dict[str, Future[str]] = {}
    for option, key in (("pretrained_model_name_or_path", "sd_model"), ("vae", "vae")):
        if not values.get(option):
            continue
        path = Path(values[option])
        futures[f"ss_{key}_name"] = pool.submit(lambda name=path.name: name)  # type: ignore[misc]
        if path.exists():
            hash_key = "ss_sd_model_hash" if key == "sd_model" else "ss_vae_hash"
            futures[hash_key] = pool.submit(old_hash, path)
            futures[hash_key.replace("ss_", "ss_new_")] = pool.submit(new_hash, path)
    pool.shutdown(wait=False)
    return futures


def _resolution(run: CheckedRun) -> str:
    width, height = run.training_set.datasets[0].resolution_wh
    return f"{width}x{height}"


def _timestep_range(values: dict[str, Any]) -> str | None:
    low, high = values.get("min_timestep"), values.get("max_timestep")
    if low is None and high is None:
        return None
    return f"{low or 0},{1000 if high is None else high}"


def _thumbnail(value: str | None) -> str | None:
    """A data URL as it is, a picture file as one; a missing file is left out."""
    if not value or value.startswith("data:"):
        return value
    path = Path(value)
    if not path.is_file():
        return None
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
