"""LoRA files for drawing, merged into models or beside their weights: which of their modules, how strongly, and with the LyCORIS
package where asked.

First everything is read and compared with models that have no weights yet, so that a file that does not fit shows at once; then
each model gets its share when it is loaded.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.errors import NetworkError
from networks.layer import LoRAModule
from networks.lora import original_paths
from networks.weights_file import by_module, read_lora_file

logger = logging.getLogger(__name__)

LYCORIS_MODULE, LYCORIS_PACKAGE = "lycoris.kohya", "lycoris-lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePatterns:
    """Regexes, found anywhere in a module's name in the file or in its path in the model. ``include`` empty = every module."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, include: Sequence[str] | None, exclude: Sequence[str] | None) -> ModulePatterns:
        return cls(include=tuple(include or ()), exclude=tuple(exclude or ()))

    def allows(self, *names: str) -> bool:
        return (not self.include or any(_fits(p, names) for p in self.include)) and not any(_fits(p, names) for p in self.exclude)

    def idle(self, modules: Sequence[tuple[str, ...]]) -> list[str]:
        """The patterns that fit none of ``modules``, each as flag and regex."""
        named = [("--include_patterns", p) for p in self.include] + [("--exclude_patterns", p) for p in self.exclude]
        return [f"{flag} {pattern}" for flag, pattern in named if not any(_fits(pattern, names) for names in modules)]


