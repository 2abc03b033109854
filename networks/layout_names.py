"""The three layouts of LoRA files, as names: which module and which part of its LoRA a key means. Needs no torch.

A key is a module's name and an ending: ``lora_unet_blocks_0_mlp_layer1`` + ``.lora_down.weight``. Each architecture states the
names of its modules as a :class:`NameTable` (``anima_layouts.py``); the tensors follow in ``lora_formats.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.errors import CheckpointError, did_you_mean
from library.files.model_path import LORA, recognise_keys, with_article

OURS, COMFY, DIFFUSERS = "ours", "comfy", "diffusers"
DOWN, UP, ALPHA = "down", "up", "alpha"  # the parts of one module's LoRA
# how each layout ends its keys; diffusers has no alpha: it takes the strength as 1, as if alpha were the rank
ENDINGS: dict[str, dict[str, str]] = {
    OURS: {DOWN: ".lora_down.weight", UP: ".lora_up.weight", ALPHA: ".alpha"},
    COMFY: {DOWN: ".lora_A.weight", UP: ".lora_B.weight", ALPHA: ".alpha"},
    DIFFUSERS: {DOWN: ".lora_A.weight", UP: ".lora_B.weight"},
}
TITLES = {OURS: "the names of kohya-ss/sd-scripts", COMFY: "ComfyUI's names", DIFFUSERS: "diffusers' names"}
NUMBER = "{n}"  # stands for a block's number in the names of a table
BLOCK_NUMBER = r"(?<=blocks[._]|layers[._])\d+(?=[._])"
# every ending that ComfyUI's comfy/weight_adapter/lora.py takes, whatever the module's name
KEY = re.compile(
    r"(?P<name>.+?)(?:"
    r"(?P<down>\.lora_down\.weight|\.lora_A(?:\.default)?\.weight|\.lora_A|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight)|"
    r"(?P<up>\.lora_up\.weight|\.lora_B(?:\.default)?\.weight|\.lora_B|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight)|"
    r"(?P<alpha>\.alpha))"
)
# what is trained like a LoRA and is none, by the endings of LyCORIS and PEFT
OTHER_ADAPTERS = {
    "LoKr": r"\.lokr_(w|t)\d",
    "LoHa": r"\.hada_(w|t)\d",
    "DoRA": r"\.(dora_scale$|lora_magnitude_vector)",
    "OFT": r"\.oft_(blocks|diag|R)",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon": r"\.lora_mid\.weight$",
    "full weight difference": r"\.(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)$",
}
STABLE_DIFFUSION = "Stable Diffusion 1.x or 2.x"  # whose modules have the same names
# LoRA files of other models, by the names of their modules; the first that fits counts
OTHER_MODELS = {
    "FLUX": r"(double|single)(_transformer)?_blocks[._]\d",
    "SD3": r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj|^lora_te3_",
    "Qwen-Image": r"transformer_blocks[._]\d+[._](img|txt)_mlp",
    "Z-Image": r"layers[._]\d+[._](attention[._]to_[qkv]|adaLN_modulation[._]0)",  # which otherwise has Lumina's names
    "Lumina Image 2.0": r"layers[._]\d+[._](attention[._]qkv|feed_forward)|context_refiner|noise_refiner",
    "Wan": r"blocks[._]\d+[._](ffn[._]\d|cross_attn[._][kv]_img)",
    "Anima": r"^(lora_unet_|diffusion_model\.)(llm_adapter|blocks[._]\d+[._](mlp[._]layer|(self|cross)_attn[._]\w+_proj|adaln))",
    # the names of text encoders alone are SDXL's, but FLUX and SD3 have them too
    "SDXL": r"^lora_te[12]_|^text_encoder_2\.|^lora_unet_(input_blocks|middle_block|output_blocks)_"
    r"|^(lora_unet_|unet\.)?(down_blocks|mid_block|up_blocks)[._].*transformer_blocks[._][1-9]",
    STABLE_DIFFUSION: r"^lora_unet_(down_blocks|up_blocks|mid_block)_|^lora_te_text_model_|^(unet\.)?(down|up)_blocks\.",
}
NAMED = 3  # names that a message gives


@dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """A Linear whose rows are several projections, which some layouts keep as modules of their own."""

    names: Mapping[str, tuple[str, ...]]  # layout -> the projections' names in their order
    cut: Callable[[int, int], tuple[int, ...]]  # (all rows, inputs of the Linear) -> rows of each
    # (rows of each, None = not in the file; inputs) -> all rows; None where they are not known
    all_rows: Callable[[Sequence[int | None], int], int | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """A module that can have a LoRA. ``names``: layout -> its name, with ``{n}`` for the block; a layout may have none."""

    part: str  # of the model: "denoiser", "text encoder"
    names: Mapping[str, str]
    aliases: tuple[str, ...] = ()  # further names, which are read and never written
    linear_in: frozenset[str] = frozenset()  # layouts in which it is a Linear, although ours may be a 1x1 convolution
    fused: Fused | None = None  # what its projections are called in layouts where ``names`` has no name for it
    # layouts in which the two halves of its rows, where these are twice its inputs, are the other way round
    swapped_in: frozenset[str] = frozenset()

    def all_names(self, layout: str) -> tuple[str, ...]:
        """Its name, or those of its projections; none where the layout has no place for it."""
        if layout in self.names:
            return (self.names[layout],)
        return self.fused.names.get(layout, ()) if self.fused else ()


class Key(NamedTuple):
    """A key of a file, understood."""

    module: Module
    number: str  # of the block; empty where the module's name has none
    part: str  # DOWN, UP or ALPHA
    layout: str
    projection: int | None = None  # of a fused module, where it is one of these that the key is of

    def name(self, layout: str) -> str:
        """The module's name, or that of the key's projection. Raises KeyError where the layout has no place for it."""
        if self.projection is not None and layout not in self.module.names and self.module.fused:
            return self.module.fused.names[layout][self.projection].replace(NUMBER, self.number)
        return self.module.names[layout].replace(NUMBER, self.number)

    def all_names(self, layout: str) -> tuple[str, ...]:
        return tuple(name.replace(NUMBER, self.number) for name in self.module.all_names(layout))

    def written(self, layout: str) -> str:
        return self.name(layout) + ENDINGS[layout][self.part]


class NameTable:
    """All names of one architecture's modules.

    ``block_number``: a regex for the number that ``{n}`` stands for; ``as_ours``: layouts in which our own names are written.
    """

    def __init__(self, architecture: str, modules: Iterable[Module], *, block_number: str = BLOCK_NUMBER,
                 as_ours: tuple[str, ...] = ()):  # fmt: skip
        self.architecture = architecture
        self.modules = tuple(modules)
        self.as_ours = as_ours
        self._block_number = re.compile(block_number)
        self._known: dict[str, tuple[Module, str, int | None]] = {}
        for module in self.modules:
            for layout, name, projection in _names_of(module):
                assert name not in self._known, f"two modules are called {name}"
                self._known[name] = (module, layout, projection)

    def find(self, key: str) -> Key | None:
        """What ``key`` of any layout means, or None."""
        match = KEY.fullmatch(key)
        if match is None:
            return None
        name, number = self.general_name(match["name"])
        found = self._known.get(name)
        return None if found is None else Key(found[0], number, str(match.lastgroup), *found[1:])

    def near(self, module: str) -> str:
        """`` (did you mean ...?)`` for a module's name that is not known, or an empty text."""
        name, number = self.general_name(module)
        return did_you_mean(name, self._known).replace(NUMBER, number)

    def general_name(self, name: str) -> tuple[str, str]:
        """A module's name with ``{n}`` in place of its block's number, and that number."""
        match = self._block_number.search(name)
        if match is None:
            return name, ""
        return f"{name[: match.start()]}{NUMBER}{name[match.end() :]}", match[0]

    def written_layout(self, layout: str) -> str:
        """The layout whose names a file for ``layout`` gets."""
        return OURS if layout in self.as_ours else layout


