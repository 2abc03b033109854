"""Weights in the pickles that ``torch.save`` writes (.ckpt, .pt, .pth, .bin), read without running anything that they hold."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ZIP_START = b"PK\x03\x04"  # of the newer of torch's two formats, whose tensors can be mapped into memory
STATE_DICT = "state_dict"  # what trainers put the weights under, beside their own things
# Names in old checkpoints that stand beside the weights: of the trainer that wrote them, and for single numbers. Each is read as
# an empty object in its place, so that nothing of them runs.
HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message: what it would not run


@dataclass(frozen=True, slots=True)
class TorchCheckpoint:
    """A pickle as a WeightsSource: its tensors by name; whatever else it holds is left out."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    flag: str

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Raises CheckpointError where the file has changed since it was opened."""
        wanted = set(names)
        found, is_mapped = _read(self.path, self.flag)
        for name in sorted(wanted & set(found), key=lambda name: found[name].data_ptr()):
            tensor = found.pop(name)
            own = tensor.clone()
            if is_mapped:
                _forget_pages(tensor)
            yield name, own


def open_torch_checkpoint(path: Path, *, flag: str) -> TorchCheckpoint:
    """Reads names and shapes. Raises CheckpointError for a damaged file, or one that holds more than data."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _read(path, flag)[0].items()}
    if not shapes:
        raise CheckpointError(f"{flag} {path} holds no named tensors: give a file of weights")
    return TorchCheckpoint(path, shapes, flag)


def _read(path: Path, flag: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors by name, and whether they are mapped from the file: those of a zip archive are, the old format's in memory."""
    import torch

    allowed: list[Any] = [_placeholder(name) for name in HARMLESS]
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols
            # newer versions of torch read a path with the ending of safetensors as that, whatever the file is
            is_mapped = file.read(len(ZIP_START)) == ZIP_START and path.suffix != ".safetensors"
            file.seek(0)
            content = torch.load(str(path) if is_mapped else file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged pickle raises can be anything
        raise _unreadable(path, flag, error) from error
    state = content.get(STATE_DICT, content) if isinstance(content, dict) else {}
    tensors = {
        name: tensor.detach()
        for name, tensor in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    }
    return tensors, is_mapped


def _placeholder(name: str) -> Callable[..., Any]:
    """A class of that name which keeps nothing of what it is given."""
    module, _, own_name = name.rpartition(".")

    def take(self: object, *values: object, **settings: object) -> None:
        """Whatever the pickle hands over is dropped."""

    return type(own_name, (), {"__module__": module, "__qualname__": own_name, "__init__": take, "__setstate__": take})


def _unreadable(path: Path, flag: str, error: Exception) -> CheckpointError:
    if isinstance(error, OSError) and error.strerror:
        return CheckpointError(f"{flag} {path} cannot be read: {error.strerror}")
    named = REFUSED.search(str(error)) if isinstance(error, UnpicklingError) else None
    if named is None:
        return CheckpointError(
            f"{flag} {path} is damaged, or a pickle of something else than weights; nothing of it ran: copy or download it again"
        )
    return CheckpointError(
        f"{flag} {path} holds more than weights: reading it would run {named.group(1)}, so it was not read, and nothing ran; get "
        "this model as .safetensors, from a source that you trust"
    )


def _forget_pages(tensor: Tensor) -> None:
    """The mapped pages of a tensor that has been copied: Linux would count them as memory of this process until it ends.

    Pages that the tensor only shares with its neighbours stay; a forgotten page would be read from the file again.
    """
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))
