"""What of a network is trained, and at which rates, read off its modules and optimizer groups: for the plan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from library.errors import NetworkError

TEXT_ENCODER_NUMBER = re.compile(r"[a-z]+_te(\d*)_")  # in the names that LoRA and LyCORIS modules have
SHOWN = 3  # rates that are listed one by one
Rates = tuple[float, ...]  # of one module's weights, without repetition; empty: none of them is trained


def trained_line(
    network: Any,
    groups: tuple[Sequence[Mapping[str, Any]], Sequence[str]],
    options: Any,
    absent: Mapping[int, str] = MappingProxyType({}),
) -> str:
    """What is trained, module by module counted, at which learning rates; why a part has none.

    ``groups``: networks.optimizer_groups(); ``options``: an architecture's option groups. Of a network that does not list its
    modules as the protocol's usual ones do, the groups are told. ``absent``: why text encoders of these numbers, from 1, are not
    there at all.
    """
    default = options.optimizer.learning_rate
    if not hasattr(network, "unet_loras") or not hasattr(network, "text_encoder_loras"):
        told = [
            f"{name}: {len(group['params'])} tensors at {group.get('lr', default):g}"
            for group, name in zip(*groups, strict=False)
        ]
        return f"  trained: {'; '.join(told)}"
    rates = {id(weight): group.get("lr", default) for group in groups[0] for weight in group["params"]}
    parts = {"denoiser": list(network.unet_loras), **_text_parts(network.text_encoder_loras, options.TEXT_ENCODERS)}
    missing = {f"text encoder {number}": f" ({why})" for number, why in absent.items()}
    words = {name: _told(loras, rates, missing.get(name) or _reason(name, options)) for name, loras in parts.items()}
    if options.network.network_train_unet_only and options.TEXT_ENCODERS > 1:
        words = {"denoiser": words["denoiser"], "text encoders": f"none{_reason('text encoders', options)}"}
    return f"  trained: {'; '.join(f'{name}: {said}' for name, said in words.items())}"


def check_denoiser_is_there(network: Any, options: Any) -> None:
    """Raises NetworkError for a network without modules of the denoiser, where that is to be trained. Called when it is applied.

    Of networks that do not list their modules that is not known.
    """
    if not options.trains_denoiser or not hasattr(network, "unet_loras") or len(network.unet_loras):
        return
    module, file = options.network.network_module, options.network.network_weights
    why = f"{file} has none" if options.network.dim_from_weights else f"--network_module {module} made none"
    raise NetworkError(
        f"the denoiser is to be trained, but the network has no module of it: {why}; give "
        f"--network_module={options.NETWORK_MODULE} and arguments that leave some, or train the text encoder alone with "
        "--network_train_text_encoder_only"
    )


def _text_parts(loras: Iterable[Any], count: int) -> dict[str, list[Any]]:
    """{"text encoder 1": its modules, ...}; a model's only one has no number."""
    names = ["text encoder"] if count == 1 else [f"text encoder {number}" for number in range(1, count + 1)]
    parts: dict[str, list[Any]] = {name: [] for name in names}
    for lora in loras:
        match = TEXT_ENCODER_NUMBER.match(str(getattr(lora, "lora_name", "")))
        number = int(match[1]) if match and match[1] else 1
        parts[names[min(number, count) - 1]].append(lora)
    return parts


def _told(loras: Sequence[Any], rates: Mapping[int, float], reason: str) -> str:
    """``"192 modules at 0.0001"``, ``"none (its outputs are cached)"``; ``reason``: why there is none, where there is."""
    if not loras:
        return f"none{reason}"
    found = Counter(_rates_of(lora, rates) for lora in loras)
    if len(found) == 1:
        return f"{_modules(len(loras))} {_at(next(iter(found)))}"
    if len(found) <= SHOWN:
        return (
            f"{_modules(len(loras))} ({', '.join(f'{count} {_at(own)}' for own, count in sorted(found.items(), reverse=True))})"
        )
    return f"{_modules(len(loras))} {', '.join(_ranges(found))}"


def _ranges(found: Counter[Rates]) -> Iterator[str]:
    every = sorted({rate for own in found for rate in own})
    yield f"at {len(every)} rates from {every[0]:g} to {every[-1]:g}"
    if () in found:
        yield f"{found[()]} of them not trained"


def _rates_of(lora: Any, rates: Mapping[int, float]) -> Rates:
    """In the order of its weights, lora_down before lora_up."""
    return tuple(dict.fromkeys(rate for weight in lora.parameters() if (rate := rates.get(id(weight)))))


def _at(rates: Rates) -> str:
    if not rates:
        return "not trained"
    first, *others = (f"{rate:g}" for rate in rates)
    return f"at {first}" + (f" (lora_up at {' and '.join(others)})" if others else "")


def _modules(count: int) -> str:
    return f"{count} module{'s' if count != 1 else ''}"


def _reason(part: str, options: Any) -> str:
    if part == "denoiser":
        return " (--network_train_text_encoder_only)" if not options.network.trains_denoiser else " (its learning rate is 0)"
    if not options.network.trains_text_encoder:
        return " (--network_train_unet_only)"
    number = int(part.rpartition(" ")[2]) if part[-1].isdigit() else 1
    if not options.text_rates[number - 1]:
        return f" ({options.not_trained_because(number)})"
    return " (--network_weights has none of its modules)" if options.network.dim_from_weights else ""
