"""Using a network module: import, creation, optimizer groups. The protocol is third-party modules' as well."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError, NetworkError, did_you_mean
from library.files.user_path import dead_link
from library.options.reference_table import as_dict
from library.training.base_weights import text_base_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.options.network import NetworkOptions
    from library.options.optimizer import OptimizerOptions

PIP_NAMES = {"lycoris": "lycoris-lora"}
KEEPS_ZEROS = ("networks", "lycoris")  # packages whose layers give zeros for zeros: what they add is a product, without a bias


def import_network_module(name: str) -> ModuleType:
    """Imports --network_module. Raises NetworkError naming the pip package or the nearest module."""
    scripts = str(Path(__file__).resolve().parents[2])
    if scripts not in sys.path:
        sys.path.append(scripts)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise NetworkError(f"--network_module {name} needs the package {error.name}: pip install {error.name}") from error
        own = [f"networks.{path.stem}" for path in (Path(scripts) / "networks").glob("lora_*.py")]
        package = name.split(".")[0]
        hint = did_you_mean(name, own) or f"; if it is a package of its own: pip install {PIP_NAMES.get(package, package)}"
        raise NetworkError(f"--network_module {name} cannot be found{hint}") from error
    if not hasattr(module, "create_network"):
        raise NetworkError(f"--network_module {name} is not a network module: it has no create_network; use networks.lora_anima")
    return module


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


def create_network(options: NetworkOptions, denoiser: nn.Module, text_encoders: Sequence[nn.Module], *, rates: Any = None) -> Any:
    """The network for this run, not yet applied. ``denoiser`` may still be on the meta device.

    ``rates``: an option group of learning rates of the denoiser's parts (ComponentRates), where the architecture has one.
    """
    module = import_network_module(options.network_module or "")
    arguments: dict[str, Any] = {**network_arguments(options.network_args)}
    if options.network_dropout is not None:
        arguments.setdefault("dropout", str(options.network_dropout))
    arguments |= component_rates(module, rates, arguments)
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
    """Merges each of --base_weights into the frozen models, in order, with its multiplier (1.0 where none is given).

    Without a denoiser, only the files that change text encoders. What is to be kept in 8 bits is rounded afterwards, once: until
    then it waits in ``dtype`` (see fp8_models.wait_for_merging).
    """
    from library.nn.fp8 import quantise

    encoders = list(text_encoders)
    models = encoders if denoiser is None else [denoiser, *encoders]
    for file, multiplier in text_base_weights(options) if denoiser is None else options.weights_to_merge:
        check_weights_file("--base_weights", file)
        module = import_network_module(options.network_module or "")
        device = next(models[0].parameters()).device
        network, weights = module.create_network_from_weights(multiplier, str(file), None, encoders, denoiser, for_inference=True)
        network.merge_to(encoders, denoiser, weights, dtype, device)
    for model in models:
        quantise(model)


def check_weights_file(flag: str, file: str | Path | None) -> None:
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


def optimizer_groups(network: Any, options: OptimizerOptions) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups and their descriptions (the names of logged learning rates), asked in the protocol's order."""
    text_lr: Any = options.text_encoder_lr
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
