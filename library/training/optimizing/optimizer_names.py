"""Which optimizer the options mean, and whether it can be had. Torch-free: a typo is told before anything heavy is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.errors import OptionError, did_you_mean
from library.training.optimizing.literal_arguments import class_place, parse_literals

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions
    from library.options.train import TrainOptions

ARGS_FLAG = "--optimizer_args"
OptimizerKind = Literal["plain", "schedule_free", "adafactor_relative"]

# How people install a package whose import name differs from its name in pip.
PIP_NAMES = {"lion_pytorch": "lion-pytorch"}
FINDS_STEP_SIZE = ("dadaptation", "prodigyopt")  # packages whose optimizers scale one learning rate themselves
LEAST_RATE = 0.1  # that such an optimizer is given by somebody who knows it
# These cannot train a LoRA: their step() needs more than gradients.
UNUSABLE = {"LBFGS": "needs several losses in one step", "SparseAdam": "needs sparse gradients"}


@dataclass(frozen=True, slots=True)
class OptimizerSource:
    """A class to import, the arguments it gets unless --optimizer_args says otherwise, and those it always gets (``fixed``)."""

    module: str
    class_name: str
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.module}.{self.class_name}"

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


_MOMENTUM = {"momentum": 0.9}
_NESTEROV = {"nesterov": True}

# Names that are taken in any case -> class.
NAMED_OPTIMIZERS: dict[str, OptimizerSource] = {
    "AdamW": OptimizerSource("torch.optim", "AdamW"),
    "SGDNesterov": OptimizerSource("torch.optim", "SGD", _MOMENTUM, _NESTEROV),
    "Lion": OptimizerSource("lion_pytorch", "Lion"),
    "AdamW8bit": OptimizerSource("bitsandbytes.optim", "AdamW8bit"),
    "SGDNesterov8bit": OptimizerSource("bitsandbytes.optim", "SGD8bit", _MOMENTUM, _NESTEROV),
    "Lion8bit": OptimizerSource("bitsandbytes.optim", "Lion8bit"),
    "PagedAdamW8bit": OptimizerSource("bitsandbytes.optim", "PagedAdamW8bit"),
    "PagedLion8bit": OptimizerSource("bitsandbytes.optim", "PagedLion8bit"),
    "PagedAdamW": OptimizerSource("bitsandbytes.optim", "PagedAdamW"),
    "PagedAdamW32bit": OptimizerSource("bitsandbytes.optim", "PagedAdamW32bit"),
    "DAdaptation": OptimizerSource("dadaptation.experimental", "DAdaptAdamPreprint"),
    "DAdaptAdamPreprint": OptimizerSource("dadaptation.experimental", "DAdaptAdamPreprint"),
    "DAdaptAdaGrad": OptimizerSource("dadaptation", "DAdaptAdaGrad"),
    "DAdaptAdam": OptimizerSource("dadaptation", "DAdaptAdam"),
    "DAdaptAdan": OptimizerSource("dadaptation", "DAdaptAdan"),
    "DAdaptAdanIP": OptimizerSource("dadaptation.experimental", "DAdaptAdanIP"),
    "DAdaptLion": OptimizerSource("dadaptation", "DAdaptLion"),
    "DAdaptSGD": OptimizerSource("dadaptation", "DAdaptSGD"),
    "Prodigy": OptimizerSource("prodigyopt", "Prodigy"),
    "Adafactor": OptimizerSource("transformers.optimization", "Adafactor"),
    "RAdamScheduleFree": OptimizerSource("schedulefree", "RAdamScheduleFree"),
    "AdamWScheduleFree": OptimizerSource("schedulefree", "AdamWScheduleFree"),
    "SGDScheduleFree": OptimizerSource("schedulefree", "SGDScheduleFree"),
}
_BY_LOWER_CASE = {name.lower(): source for name, source in NAMED_OPTIMIZERS.items()}


def optimizer_problems(options: OptimizerOptions) -> list[str]:
    """What is wrong with the optimizer's name and arguments, as far as it shows without importing its package."""
    problems: list[str] = []
    try:
        source = optimizer_source(options)
        problems += _package_problems(source)
    except OptionError as error:
        problems += error.problems
    try:
        parse_literals(options.optimizer_args, flag=ARGS_FLAG)
    except OptionError as error:
        problems += error.problems
    return problems


def optimizer_source(options: OptimizerOptions) -> OptimizerSource:
    """The class that the options name. Raises OptionError for an unknown name."""
    name = chosen_name(options)
    known = _BY_LOWER_CASE.get(name.lower())
    if known is not None:
        return known
    if "." in name:
        source = OptimizerSource(*class_place(name))
        if source.module != "torch.optim":
            return source
        name = source.class_name
    torch_names = torch_optimizer_names()
    if torch_names and name not in torch_names:
        candidates = [*NAMED_OPTIMIZERS, *torch_names]
        hint = _same_letters(name, candidates) or did_you_mean(name, candidates)
        raise OptionError(
            f"--optimizer_type {name} is not known{hint}: use one of "
            f"{', '.join(NAMED_OPTIMIZERS)}, a class of torch.optim, or module.Class"
        )
    if name in UNUSABLE:
        raise OptionError(
            f"--optimizer_type {name} {UNUSABLE[name]}, which LoRA training does not give: use AdamW or another one"
        )
    return OptimizerSource("torch.optim", name)