def _names_of(module: Module) -> Iterator[tuple[str, str, int | None]]:
    """(layout, name, which projection it is of) of all names that are read."""
    yield from ((layout, name, None) for layout, name in module.names.items())
    yield from ((COMFY, alias, None) for alias in module.aliases)
    for layout, names in module.fused.names.items() if module.fused else ():
        yield from ((layout, name, projection) for projection, name in enumerate(names))


def module_name(key: str) -> str:
    """The key without its ending; all of it where it has none of a LoRA."""
    match = KEY.fullmatch(key)
    return match["name"] if match else key


def understood(file: object, keys: Iterable[str], table: NameTable) -> dict[str, Key]:
    """Every key of a LoRA file, understood. Raises CheckpointError for a file of another kind and for unknown names."""
    listed = list(keys)
    found = {key: table.find(key) for key in listed}
    unknown = [key for key, meaning in found.items() if meaning is None]
    if not listed or unknown:
        raise not_understood(file, listed, unknown, table)
    return {key: meaning for key, meaning in found.items() if meaning is not None}


def not_understood(file: object, keys: list[str], unknown: list[str], table: NameTable) -> CheckpointError:
    """The error for a file with ``unknown`` among its ``keys``: what it is, or which names cannot be used."""
    if problem := other_adapter(file, unknown):
        return CheckpointError(problem)
    other = model_of_lora(unknown)
    if other not in (None, table.architecture) and len(unknown) < len(keys):  # models that share some of their names
        return CheckpointError(
            f"{file} is a LoRA for {other}, not for {table.architecture}, which has no {module_name(unknown[0])}; choose one "
            f"made for {table.architecture}"
        )
    if len(unknown) < len(keys):
        modules = list(dict.fromkeys(module_name(key) for key in unknown))
        named = ", ".join(f"{name}{table.near(name)}" for name in modules[:NAMED])
        return CheckpointError(
            f"{file}: {len(unknown):,} of {len(keys):,} tensors have names that no LoRA for {table.architecture} has: {named}"
            f"{' and others' if len(modules) > NAMED else ''}"
        )
    kind = recognise_keys(keys)
    if kind != LORA:
        no_pairs = "no LoRA file: it holds no pairs such as NAME.lora_down.weight and NAME.lora_up.weight"
        what = f"{with_article(kind)}, not a LoRA file" if kind else no_pairs
        return CheckpointError(f"{file} is {what}; choose a LoRA made for {table.architecture}")
    other = model_of_lora(keys)
    is_for = f"for {other}, not for {table.architecture}" if other else f"not for {table.architecture}"
    near = "" if other else table.near(module_name(unknown[0]))
    return CheckpointError(
        f"{file} is a LoRA {is_for} (its names are like {unknown[0]}{near}); choose one made for {table.architecture}"
    )


