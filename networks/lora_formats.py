"""LoRA files in the layouts of other programs: reading and writing ComfyUI's and diffusers', with their tensors.

Between our layout and ComfyUI's only names differ. diffusers has no alpha, so that alpha / rank is multiplied into lora_B, and
alpha cannot be found again in such a file. What is one Linear here may be several modules there, q, k and v: each takes its rows
of lora_up with the whole of lora_down, or, where it had a pair of its own, that. Read, they become one pair again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from networks.fused_parts import block_diagonal, blocks_of
from networks.layout_names import (
    ALPHA,
    DIFFUSERS,
    DOWN,
    ENDINGS,
    KEY,
    NAMED,
    OURS,
    UP,
    Key,
    NameTable,
    is_for_another_model,
    not_understood,
    other_adapter,
    understood,
)
from networks.weights_file import read_tensors_of, write_lora_file

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' entry with PEFT's settings, the strength among them


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A LoRA in another layout. ``folded``: modules whose strength was not 1 and went into lora_B; ``rounding``: the largest
    change that this made to one of their weights, as a share of the module's largest weight; ``left_out``: modules."""

    tensors: dict[str, Tensor]
    folded: int = 0
    rounding: float = 0.0
    left_out: int = 0


K = TypeVar("K")
Parts = dict[str, Tensor]  # DOWN, UP and, where the file has it, ALPHA
Modules = dict[str, tuple[Key, Parts]]  # by our name; the key is any of the module's


def read_in_our_layout(path: Path, table: NameTable | None) -> dict[str, Tensor]:
    """The tensors of a LoRA file of any layout, under our names; as they are for an architecture without a table.

    Raises CheckpointError for a missing, damaged or unknown file, and for one that is no plain LoRA.
    """
    tensors, metadata = read_tensors_of(path)
    return tensors if table is None else in_our_layout(path, tensors, table, metadata)


