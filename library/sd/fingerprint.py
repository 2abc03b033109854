"""A fingerprint of one model of a checkpoint: what is cached with it depends on its own weights, not on the file around them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from library.files.open_weights import SafetensorsWeights, ShardedWeights
from library.files.safetensors_file import TensorInfo, file_fingerprint
from library.files.weights_source import THIRDS, Part, WeightsSource

CHUNK_BYTES = 4096
CHUNKS = 3  # of each tensor: at its start, in its middle, at its end

Places = Mapping[str, tuple[Path, TensorInfo]]  # name in the file -> where its bytes are


def part_fingerprint(part: Part[Any]) -> str:
    """32 hex digits that change when a weight of the part changes, without reading all of them; or its sizes.

    Of each tensor 12 KiB count, by its name in the module: fine-tuned weights differ everywhere, and the same VAE inside two
    checkpoints, or in a file of its own, keeps its caches. Of a pickle the whole file counts.
    """
    digest = hashlib.blake2b(repr(part.config).encode("utf-8"), digest_size=16)
    places = tensor_places(part.source)
    if places is None:
        digest.update(file_fingerprint(part.source.path).encode("ascii"))
        return digest.hexdigest()
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for name, piece in sorted(part.pieces.items()):
            path, info = places[piece.key]
            if path not in files:
                files[path] = stack.enter_context(path.open("rb"))
            third = piece.change if piece.change in THIRDS else ""
            digest.update(f"{name} {third} {info.dtype} ".encode())
            _add_chunks(digest, files[path], info)
    return digest.hexdigest()


def tensor_places(source: WeightsSource) -> Places | None:
    """Where each tensor lies; None where a pickle has it."""
    if isinstance(source, SafetensorsWeights):
        return {name: (source.path, info) for name, info in source.header.tensors.items()}
    if isinstance(source, ShardedWeights):
        found = [tensor_places(shard) for shard in source.shards]
        if all(places is not None for places in found):
            return {name: place for places in found if places is not None for name, place in places.items()}
    return None


def _add_chunks(digest: hashlib.blake2b, file: BinaryIO, info: TensorInfo) -> None:
    last = max(info.end - info.start - CHUNK_BYTES, 0)
    for number in sorted({last * number // (CHUNKS - 1) for number in range(CHUNKS)}):
        file.seek(info.start + number)
        digest.update(file.read(min(CHUNK_BYTES, info.end - info.start)))
