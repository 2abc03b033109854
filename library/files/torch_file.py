"""Tensors in torch's own container."""

from __future__ import annotations

import io


def torch_bytes(content: object) -> memoryview:
    """The bytes of the file that ``torch.save`` would write.

    Made in memory: into a file, ``torch.save`` turns the OSError of a full disk into a RuntimeError about its container.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()