def chosen_name(options: OptimizerOptions) -> str:
    """As the options name it."""
    legacy = {"AdamW8bit": options.use_8bit_adam, "Lion": options.use_lion_optimizer}
    return next((name for name, is_set in legacy.items() if is_set), options.optimizer_type or "AdamW")


def optimizer_arguments(options: OptimizerOptions) -> dict[str, Any]:
    """Keyword arguments of the class besides the learning rate: --optimizer_args over the defaults of the name."""
    source = optimizer_source(options)
    given = parse_literals(options.optimizer_args, flag=ARGS_FLAG)
    arguments = {**source.defaults, **given, **source.fixed}
    if _is_adafactor(source):
        relative = arguments.get("relative_step", True) or arguments.get("warmup_init", False)  # warm-up needs its own steps
        arguments["relative_step"] = bool(relative)
    return arguments


def optimizer_kind(options: OptimizerOptions) -> OptimizerKind:
    """What the learning-rate schedule must know: ``schedule_free`` and ``adafactor_relative`` optimizers bring their own."""
    source = optimizer_source(options)
    if source.class_name.lower().endswith("schedulefree"):
        return "schedule_free"
    if _is_adafactor(source) and optimizer_arguments(options)["relative_step"]:
        return "adafactor_relative"
    return "plain"


def used_rates(options: TrainOptions) -> list[float]:
    """The learning rates above 0 that flags give what is trained, as far as these say: network arguments may give others."""
    parts = getattr(options, "rates", None)  # of the denoiser, where the architecture has such flags
    own = [getattr(parts, item.name) for item in fields(parts)] if parts is not None else []
    denoiser = [options.denoiser_rate, *own] if options.trains_denoiser else []
    return sorted({rate for rate in (*denoiser, *options.text_rates) if rate})


def rate_problems(options: TrainOptions) -> Iterator[str]:
    """Of optimizers that find one step size for all weights. An unknown optimizer is told by optimizer_problems."""
    try:
        source = optimizer_source(options.optimizer)
    except OptionError:
        return
    yield from one_rate_problems(source, used_rates(options))


def one_rate_problems(source: OptimizerSource, rates: Collection[float]) -> Iterator[str]:
    """``rates``: the different ones above 0."""
    if source.package in FINDS_STEP_SIZE and len(rates) > 1:
        yield (
            f"{source.class_name} finds one step size for all weights, but they have the learning rates "
            f"{' and '.join(f'{rate:g}' for rate in sorted(rates))}: give all the same, or leave out --unet_lr, "
            "--text_encoder_lr and what else sets learning rates"
        )


def optimizer_notices(options: OptimizerOptions, rates: Collection[float]) -> list[str]:
    """What the user should know about a valid choice; lines for the plan. ``rates``: used_rates()."""
    source = optimizer_source(options)
    if optimizer_kind(options) == "adafactor_relative":
        return [
            "Adafactor sets its own learning rate (relative_step=True): --learning_rate, --unet_lr and --text_encoder_lr do not "
            "change the training; add --optimizer_args relative_step=False to use them"
        ]
    if source.package in FINDS_STEP_SIZE and any(rate < LEAST_RATE for rate in rates):
        low = " and ".join(f"{rate:g}" for rate in sorted(rates) if rate < LEAST_RATE)
        return [f"{source.class_name} finds its own step size and expects the learning rate 1.0; it is {low}"]
    return []


def torch_optimizer_names() -> tuple[str, ...]:
    """Optimizer classes of the installed torch, read off its source without importing it; empty when that is not possible."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            tree = ast.parse((Path(folder) / "optim" / "__init__.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        names = {alias.asname or alias.name for node in imports for alias in node.names}
        return tuple(sorted(name for name in names if name[0].isupper() and name != "Optimizer"))
    return ()


def pip_command(package: str) -> str:
    return f"pip install {PIP_NAMES.get(package, package)}"


def _is_adafactor(source: OptimizerSource) -> bool:
    return source.package == "transformers" and source.class_name == "Adafactor"


def _package_problems(source: OptimizerSource) -> Iterator[str]:
    if not source.package.isidentifier() or importlib.util.find_spec(source.package) is None:
        yield missing_package(source)


def missing_package(source: OptimizerSource) -> str:
    hint = (
        f"install it with: {pip_command(source.package)}"
        if source in NAMED_OPTIMIZERS.values()
        else "check its spelling, or install it"
    )
    return f"--optimizer_type {source.path} needs the package {source.package}, which is not installed: {hint}"


def _same_letters(name: str, candidates: list[str]) -> str:
    match = next((candidate for candidate in candidates if candidate.lower() == name.lower()), None)
    return f" (did you mean {match}?)" if match else ""
