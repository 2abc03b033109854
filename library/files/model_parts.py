"""Which file each part of a model comes from, in a line for people. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

GENERIC_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # files of diffusers folders: their folder tells more


def model_line(kind: str, file: Path, parts: Sequence[tuple[str, Path]]) -> str:
    """``"model: SD 3.5 medium, sd35.safetensors; CLIP-L and VAE in it; T5-XXL t5.safetensors"``.

    ``parts``: (what it is, its file), where the file may be ``file`` itself.
    """
    inside = [name for name, path in parts if path == file]
    apart = [f"{name} {short_name(path)}" for name, path in parts if path != file]
    return "; ".join([f"model: {kind}, {short_name(file)}", *([f"{listed(inside)} in it"] if inside else []), *apart])


def short_name(path: Path) -> str:
    """The file's name, with its folder's where that alone tells what it is."""
    is_generic = path.name.split(".")[0].split("-")[0] in GENERIC_STEMS
    return f"{path.parent.name}/{path.name}" if is_generic and path.parent.name else path.name or str(path)


def listed(names: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
