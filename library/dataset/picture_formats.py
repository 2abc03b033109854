"""Which kinds of picture files are opened, whatever their names end in."""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import cache

# Pillow's modules for them. Not all that Pillow knows: PostScript, for one, would be handed to another program to be run.
PLUGINS = ("PngImagePlugin", "JpegImagePlugin", "WebPImagePlugin", "BmpImagePlugin", "GifImagePlugin", "TiffImagePlugin",
           "PpmImagePlugin", "AvifImagePlugin")  # fmt: skip
NAMES = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JXL")


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that this installation reads, for ``Image.open(formats=...)``."""
    from PIL import Image

    for plugin in PLUGINS:
        with suppress(ImportError):  # AVIF came with Pillow 11.3
            importlib.import_module(f"PIL.{plugin}")
    return tuple(name for name in NAMES if name in Image.OPEN)
