"""Which modules of a model get a LoRA, with which name, rank, alpha and learning rate.

An architecture states its rules as data (:class:`ModelRules`); the user's patterns bend them. Only names and types of modules are
looked at, never their weights, so a model on the meta device does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from library.errors import NetworkError
from networks.arguments import NetworkArguments

Layer = nn.Linear | nn.Conv2d  # what can have a LoRA
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"  # a module's tensors in a LoRA file, after its name and a dot
COMPILED = "_orig_mod."  # torch.compile puts this level into the paths of what it wraps
SHOWN = 3  # names that a message gives as examples


@dataclass(frozen=True, kw_only=True)
class ModelRules:
    """Which modules of one model may get a LoRA, and what they are called.

    ``candidates`` matches a module's whole dotted path; its first group is the path that names and the user's patterns go by.
    """

    prefix: str  # of the names in a file: lora_unet, lora_te
    label: str  # of the optimizer groups: "unet", "textencoder 1"
    candidates: str
    excludes: tuple[str, ...] = ()  # default exclusions; the user's include_patterns re-admit
    kinds: tuple[type[nn.Linear] | type[nn.Conv2d], ...] = (nn.Linear,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A module that may get a LoRA. ``path`` is dotted, without wrappers; ``name`` is its name in a file."""

    name: str
    path: str
    module: Layer
    rules: ModelRules


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A module that gets a LoRA. ``reg_lr`` is (index of the pattern, learning rate) of network_reg_lrs, or None."""

    candidate: Candidate
    rank: int
    alpha: float  # 0 = the rank
    reg_lr: tuple[int, float] | None


def candidates_of(models: Iterable[tuple[nn.Module, ModelRules]]) -> list[Candidate]:
    """Every module that may get a LoRA, in the order of the models and of their modules."""
    found = [candidate for model, rules in models for candidate in _candidates(model, rules)]
    names = {candidate.name for candidate in found}
    assert len(names) == len(found), "two modules would share one name in the file: mend the architecture's rules"
    return found


def _candidates(model: nn.Module, rules: ModelRules) -> Iterator[Candidate]:
    pattern = re.compile(rules.candidates)
    for full_path, module in model.named_modules():
        match = pattern.fullmatch(full_path.replace(COMPILED, ""))
        if match and isinstance(module, rules.kinds):
            path = match[1]
            yield Candidate(name=f"{rules.prefix}_{path.replace('.', '_')}", path=path, module=module, rules=rules)


def select(candidates: Sequence[Candidate], arguments: NetworkArguments, *, rank: int, alpha: float) -> list[Target]:
    """Applies default exclusions and the user's patterns. Raises NetworkError for patterns that match nothing."""
    admitted = [candidate for candidate in candidates if _is_admitted(candidate, arguments)]
    problems = [*_idle_patterns(candidates, admitted, arguments)]
    targets = []
    for candidate in admitted:
        reg_dim = _first_match(arguments.network_reg_dims, candidate.path)
        own_rank = int(reg_dim[1]) if reg_dim else rank
        if own_rank:
            reg_lr = _first_match(arguments.network_reg_lrs, candidate.path)
            targets.append(Target(candidate=candidate, rank=own_rank, alpha=alpha, reg_lr=reg_lr))
    if not targets and not problems:
        problems.append("no module is left to train: exclude_patterns and network_reg_dims leave out every one of the "
                        f"{len(candidates)} that could get a LoRA; loosen them")  # fmt: skip
    if problems:
        raise NetworkError(*problems)
    return targets


def _is_admitted(candidate: Candidate, arguments: NetworkArguments) -> bool:
    if any(pattern.fullmatch(candidate.path) for pattern in arguments.include_patterns):
        return True
    excludes = (*arguments.exclude_patterns, *map(re.compile, candidate.rules.excludes))
    return not any(pattern.fullmatch(candidate.path) for pattern in excludes)


def _first_match(table: Sequence[tuple[re.Pattern, float]], path: str) -> tuple[int, float] | None:
    return next(((index, value) for index, (pattern, value) in enumerate(table) if pattern.fullmatch(path)), None)


def _idle_patterns(all_of: Sequence[Candidate], admitted: Sequence[Candidate], arguments: NetworkArguments) -> Iterator[str]:
    """One problem for each pattern that matches no module: the user meant something that is not going to happen."""
    reg_dims = [pattern for pattern, _ in arguments.network_reg_dims]
    reg_lrs = [pattern for pattern, _ in arguments.network_reg_lrs]
    for name, patterns, among in (("exclude_patterns", arguments.exclude_patterns, all_of),
                                  ("include_patterns", arguments.include_patterns, all_of),
                                  ("network_reg_dims", reg_dims, admitted), ("network_reg_lrs", reg_lrs, admitted)):  # fmt: skip
        for pattern in patterns:
            if not any(pattern.fullmatch(candidate.path) for candidate in among):
                yield (f"--network_args: {name}: {pattern.pattern!r} matches none of the {len(among)} modules that it may match; "
                       f"it must match a whole path, such as {examples(candidate.path for candidate in among)}")  # fmt: skip


def targets_of_file(candidates: Sequence[Candidate], weights: dict[str, Tensor], arguments: NetworkArguments) -> list[Target]:
    """The modules that a LoRA file holds, with the file's ranks and alphas (a missing alpha is the rank)."""
    targets = []
    for candidate in candidates:
        down = weights.get(f"{candidate.name}.{DOWN}")
        if down is not None:
            alpha = weights.get(f"{candidate.name}.{ALPHA}")
            reg_lr = _first_match(arguments.network_reg_lrs, candidate.path)
            targets.append(Target(candidate=candidate, rank=down.shape[0], reg_lr=reg_lr,
                                  alpha=float(down.shape[0] if alpha is None else alpha)))  # fmt: skip
    return targets


def examples(names: Iterable[str]) -> str:
    """``"a, b, c and 12 more"``."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
