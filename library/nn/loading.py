"""Tensors from a file into a module that was built on the meta device, one at a time, into place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.files.key_check import key_problems, shape_problem

ALIGNMENT_BYTES = 64  # of torch's own CPU memory


Place = torch.device | str | Callable[[str], torch.device | str]  # one device, or that of each name in ``state_dict``


def load_into(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, device: Place, dtype: torch.dtype) -> None:
    """Replaces the module's parameters and buffers by ``tensors`` (name in ``state_dict`` -> tensor), frozen.

    Each is cast to ``dtype`` (float8 too; integers keep theirs), moved to its device and put in place before the next is asked
    for: peak memory is the model plus one tensor. A module with a method ``take_weight`` is handed its weight that way and may
    keep it in another form. Buffers that are not in ``state_dict`` are moved to the device as they are.
    Raises one CheckpointError that lists all missing, unexpected and misshapen names; the module is then incomplete.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    loaded: set[str] = set()
    unexpected: list[str] = []
    misshapen: dict[str, str] = {}
    for name, tensor in tensors:
        if name not in expected:
            unexpected.append(name)
        elif tuple(tensor.shape) != expected[name]:
            misshapen[name] = shape_problem(tuple(tensor.shape), expected[name])
        else:
            _assign(module, name, _placed(tensor, device(name) if callable(device) else device, dtype))
        loaded.add(name)
    problems = key_problems(missing=[name for name in expected if name not in loaded], unexpected=unexpected, misshapen=misshapen)
    if problems:
        raise CheckpointError(f"the weights do not fit {type(module).__name__}: {problems}")
    _move_other_buffers(module, device)


def _placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    placed = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
    # Bytes read from a file may lie anywhere; matrix products may round differently with the alignment of their operands.
    return placed if placed.data_ptr() % ALIGNMENT_BYTES == 0 else placed.clone()


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf == "weight" and hasattr(owner, "take_weight"):
        owner.take_weight(tensor)  # type: ignore[operator]
    elif leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _move_other_buffers(module: nn.Module, device: Place) -> None:
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device(f"{path}.{name}") if callable(device) else device)