def is_part_of_adapter(key: str) -> bool:
    """Whether a tensor of this name is part of a LoRA or of another adapter, whatever model it is for."""
    return KEY.fullmatch(key) is not None or any(re.search(pattern, key) for pattern in OTHER_ADAPTERS.values())


def other_adapter(file: object, keys: Iterable[str]) -> str | None:
    """A problem, where the file holds LyCORIS' kinds of adapters; else None."""
    text = "\n".join(keys)
    kinds = [kind for kind, pattern in OTHER_ADAPTERS.items() if re.search(pattern, text, re.MULTILINE)]
    if not kinds:
        return None
    return (
        f"{file} is no plain LoRA but a {' and '.join(kinds)} file, which is neither read nor converted here; ComfyUI takes it "
        "as it is, and --network_module=lycoris.kohya trains it on"
    )


def is_for_another_model(unknown: Iterable[str], table: NameTable) -> bool:
    """Whether keys that the table does not know are those of another model, with which it may share its text encoders."""
    return model_of_lora(unknown) not in (None, table.architecture)


def model_of_lora(keys: Iterable[str]) -> str | None:
    """The model that a LoRA with these keys is for, of OTHER_MODELS; else None."""
    text = "\n".join(keys)
    return next((model for model, pattern in OTHER_MODELS.items() if re.search(pattern, text, re.MULTILINE)), None)
