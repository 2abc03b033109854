"""Using a network module: import, creation, optimizer groups. The protocol is third-party modules' as well."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError, NetworkError, NoModuleFits, ProblemList, did_you_mean
from library.files.user_path import dead_link
from library.options.reference_table import as_dict
from library.training.models.base_weights import changes_denoiser, text_base_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.options.network import NetworkOptions
    from library.options.optimizer import OptimizerOptions

SCRIPTS = str(Path(__file__).resolve().parents[3])  # the folder that own modules are found in
OWN_PACKAGE = "networks"
PIP_NAMES = {"lycoris": "lycoris-lora"}
KEEPS_ZEROS = ("networks", "lycoris")  # packages whose layers give zeros for zeros: what they add is a product, without a bias


def import_network_module(name: str) -> ModuleType:
    """Imports --network_module. Raises NetworkError naming the pip package or the nearest module."""
    find_network_module(name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise NetworkError(f"--network_module {name} needs the package {error.name}: pip install {error.name}") from error
        raise NetworkError(f"--network_module {name} cannot be found{_other_modules(name)}") from error
    if not hasattr(module, "create_network"):
        raise _no_network_module(name)
    return module


def find_network_module(name: str) -> None:
    """Raises NetworkError for a module that is not there, as far as that shows without importing it (and torch with it).

    Of other people's packages that is whether the package is there; this project's modules are looked at one by one.
    """
    if SCRIPTS not in sys.path:
        sys.path.append(SCRIPTS)
    package, _, rest = name.partition(".")
    if package == OWN_PACKAGE:
        file = Path(SCRIPTS, OWN_PACKAGE, *rest.split(".")).with_suffix(".py")
        if not rest or not file.is_file():
            raise NetworkError(f"--network_module {name} cannot be found{_other_modules(name)}")
        if not _makes_networks(file):
            raise _no_network_module(name)
    elif package not in sys.modules and (not package or importlib.util.find_spec(package) is None):
        raise NetworkError(f"--network_module {name} cannot be found{_other_modules(name)}")


def own_network_modules() -> list[str]:
    files = sorted(Path(SCRIPTS, OWN_PACKAGE).glob("*.py"))
    return [f"{OWN_PACKAGE}.{file.stem}" for file in files if _makes_networks(file)]


def _makes_networks(file: Path) -> bool:
    return re.search(r"^def create_network\(", file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _other_modules(name: str) -> str:
    package, own = name.split(".")[0], own_network_modules()
    if near := did_you_mean(name, own):
        return near
    if package == OWN_PACKAGE:
        return f"; the network modules of this project are {', '.join(own)}"
    return f"; if it is a package of its own: pip install {PIP_NAMES.get(package, package)}"


def _no_network_module(name: str) -> NetworkError:
    return NetworkError(
        f"--network_module {name} is not a network module: it has no create_network; use {' or '.join(own_network_modules())}"
    )


def network_arguments(pairs: Sequence[str] | None) -> dict[str, str]:
    """--network_args ["key=value", ...] -> {key: value}; values stay text."""
    wrong = [pair for pair in pairs or () if "=" not in pair]
    if wrong:
        raise NetworkError(*(f"--network_args {pair}: write it as key=value" for pair in wrong))
    return {key.strip(): value.strip() for key, value in (pair.split("=", 1) for pair in pairs or ())}


def keeps_zeros(network_module: str | None) -> bool:
    """Whether adapted layers without a bias still give zeros for zeros. Of other people's modules that is not known."""
    return (network_module or "").split(".")[0] in KEEPS_ZEROS


def prepare_network(network: Any, options: Any) -> None:
    """The protocol's optional call with all options as plain attributes, as third-party modules expect them."""
    if hasattr(network, "prepare_network"):
        network.prepare_network(SimpleNamespace(**as_dict(options)))


@contextmanager
def before_weights(network_module: str | None) -> Iterator[None]:
    """Around what is done with a network before the model's weights are loaded. Raises NetworkError for one that reads them."""
    try:
        yield
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
        raise NetworkError(
            f"--network_module {network_module}: what --network_args asks for reads the model's weights when the network is "
            "made, which is before they are loaded: choose another kind of network (of lycoris.kohya: lora, loha, lokr or ia3, "
            "without dora_wd)"
        ) from error


def with_gaps(module_name: str, encoders: Sequence[nn.Module], rates: Sequence[float]) -> list[nn.Module | None]:
    """The text encoders for create_network. Modules of this project get None for one that has the rate 0, so that it gets no
    LoRA and the others keep their numbers, and for one that does not run; what others make of a gap is not known.

    ``rates``: one for each encoder of the model; the last ``encoders`` may be missing.
    """
    if module_name.split(".")[0] != OWN_PACKAGE:
        return list(encoders)
    return [encoder if rate else None for encoder, rate in zip_longest(encoders, rates)]


def create_network(
    options: NetworkOptions,
    denoiser: nn.Module,
    text_encoders: Sequence[nn.Module | None],
    *,
    rates: Any = None,
    others_are_trained: bool = True,
) -> Any:
    """The network for this run, not yet applied. ``denoiser`` may still be on the meta device.

    ``rates``: an option group of learning rates of the denoiser's parts (ComponentRates), where the architecture has one.
    ``others_are_trained``: whether parts without such a rate have one above 0; else they get no modules.
    """
    module = import_network_module(options.network_module or "")
    arguments: dict[str, Any] = {**network_arguments(options.network_args)}
    if options.network_dropout is not None:
        arguments.setdefault("dropout", str(options.network_dropout))
    given = component_rates(module, rates, arguments)
    idle = {} if others_are_trained else dict.fromkeys(getattr(module, "COMPONENT_RATES", ()), 0.0)
    arguments |= {**idle, **given} if any(given.values()) or "network_reg_lrs" in arguments else given
    encoders = list(text_encoders)
    if options.dim_from_weights:
        check_weights_file("--network_weights", options.network_weights)
        return module.create_network_from_weights(1.0, str(options.network_weights), None, encoders, denoiser, **arguments)[0]
    network = module.create_network(
        1.0,
        options.network_dim,
        options.network_alpha,
        None,
        encoders,
        denoiser,
        neuron_dropout=options.network_dropout,
        **arguments,
    )
    if network is None:
        raise NetworkError(f"--network_module {options.network_module} made no network for this model")
    return network