def _fits(pattern: str, names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


class MergedFile(Protocol):
    """One file, ready to be merged. ``modules``: of each its name in the file and, where known, its path in the model."""

    @property
    def modules(self) -> list[tuple[str, ...]]: ...

    def merge(self, models: Sequence[nn.Module], device: torch.device, patterns: ModulePatterns) -> int:
        """Adds the file's modules of ``models``, which are loaded, to their weights; -> how many."""


@dataclass(slots=True)
class FileMerges:
    """All files of a run, in their order."""

    files: Sequence[MergedFile]
    patterns: ModulePatterns = field(default_factory=ModulePatterns)

    def check(self) -> None:
        """Raises NetworkError for patterns that fit nothing, and where they leave nothing of all files."""
        modules = [names for file in self.files for names in file.modules]
        problems = [f"{idle} fits no module of the LoRA files (they have {_examples(modules)})"
                    for idle in self.patterns.idle(modules)]  # fmt: skip
        if self.files and not problems and not any(self.patterns.allows(*names) for names in modules):
            problems = ["--include_patterns and --exclude_patterns leave no module of the LoRA files: change them"]
        if problems:
            raise NetworkError(*problems)

    def into(self, models: Sequence[nn.Module], device: torch.device) -> int:
        """Merges each file's share of ``models``, computed on ``device``; -> the modules merged."""
        return sum(file.merge(models, device, self.patterns) for file in self.files)

    def beside(self, models: Sequence[nn.Module], device: torch.device) -> int:
        """Puts each file's share of ``models`` beside their weights, on ``device``; -> the modules. ``set_strengths`` acts."""
        return sum(file.put_beside(models, device, self.patterns) for file in self._own_files)

    def names(self) -> list[list[str]]:
        """Of each file those of its tensors, under our names, also where the models lack the modules."""
        return [list(file.weights) for file in self._own_files]

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One for each file, of what is beside the weights."""
        for file, strength in zip(self._own_files, strengths, strict=True):
            file.network.set_multiplier(strength)

    @property
    def _own_files(self) -> list[OwnFile]:
        own = [file for file in self.files if isinstance(file, OwnFile)]
        assert len(own) == len(self.files), "files that LyCORIS reads are merged"
        return own


def _examples(modules: Sequence[tuple[str, ...]]) -> str:
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return ", ".join(names[-1] for names in modules[:3]) + more


class OwnFile:
    """A LoRA file as the network module of this project reads it."""

    def __init__(
        self, module: ModuleType, file: str, multiplier: float, *, text_encoders: Sequence[nn.Module], denoiser: nn.Module
    ):
        """The models may be on the meta device. Raises NetworkError or CheckpointError for a file that does not fit."""
        network, self.weights = module.create_network_from_weights(
            multiplier, file, None, list(text_encoders), denoiser, for_inference=True
        )
        self.network: Any = network
        paths = {id(layer): path for model in (*text_encoders, denoiser) for path, layer in model.named_modules()}
        self.paths = {lora.lora_name: paths[id(lora.org_module_ref[0])] for lora in network.loras}

    @property
    def modules(self) -> list[tuple[str, ...]]:
        return list(self.paths.items())

    def merge(self, models: Sequence[nn.Module], device: torch.device, patterns: ModulePatterns) -> int:
        chosen = {lora.lora_name for lora in self._share(models, patterns)}
        weights = {key: value for key, value in self.weights.items() if key.partition(".")[0] in chosen}
        self.network.merge_to(None, None, weights, None, device)
        return len(chosen)

    def put_beside(self, models: Sequence[nn.Module], device: torch.device, patterns: ModulePatterns) -> int:
        """The file's modules of ``models`` act beside their weights, as while training; -> how many."""
        share, weights = self._share(models, patterns), by_module(self.weights)
        for lora in share:
            lora.load_pair(weights[lora.lora_name])
            lora.requires_grad_(False).eval().to(device)
            lora.apply_to()
        return len(share)

    def _share(self, models: Sequence[nn.Module], patterns: ModulePatterns) -> list[LoRAModule]:
        layers = {id(layer) for model in models for layer in model.modules()}
        return [
            lora
            for lora in self.network.loras
            if id(lora.org_module_ref[0]) in layers and patterns.allows(lora.lora_name, self.paths[lora.lora_name])
        ]


class LycorisFile:
    """A LoRA file of any kind that the LyCORIS package knows."""

    def __init__(
        self, package: ModuleType, file: str, multiplier: float, *, text_encoders: Sequence[nn.Module], denoiser: nn.Module
    ):
        """Raises NetworkError where no module of the file has a place in the models."""
        self.package, self.file, self.multiplier = package, file, multiplier
        self.weights = _by_name(read_lora_file(Path(file)))
        self.models = self._by_prefix(text_encoders, denoiser)
        others = original_paths(denoiser)
        places = {f"{prefix}_{path.replace('.', '_')}": (prefix, module)
                  for prefix, model in self.models.items() for module, _ in model.named_modules()
                  for path in (module, *([others[module]] if model is denoiser and module in others else ()))}  # fmt: skip
        self.places = {name: places[name] for name in self.weights if name in places}
        if not self.places:
            raise NetworkError(f"{file} has no module for this model (it has {', '.join(list(self.weights)[:3])}): give a file "
                               "that was made for it")  # fmt: skip
        if homeless := [name for name in self.weights if name not in places]:
            logger.warning("%s: %d modules have no place in this model: left out", file, len(homeless))

    def _by_prefix(self, text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> dict[str, nn.Module]:
        """The models by what the names of their modules begin with in a file."""
        kind = self.package.LycorisNetworkKohya
        numbers = [""] if len(text_encoders) == 1 else [str(place + 1) for place in range(len(text_encoders))]
        texts = {f"{kind.LORA_PREFIX_TEXT_ENCODER}{number}": model for number, model in zip(numbers, text_encoders, strict=True)}
        return {**texts, kind.LORA_PREFIX_UNET: denoiser}

    @property
    def modules(self) -> list[tuple[str, ...]]:
        return [(name, path) for name, (_, path) in self.places.items()]

    def merge(self, models: Sequence[nn.Module], device: torch.device, patterns: ModulePatterns) -> int:
        merged = 0
        for prefix, model in self.models.items():
            if not any(model is given for given in models):
                continue
            names = [name for name, (place, path) in self.places.items() if place == prefix and patterns.allows(name, path)]
            merged += self._merge_names(model, prefix, names) if names else 0
        return merged

    def _merge_names(self, model: nn.Module, prefix: str, names: Sequence[str]) -> int:
        kind = self.package.LycorisNetworkKohya
        is_denoiser = prefix == kind.LORA_PREFIX_UNET
        own = kind.LORA_PREFIX_UNET if is_denoiser else kind.LORA_PREFIX_TEXT_ENCODER  # which the package gives a lone encoder
        paths = {f"{own}_{self.places[name][1].replace('.', '_')}": self.places[name][1] for name in names}
        weights = {own_name + key[len(name) :]: tensor
                   for own_name, name in zip(paths, names, strict=True)
                   for key, tensor in self.weights[name].items()}  # fmt: skip
        layers = bare_tree(model, paths.values())
        network, _ = self.package.create_network_from_weights(
            self.multiplier, self.file, None, None if is_denoiser else layers, layers if is_denoiser else nn.Identity(),
            weights_sd=weights, for_inference=True,
        )  # fmt: skip
        loras = [*network.text_encoder_loras, *network.unet_loras]
        for lora in loras:  # one by one: the package's own merge_to() leaves the strength out
            lora.to(model.get_submodule(paths[lora.lora_name]).weight.device)
            lora.merge_to(self.multiplier)
        return len(loras)


def bare_tree(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """The model's modules of these paths, in places without a class of their own: by classes the package would look for more to
    adapt than the file has."""
    tree = nn.Module()
    for path in paths:
        *parents, last = path.split(".")
        place = tree
        for name in parents:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, model.get_submodule(path))
    return tree


def _by_name(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found.setdefault(key.partition(".")[0], {})[key] = tensor
    return found


def lycoris_package() -> ModuleType:
    """Raises NetworkError that names the package to install."""
    try:
        return importlib.import_module(LYCORIS_MODULE)
    except ImportError as error:
        raise NetworkError(f"--lycoris needs the package {LYCORIS_PACKAGE} ({error}): pip install {LYCORIS_PACKAGE}") from error


def merges_of(loras: Any, module: ModuleType, *, text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> FileMerges:
    """``planned_merges`` of what an inference script's options ``loras`` say."""
    return planned_merges(
        module,
        loras.files,
        text_encoders=text_encoders,
        denoiser=denoiser,
        patterns=ModulePatterns.of(loras.include_patterns, loras.exclude_patterns),
        lycoris=loras.lycoris,
    )


def planned_merges(
    module: ModuleType,
    files: Sequence[tuple[str, float]],
    *,
    text_encoders: Sequence[nn.Module],
    denoiser: nn.Module,
    patterns: ModulePatterns,
    lycoris: bool = False,
) -> FileMerges:
    """What merging ``files`` (path, multiplier) takes; the models may be on the meta device. Raises one NetworkError or
    CheckpointError for the first file that does not fit, and for patterns that fit nothing."""
    kind, reader = (LycorisFile, lycoris_package()) if lycoris and files else (OwnFile, module)
    merges = FileMerges(list(_planned(kind, reader, files, text_encoders, denoiser)), patterns)
    merges.check()
    return merges


def _planned(
    kind: type[OwnFile] | type[LycorisFile], reader: ModuleType, files: Sequence[tuple[str, float]],
    text_encoders: Sequence[nn.Module], denoiser: nn.Module,
) -> Iterator[MergedFile]:  # fmt: skip
    for file, multiplier in files:
        yield kind(reader, file, multiplier, text_encoders=text_encoders, denoiser=denoiser)
