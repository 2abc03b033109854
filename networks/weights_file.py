"""What a LoRA file holds: reading it, comparing it with a network, and the hashes in its metadata."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import CheckpointError, NetworkError, NoModuleFits
from library.files.atomic import write_atomically
from library.files.model_hash import OLD_HASH_BYTES, OLD_HASH_DIGITS, OLD_HASH_OFFSET
from library.files.safetensors_file import read_header, read_tensors, save_safetensors, serialize
from library.files.torch_file import torch_bytes
from library.training.files.metadata import IMPLEMENTATION_VERSION
from library.training.models.network_checks import base_model
from networks.arguments import parse_bool
from networks.fused_parts import is_split
from networks.layout_names import is_part_of_adapter, model_of_lora, module_name
from networks.selection import ALPHA, DOWN, UP, Candidate, examples

OWN_MAKER = IMPLEMENTATION_VERSION.partition("/")[0] + "/"  # how modelspec.implementation_version begins in this project's files
SAME_ALPHA = 0.01  # relative; in a file of bfloat16 alphas are rounded, and those that are told apart differ by whole factors


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What load_weights() did. ``missing``: modules that the file lacks; ``unexpected``: modules of the file without a place.

    load_weights() has warned of the latter.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.loaded} LoRA modules loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} are not in it and start anew ({examples(self.missing)})")
        return "; ".join(parts)


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes that LoRA browsers know a file by: of the tensors' bytes, and of 64 KiB at 1 MiB of the file.

    Both look at a file with the ss_* part of ``metadata`` alone, so that titles and dates do not change them.
    """
    data = serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")  # tensors begin after the header and its 8-byte length
    legacy = data[OLD_HASH_OFFSET : OLD_HASH_OFFSET + OLD_HASH_BYTES]
    return {"sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:OLD_HASH_DIGITS]}  # fmt: skip


def read_lora_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file, on the CPU. Raises CheckpointError for a missing or damaged file, and for one with NaN."""
    return read_tensors_of(path)[0]


def read_tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, and the file's metadata; pickles have none."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        tensors = dict(read_tensors(header))
        check_finite(path, tensors)
        return tensors, header.metadata
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(f"{path} is not a LoRA file, or it is damaged; copy or download it again") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} is not a LoRA file: it holds something other than named tensors")
    check_finite(path, weights)
    return weights, {}


def check_finite(file: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for adapters with NaN or infinite values: one of them spoils the whole model it is added to.

    Looks at the parts of adapters alone: of a full model, which whoever wants a LoRA refuses by its names, nothing is read.
    """
    bad = {module_name(key) for key, tensor in weights.items() if is_part_of_adapter(key) and not _is_finite(tensor)}
    if bad:
        raise CheckpointError(
            f"{file}: {examples(sorted(bad))} {'has' if len(bad) == 1 else 'have'} values that are not finite (NaN or infinite); "
            "the LoRA is spoilt: take one that was saved earlier, or train it again"
        )


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8 bit formats have no isfinite()
    return bool(values.isfinite().all())


def write_lora_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Atomically. A .safetensors file gets ``metadata`` with its sshs_* hashes, made anew (None: neither); others hold none."""
    if path.suffix != ".safetensors":
        write_atomically(path, lambda stream: stream.write(torch_bytes(dict(tensors))))
    elif metadata is None:
        save_safetensors(path, tensors)
    else:
        save_safetensors(path, tensors, {**metadata, **sshs_hashes(tensors, metadata)})


def by_module(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"a.lora_up.weight": t, ...} -> {"a": {"lora_up.weight": t, ...}}; only modules with both halves."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = value
    return {name: parts for name, parts in found.items() if DOWN in parts and UP in parts}


def in_layer_shapes(weights: dict[str, Tensor], places: Iterable[Candidate]) -> dict[str, Tensor]:
    """Pairs of Linears, (r, K) and (M, r), for 1x1 convolutions and the reverse: the same LoRA, written in another shape.

    ``weights`` itself where all fit already.
    """
    changed = {}
    for place in places:
        layer = place.module.weight
        for key in (f"{place.name}.{DOWN}", f"{place.name}.{UP}"):
            tensor = weights.get(key)
            if tensor is not None and tensor.ndim != layer.ndim and {*tensor.shape[2:], *layer.shape[2:]} == {1}:
                changed[key] = tensor.reshape(*tensor.shape[:2], *[1] * (layer.ndim - 2))
    return {**weights, **changed} if changed else weights


def trained_alphas(
    weights: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str], places: Iterable[Candidate]
) -> dict[str, Tensor]:
    """{key: alpha} of the fused modules of a file whose maker wrote the alpha of one part, so that by the file alone they are
    weaker than they were trained, by the number of parts; ``weights`` by module.

    kohya-ss/sd-scripts writes so. Known by the metadata of the training, and only where the alpha is exactly that of a part.
    """
    if metadata.get("modelspec.implementation_version", "").startswith(OWN_MAKER) or not _says_split(metadata):
        return {}
    found = {}
    for place in places:
        pair, count = weights.get(place.name, {}), len(place.parts)
        if ALPHA in pair and is_split(pair[UP], place.parts):
            of_a_part = _network_alpha(metadata) or pair[DOWN].shape[0] / count  # 0 = the rank of a part
            if math.isclose(float(pair[ALPHA]), of_a_part, rel_tol=SAME_ALPHA):
                found[f"{place.name}.{ALPHA}"] = pair[ALPHA].float() * count
    return found


def _says_split(metadata: Mapping[str, str]) -> bool:
    try:
        return parse_bool(json.loads(metadata.get("ss_network_args", "{}")).get("split_qkv", "false"))
    except (ValueError, AttributeError):
        return False


def _network_alpha(metadata: Mapping[str, str]) -> float:
    """NaN, which no module's alpha is, where it is not told."""
    try:
        return float(metadata.get("ss_network_alpha", "nan"))
    except ValueError:
        return math.nan


def metadata_of(file: str | Path | None) -> dict[str, str]:
    """Empty for pickles, and where there is no such file."""
    path = Path(file or "")
    return read_header(path).metadata if path.suffix == ".safetensors" and path.is_file() else {}


def check_pairs(file: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a file under our names that has one half of a module's LoRA without the other."""
    halves: dict[str, set[str]] = {}
    for key in weights:
        name, _, part = key.partition(".")
        if part in (DOWN, UP):
            halves.setdefault(name, set()).add(part)
    torn = [name for name, parts in halves.items() if len(parts) == 1]
    if torn:
        raise CheckpointError(
            f"{file}: {len(torn)} modules have only one of lora_down and lora_up ({examples(torn)}): the file is damaged; copy "
            "or download it again"
        )


def no_module_fits(file: str | Path, weights: Mapping[str, Any], known: Iterable[str], architecture: str = "") -> NetworkError:
    """``weights`` by module or by key: names of the file; ``known``: names that this network has or could have;
    ``architecture``: of this model, as OTHER_MODELS calls it."""
    if not weights:
        return NetworkError(f"{file} holds no LoRA modules (no pairs of NAME.{DOWN} and NAME.{UP})")
    other = model_of_lora(weights)
    if other and other == architecture:
        return NoModuleFits(f"{file} is a LoRA for {other}, but for other parts of it than the network has: it changes "
                            f"{examples(weights)}, and this network {examples(known)}; choose a file that has these, or train "
                            "what the file has")  # fmt: skip
    return NoModuleFits(f"{file} is no LoRA for this model{f' but one for {other}' if other else ''}: none of its modules fits "
                        f"({examples(weights)}); this network has {examples(known)}; choose a file made for this "
                        "architecture")  # fmt: skip


def trained_on(file: str | Path) -> str:
    """``" (its metadata names the base model sd_v1)"``; empty where a file says nothing about that."""
    base = base_model(metadata_of(file))
    return f" (its metadata names the base model {base})" if base else ""


def check_shapes(
    file: str | Path,
    places: Iterable[tuple[Candidate, int]],
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    splits: bool = False,
) -> None:
    """Raises one NetworkError for the modules of ``places`` (each with its rank here) whose shapes in the file differ.

    ``splits``: parts of fused layers have LoRAs of their own here.
    """
    ranks: list[str] = []
    of_parts: list[str] = []  # pairs of fused parts, for which one pair is here
    sizes: list[str] = []
    for place, rank in places:
        parts = weights[place.name]
        file_rank = parts[DOWN].shape[0]
        weight = place.module.weight.shape
        fits = parts[DOWN].shape[1:] == weight[1:] and parts[UP].shape[0] == weight[0] and parts[UP].shape[1] == file_rank
        if not fits:
            shapes = f"{tuple(parts[UP].shape)} x {tuple(parts[DOWN].shape)}"
            sizes.append(f"{place.name} ({shapes} in the file, the layer is {tuple(weight)})")
        elif file_rank != rank:
            split = is_split(parts[UP], place.parts)
            hint = f", rank {file_rank // len(place.parts)} of each of its {len(place.parts)} parts" if split else ""
            (of_parts if split and not splits else ranks).append(
                f"{place.name} (rank {file_rank} in the file{hint}, {rank} here)"
            )
    problems = []
    if sizes:
        problems.append(
            f"{file} is for a model of other sizes{trained_on(file)}: {examples(sizes)}; choose a file made for this model"
        )
    if ranks:
        problems.append(
            f"{file} has other ranks: {examples(ranks)}; set --network_dim to the file's rank, or give --dim_from_weights"
        )
    if of_parts:
        problems.append(
            f"{file} has a LoRA for each of q, k and v: {examples(of_parts)}; add split_qkv=true to --network_args, with the "
            "rank of a part as --network_dim, or give --dim_from_weights"
        )
    if problems:
        raise NetworkError(*problems)