def in_our_layout(
    file: object, tensors: dict[str, Tensor], table: NameTable, metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """``tensors`` of any layout under our names. Where the names are written as ours they stay as they are, known or not: who
    asks for modules by name tells which have no place. Raises CheckpointError for names of another model."""
    if problem := other_adapter(file, tensors):
        raise CheckpointError(problem)
    found = {key: table.find(key) for key in tensors}
    unknown = [key for key, meaning in found.items() if meaning is None]
    if is_for_another_model(unknown, table):
        raise not_understood(file, list(tensors), unknown, table)
    if all(map(is_written_as_ours, found, found.values())):
        return tensors
    keys = understood(file, tensors, table)
    return convert(file, by_our_name(file, tensors, keys, metadata), OURS).tensors


def is_written_as_ours(key: str, meaning: Key | None) -> bool:
    """Also a name that no module has, and what is no part of a LoRA at all."""
    if meaning is not None:
        return meaning.written(OURS) == key
    match = KEY.fullmatch(key)
    return match is None or key.endswith(ENDINGS[OURS][str(match.lastgroup)])


def by_our_name(file: object, tensors: Mapping[str, Tensor], keys: Mapping[str, Key],
                metadata: Mapping[str, str] | None = None) -> Modules:  # fmt: skip
    """The file's modules, complete: both halves of each pair, of equal rank, once. Raises CheckpointError for the others."""
    pieces: dict[tuple[str, int | None], tuple[Key, Parts]] = {}  # of fused modules there may be several
    twice = []
    for key, tensor in tensors.items():
        meaning = keys[key]
        _, parts = pieces.setdefault((meaning.name(OURS), meaning.projection), (meaning, {}))
        if meaning.part in parts:
            twice.append(key)
        parts[meaning.part] = tensor
    whole = {name for name, projection in pieces if projection is None}
    twice += [key.name(key.layout) for (name, projection), (key, _) in pieces.items() if projection is not None and name in whole]
    torn = [
        name if projection is None else key.name(key.layout)
        for (name, projection), (key, parts) in pieces.items()
        if not _is_pair(parts)
    ]
    problems = (
        [f"{file}: {len(twice)} parts are there twice, under names of several layouts, such as {twice[0]}"] if twice else []
    )
    if torn:
        problems.append(f"{file}: {len(torn)} modules have no fitting pair of lora_down and lora_up: {', '.join(torn[:NAMED])}")
    if problems:
        raise CheckpointError(*problems)
    return _joined(file, _with_strength_of_peft(file, pieces, metadata or {}))


def _joined(file: object, pieces: Mapping[tuple[str, int | None], tuple[Key, Parts]]) -> Modules:
    """The modules of our layout, whose rows stand as they do there."""
    modules: Modules = {}
    fused: dict[str, dict[int, tuple[Key, Parts]]] = {}
    for (name, projection), (key, parts) in pieces.items():
        if projection is None:
            modules[name] = key, _swapped(key, parts) if key.layout in key.module.swapped_in else parts
        else:
            fused.setdefault(name, {})[projection] = key, parts
    for name, found in fused.items():
        key = next(iter(found.values()))[0]
        modules[name] = key._replace(projection=None), join(f"{file}: {name}", key, {n: parts for n, (_, parts) in found.items()})
    return modules


def join(what: str, key: Key, found: Mapping[int, Parts]) -> Parts:
    """One pair of those of a fused module's projections; of one that is not ``found`` the rows are zero.

    Projections with the same down half share it; else the rank is the sum of theirs. Raises CheckpointError where the rows of
    those that are not there are unknown.
    """
    assert key.module.fused is not None
    count = len(next(iter(key.module.fused.names.values())))
    known = [found[n][UP].shape[0] if n in found else None for n in range(count)]
    inputs = next(iter(found.values()))[DOWN].shape[1]
    rows = key.module.fused.all_rows(known, inputs)
    sizes = key.module.fused.cut(rows, inputs) if rows is not None else ()
    if rows is None or any(size not in (None, own) for size, own in zip(known, sizes, strict=True)):
        raise CheckpointError(
            f"{what}: its projections have {known} rows (None: not in the file), from which the size of the layer cannot be "
            "told; choose a LoRA that has all of them, or one made for this model"
        )
    return _one_pair([found.get(n) for n in range(count)], sizes)


def _one_pair(projections: Sequence[Parts | None], sizes: Sequence[int]) -> Parts:
    present = [parts for parts in projections if parts is not None]
    first, *others = present
    shared = all(torch.equal(parts[DOWN], first[DOWN]) for parts in others)
    strengths = [_strength(parts) if parts is not None else None for parts in projections]
    given = {strength for strength in strengths if strength is not None}
    strength = given.pop() if len(given) == 1 else 1.0  # one for all, else multiplied into their up halves
    ups = []
    for parts, own, size in zip(projections, strengths, sizes, strict=True):
        if parts is None:
            ups.append(first[UP].new_zeros(size, first[DOWN].shape[0] if shared else 0))
        else:
            ups.append(parts[UP] if own == strength else (parts[UP].double() * (own or 0.0)).to(parts[UP].dtype))
    down = first[DOWN] if shared else torch.cat([parts[DOWN] for parts in present])
    up = torch.cat(ups) if shared else block_diagonal(ups)
    return {DOWN: down, UP: up, ALPHA: torch.tensor(strength * down.shape[0])}


def _cut(key: Key, parts: Parts, layout: str) -> list[Parts]:
    """The reverse: a pair for each projection of a fused module, where ``layout`` has it so."""
    if len(key.module.all_names(layout)) == 1 or key.module.fused is None:
        return [parts]
    down, up = parts[DOWN], parts[UP]
    sizes = key.module.fused.cut(up.shape[0], down.shape[1])
    blocks = blocks_of(up, sizes)
    if blocks is None or not up.count_nonzero():
        return [{**parts, DOWN: down.clone(), UP: rows.clone()} for rows in up.split(list(sizes))]
    alpha = {ALPHA: parts[ALPHA] / len(sizes)} if ALPHA in parts else {}
    return [
        {DOWN: own_down.clone(), UP: own_up.clone(), **alpha}
        for own_down, own_up in zip(down.split(blocks[0].shape[1]), blocks, strict=True)
    ]


def _swapped(key: Key, parts: Parts) -> Parts:
    """With the halves of the rows the other way round, of a layer that has twice as many rows as inputs."""
    up = parts[UP]
    return {**parts, UP: up.roll(up.shape[0] // 2, 0)} if up.shape[0] == 2 * parts[DOWN].shape[1] else parts


def _is_pair(parts: Parts) -> bool:
    if DOWN not in parts or UP not in parts:
        return False
    fits = parts[DOWN].ndim >= 2 and parts[UP].ndim >= 2 and parts[DOWN].shape[0] == parts[UP].shape[1]
    return fits and (ALPHA not in parts or parts[ALPHA].numel() == 1)


def convert(
    file: object, modules: Modules, layout: str, *, dtype: torch.dtype | None = None, only: str | None = None
) -> Converted:
    """The modules in ``layout``, in ``dtype`` (None: each tensor's own). ``only``: of this part of the model.

    Raises CheckpointError for modules that the layout has no place for.
    """
    chosen = {name: entry for name, entry in modules.items() if only in (None, entry[0].module.part)}
    homeless = [name for name, (key, _) in chosen.items() if not key.module.all_names(layout)]
    if homeless:
        where = ", ".join(sorted({chosen[name][0].module.part for name in homeless}))
        raise CheckpointError(
            f"{file}: diffusers' loader has no place for {len(homeless)} modules of the {where} ({', '.join(homeless[:NAMED])})"
        )
    tensors: dict[str, Tensor] = {}
    folded, rounding = 0, 0.0
    for name, (key, parts) in chosen.items():
        written: Parts = parts if layout != OURS or ALPHA in parts else {**parts, ALPHA: rank_as_alpha(parts)}
        if layout == DIFFUSERS:
            written, change = _folded(f"{file}: {name}", parts, dtype)
            folded, rounding = folded + (change is not None), max(rounding, change or 0.0)
        written = _swapped(key, written) if layout in key.module.swapped_in else written
        for theirs, own in zip(key.all_names(layout), _cut(key, written, layout), strict=True):
            for part, tensor in own.items():
                shaped = tensor.flatten(1) if layout in key.module.linear_in and part != ALPHA else tensor
                tensors[theirs + ENDINGS[layout][part]] = shaped.to(dtype or tensor.dtype)
    return Converted(tensors=tensors, folded=folded, rounding=rounding, left_out=len(modules) - len(chosen))


def rank_as_alpha(parts: Parts) -> Tensor:
    """The alpha of a pair without one: programs take its strength as 1."""
    return torch.tensor(float(parts[DOWN].shape[0]))


def _strength(parts: Parts) -> float:
    """alpha / rank"""
    return float(parts[ALPHA]) / parts[DOWN].shape[0] if ALPHA in parts else 1.0


def _folded(what: str, parts: Parts, dtype: torch.dtype | None) -> tuple[Parts, float | None]:
    """The pair with alpha / rank in its up half, and the share by which rounding changed it; None where the strength is 1.

    Computed in float64 and rounded once; a power of two, which alpha / rank mostly is, changes no digit.
    """
    up, down = parts[UP], parts[DOWN]
    strength = _strength(parts)
    if strength == 1.0:
        return {DOWN: down, UP: up}, None
    exact = up.double() * strength
    kept = exact.to(dtype or up.dtype)
    if bool(exact.isfinite().all()) and not bool(kept.float().isfinite().all()):
        raise CheckpointError(
            f"{what}: alpha is {strength:g} times the rank, and lora_B multiplied by that is too large for {kept.dtype}; "
            "save it in float32 or bfloat16 first"
        )
    largest = exact.abs().max() if exact.numel() else torch.tensor(0.0)
    change = float((kept.double() - exact).abs().max() / largest) if float(largest) else 0.0
    return {DOWN: down, UP: kept}, change


# ---------------------------------------------------------------- PEFT's settings in a file's metadata


def _with_strength_of_peft(file: object, modules: dict[K, tuple[Key, Parts]],
                           metadata: Mapping[str, str]) -> dict[K, tuple[Key, Parts]]:  # fmt: skip
    """With the alphas that diffusers finds in a file's metadata, for its modules that have none."""
    if ADAPTER_METADATA not in metadata:
        return modules
    try:
        settings = json.loads(metadata[ADAPTER_METADATA])
        return {name: (key, _with_peft_alpha(key, parts, settings)) for name, (key, parts) in modules.items()}
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{file}: its metadata {ADAPTER_METADATA}, which says how strong the LoRA is, cannot be read ({error})"
        ) from error


def _with_peft_alpha(key: Key, parts: Parts, settings: Mapping[str, Any]) -> Parts:
    if ALPHA in parts or not key.module.all_names(DIFFUSERS):
        return parts
    name = key.name(DIFFUSERS) if key.layout == DIFFUSERS else key.all_names(DIFFUSERS)[0]
    model, _, path = name.partition(".")
    patterns = settings.get(f"{model}.alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), None)
    alpha = settings.get(f"{model}.lora_alpha") if alpha is None else alpha
    if alpha is None:
        return parts
    if settings.get(f"{model}.use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank, arXiv 2312.03732
        alpha *= math.sqrt(parts[DOWN].shape[0])
    return {**parts, ALPHA: torch.tensor(float(alpha))}


# ---------------------------------------------------------------- writing


def save_network_as(network: Any, path: Path, table: NameTable, layout: str, *, dtype: torch.dtype | None,
                    metadata: Mapping[str, str]) -> None:  # fmt: skip
    """The network's weights in ``layout``; else as its save_weights() does. Equal weights and metadata give equal bytes."""
    tensors = {key: value.cpu() for key, value in network.file_tensors().items()}
    modules = by_our_name("the network", tensors, understood("the network", tensors, table))
    write_lora_file(path, convert("the network", modules, table.written_layout(layout), dtype=dtype).tensors, metadata)


def layout_problems(network: nn.Module, table: NameTable, layout: str) -> list[str]:
    """Why save_network_as() could not write this network; empty where it can. Looks at names alone."""
    keys = {key: table.find(key) for key in network.state_dict()}
    strange = [key for key, meaning in keys.items() if meaning is None]
    written = table.written_layout(layout)
    homeless = {key.name(OURS) for key in keys.values() if key is not None and not key.module.all_names(written)}
    problems = []
    if strange:
        problems.append(
            f"{len(strange)} of its tensors have names that no {table.architecture} has ({', '.join(strange[:NAMED])})"
        )
    if homeless:
        problems.append(f"that layout has no place for {len(homeless)} of its modules ({', '.join(sorted(homeless)[:NAMED])})")
    return problems
