"""Opens a user's weights, whatever kind of file they are: safetensors, a torch pickle, or shards with an index.

Which of the first two a file is shows in its first bytes, not in its name: people rename them. Only pickles need torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import CheckpointError
from library.files.safetensors_file import SafetensorsHeader, read_header, read_tensors
from library.files.user_path import dead_link
from library.files.weights_source import WeightsSource

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_ENDINGS = (".safetensors", *PICKLE_ENDINGS)
INDEX = re.compile(r".+\.index(\.\w+)?\.json")  # "model.safetensors.index.json" or, of a variant, "...index.fp16.json": shards
ZIP_START = b"PK\x03\x04"  # torch.save's since 2020
PICKLE_STARTS = (b"\x80", b"(", b"}", b"]")  # torch.save's before, and old protocols


def open_weights(path: Path, *, flag: str) -> WeightsSource:
    """The weights at ``path``: a file of any kind, a ``*.index.json``, or a folder with one of them. ``flag``: for messages.

    Raises CheckpointError where there is nothing, for a damaged file, and for a pickle with anything in it but data.
    """
    if path.is_dir():
        path = _index_in(path, flag)
    if INDEX.fullmatch(path.name):
        return open_shards(path, flag=flag)
    if is_pickle(path, flag):
        from library.files.torch_checkpoint import open_torch_checkpoint

        return open_torch_checkpoint(path, flag=flag)
    return SafetensorsWeights(read_header(path))


def is_pickle(path: Path, flag: str) -> bool:
    """Whether the file's first bytes are those of a pickle, plain or in a zip archive. Raises CheckpointError where it cannot be
    read."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        link = dead_link(path)
        raise CheckpointError(f"{flag} {path} cannot be read: {link or error.strerror}") from error
    if not start:
        raise CheckpointError(f"{flag} {path} is empty: copy or download it again")
    if start[8:] == b"{":  # behind the length of a safetensors header
        return False
    return start.startswith((ZIP_START, *PICKLE_STARTS)) or path.suffix in PICKLE_ENDINGS


@dataclass(frozen=True, slots=True)
class SafetensorsWeights:
    """A safetensors file as a WeightsSource."""

    header: SafetensorsHeader
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {name: info.shape for name, info in self.header.tensors.items()})

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(self.header, names)


@dataclass(frozen=True, slots=True)
class ShardedWeights:
    """Several files that are one model. ``path``: their folder."""

    path: Path
    shards: tuple[WeightsSource, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        found = {name: shape for shard in self.shards for name, shape in shard.shapes.items()}
        object.__setattr__(self, "shapes", found)

    @property
    def metadata(self) -> Mapping[str, str]:
        return {key: value for shard in self.shards for key, value in shard.metadata.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(names)
        for shard in self.shards:
            here = wanted & set(shard.shapes)
            wanted -= here
            if here:
                yield from shard.tensors(here)


def open_shards(index: Path, *, flag: str) -> ShardedWeights:
    """The shards that an index file names. Raises CheckpointError for an index or a shard that is damaged or missing."""
    names = shard_names(index, flag)
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{flag} {index}: {len(missing)} of {len(names)} files that it names are missing ({', '.join(missing[:3])}): copy or "
            "download them too"
        )
    return ShardedWeights(index.parent, tuple(open_weights(index.parent / name, flag=flag) for name in names))


def shard_names(index: Path, flag: str) -> list[str]:
    """The names of an index's files, in order, each once. Raises CheckpointError."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(entries.values()))
        is_plain = all(isinstance(name, str) and name.endswith(WEIGHT_ENDINGS) and Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_index(index, flag) from error
    if not is_plain or not names:
        raise _bad_index(index, flag)
    return names


def _bad_index(index: Path, flag: str) -> CheckpointError:
    return CheckpointError(f"{flag} {index} is no list of weight files beside it: copy or download it again")


def _index_in(folder: Path, flag: str) -> Path:
    """The one index, or else the one weight file, of a folder. Raises CheckpointError where it has none or several."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    for candidates in (
        [path for path in found if INDEX.fullmatch(path.name)],
        [path for path in found if path.suffix == WEIGHT_ENDINGS[0]],
        [path for path in found if path.suffix in PICKLE_ENDINGS],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise CheckpointError(
                f"{flag} {folder} holds several weight files ({', '.join(path.name for path in candidates[:5])}): name one"
            )
    raise CheckpointError(
        f"{flag} {folder} holds no weight files ({', '.join(WEIGHT_ENDINGS)}): name the folder or file that does"
    )