def component_rates(module: ModuleType, rates: Any, arguments: Collection[str]) -> dict[str, float]:
    """The learning rates of ``rates`` that are given, as arguments for ``module`` besides those of --network_args.

    Raises NetworkError for a module that does not know them: other packages ignore what they do not know.
    """
    known = getattr(module, "COMPONENT_RATES", ())
    named = {} if rates is None else {option.name: getattr(rates, option.name) for option in fields(rates)}
    given = {name: rate for name, rate in named.items() if rate is not None}
    problems = [f"--network_args: {name} is a flag of its own: write --{name}=..." for name in arguments if name in known]
    if unknown := [f"--{name}" for name in given if name not in known]:
        problems.append(
            f"{', '.join(unknown)}: the network module {module.__name__} knows no learning rates of the model's parts; they work "
            "with networks.lora_anima: drop the flag, or use that module"
        )
    if problems:
        raise NetworkError(*problems)
    return given


def merge_base_weights(
    options: NetworkOptions, denoiser: nn.Module | None, text_encoders: Sequence[nn.Module], dtype: torch.dtype
) -> None:
    """Merges each of --base_weights into the frozen models, in order, with its multiplier (1.0 where none is given). A file for
    other parts of the model, whose outputs are cached, is left out.

    Without a denoiser, only the files that change text encoders. What is to be kept in 8 bits is rounded afterwards, once: until
    then it waits in ``dtype`` (see fp8_models.wait_for_merging).
    """
    from library.nn.fp8 import quantise

    encoders = list(text_encoders)
    models = encoders if denoiser is None else [denoiser, *encoders]
    for file, multiplier in text_base_weights(options) if denoiser is None else options.weights_to_merge:
        check_weights_file("--base_weights", file)
        if not encoders and not changes_denoiser(Path(file)):
            continue  # it is in the cached texts
        module = import_network_module(options.network_module or "")
        device = next(models[0].parameters()).device
        try:
            network, weights = module.create_network_from_weights(
                multiplier, str(file), None, encoders, denoiser, for_inference=True
            )
        except NoModuleFits:
            continue  # check_base_weights() has seen that it fits a model that is not here: one whose outputs are cached
        network.merge_to(encoders, denoiser, weights, dtype, device)
    for model in models:
        quantise(model)


def check_base_weights(options: NetworkOptions, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
    """Compares each of --base_weights with models that may be on the meta device; raises one error for all that do not fit.

    Only where the network module is one of this project: others may need the models' weights to make a network from a file.
    """
    if not options.base_weights or (options.network_module or "").split(".")[0] != OWN_PACKAGE:
        return
    module = import_network_module(options.network_module or "")
    problems = ProblemList()
    with _warnings_only():  # the rest is told when they are merged
        for file, multiplier in options.weights_to_merge:
            with problems.collect():
                check_weights_file("--base_weights", file)
                module.create_network_from_weights(multiplier, str(file), None, list(text_encoders), denoiser, for_inference=True)
    problems.raise_if_any()


@contextmanager
def _warnings_only() -> Iterator[None]:
    """Of this project's network modules."""
    logger = logging.getLogger(OWN_PACKAGE)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_weights_file(flag: str, file: str | Path | None) -> None:
    if file is not None and Path(file).is_dir():
        inside = sorted(path.name for path in Path(file).iterdir() if path.suffix == ".safetensors")
        named = f" (it has {', '.join(inside[:3])}{' and others' if len(inside) > 3 else ''})" if inside else ""
        raise CheckpointError(f"{flag} {file} is a folder: give the file in it{named}")
    if file is None or not Path(file).is_file():
        folder = Path(file).parent if file is not None else None
        near = [path.name for path in folder.iterdir()] if folder is not None and folder.is_dir() else []
        link = dead_link(Path(str(file)))
        hint = f": {link}" if link else did_you_mean(Path(str(file)).name, near)
        raise CheckpointError(f"{flag} {file}: there is no such file{hint}")


def load_network_weights(network: Any, file: str | Path) -> str:
    """--network_weights: starts from an existing file; returns a line about it."""
    check_weights_file("--network_weights", file)
    info = network.load_weights(str(file))
    return f"network weights loaded from {file}: {info}"


def optimizer_groups(
    network: Any, options: OptimizerOptions, text_lr: Sequence[float] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups and their descriptions (the names of logged learning rates), asked in the protocol's order.

    ``text_lr``: what is said of the text encoders' rates, None where nothing is.
    """
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        result = network.prepare_optimizer_params_with_multiple_te_lrs(text_lr, options.unet_lr, options.learning_rate)
    else:
        first = text_lr[0] if text_lr else None
        try:
            result = network.prepare_optimizer_params(first, options.unet_lr, options.learning_rate)
        except TypeError:  # older modules know no default learning rate
            result = network.prepare_optimizer_params(first, options.unet_lr)
    groups, descriptions = result if isinstance(result, tuple) else (result, None)
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise NetworkError(
            "nothing would be trained: every learning rate is 0 or no module was selected; check --unet_lr and --network_args"
        )
    return groups, list(descriptions or [f"group{index}" for index in range(len(groups))])
