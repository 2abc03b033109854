"""What --network_args means to networks.lora, for each kind of U-Net. Needs no torch."""

from __future__ import annotations

from typing import ClassVar

from networks.block_weights import SD_BLOCKS, SDXL_BLOCKS, BlockArguments, BlockCount
from networks.layout_names import NameTable
from networks.sd_layouts import SD1_NAMES, SD2_NAMES, SDXL_NAMES


class Sd1Arguments(BlockArguments):
    NAMES: ClassVar[NameTable | None] = SD1_NAMES
    BLOCKS: ClassVar[BlockCount] = SD_BLOCKS


class Sd2Arguments(Sd1Arguments):
    NAMES: ClassVar[NameTable | None] = SD2_NAMES


class SdxlArguments(BlockArguments):
    NAMES: ClassVar[NameTable | None] = SDXL_NAMES
    BLOCKS: ClassVar[BlockCount] = SDXL_BLOCKS
