"""Which modules of a model get a LoRA, with which name, rank, alpha and learning rate.

An architecture states its rules as data (:class:`ModelRules`); the user's patterns bend them. Only names and types of modules are
looked at, never their weights, so a model on the meta device does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from library.errors import NetworkError
from networks.arguments import NetworkArguments
from networks.fused_parts import blocks_of, is_split

Layer = nn.Linear | nn.Conv2d  # what can have a LoRA
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"  # a module's tensors in a LoRA file, after its name and a dot
COMPILED = "_orig_mod."  # torch.compile puts this level into the paths of what it wraps
TEXT_ENCODER_LABEL = "textencoder"  # how the labels of text encoders begin
SEVERAL_PATTERNS = (
    """several patterns are written as a list, "[r'.*mlp.*', r'.*v_proj']", or with | between them, .*mlp.*|.*v_proj"""
)
SHOWN = 3  # names that a message gives as examples


@dataclass(frozen=True, kw_only=True)
class ModelRules:
    """Which modules of one model may get a LoRA, and what they are called.

    ``candidates`` matches a module's whole dotted path; its first group, given to ``renamed``, is the path that names and the
    user's patterns go by.
    """

    prefix: str  # of the names in a file: lora_unet, lora_te
    label: str  # of the optimizer groups: "unet", "textencoder 1"
    candidates: str
    excludes: tuple[str, ...] = ()  # default exclusions; the user's include_patterns re-admit
    kinds: tuple[type[nn.Linear] | type[nn.Conv2d], ...] = (nn.Linear,)
    components: tuple[tuple[str, str], ...] = ()  # (name, regex on whole paths) of parts with rates of their own; first match
    renamed: Callable[[str], str] = str  # where files go by other paths than the module has
    block_of: Callable[[str], int | None] = lambda path: None  # the number that block-wise arguments know a path's block by
    # of a fused Linear, such as qkv: how many rows each of its projections has, in their order; () = it is not fused
    parts_of: Callable[[str, nn.Module], tuple[int, ...]] = lambda path, layer: ()
    ranks: tuple[tuple[str, int], ...] = ()  # (regex on whole paths, rank instead of the run's); the first match, 0 = no LoRA

    @property
    def title(self) -> str:
        """What people read: ``"denoiser"``, ``"text encoder 2"``; a model's only text encoder has no number."""
        if not self.label.startswith(TEXT_ENCODER_LABEL):
            return "denoiser"
        return f"text encoder {self.prefix[len(self.prefix.rstrip('0123456789')) :]}".rstrip()

    def rank_of(self, path: str) -> int | None:
        """What ``ranks`` says of it."""
        return next((rank for pattern, rank in self.ranks if re.fullmatch(pattern, path)), None)

    def component_of(self, path: str) -> str | None:
        return next((name for name, pattern in self.components if re.fullmatch(pattern, path)), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A module that may get a LoRA. ``path`` is dotted, without wrappers; ``name`` is its name in a file."""

    name: str
    path: str
    module: Layer
    rules: ModelRules
    component: str | None = None  # which of the rules' components it belongs to
    block: int | None = None  # as block-wise arguments count, where the model has such
    parts: tuple[int, ...] = ()  # rows of the projections that are fused in it

    @property
    def is_wide(self) -> bool:
        """A convolution that looks at neighbours, too: 3x3."""
        return isinstance(self.module, nn.Conv2d) and any(side > 1 for side in self.module.kernel_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A module that gets a LoRA. ``own_rate`` is (name of its optimizer group, learning rate), None where its model's counts.

    It comes from network_reg_lrs ("reg_lr_0" for the first pattern), else from the rate of its component ("self_attn").
    """

    candidate: Candidate
    rank: int
    alpha: float  # 0 = the rank
    own_rate: tuple[str, float] | None
    block_factor: float | None = None  # of its model's learning rate; its block is then an optimizer group of its own
    parts: tuple[int, ...] = ()  # rows of each part that has a pair of its own; then rank and alpha are of each of these

    @property
    def file_rank(self) -> int:
        return self.rank * max(len(self.parts), 1)


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
            path = rules.renamed(match[1])
            yield Candidate(name=f"{rules.prefix}_{path.replace('.', '_')}", path=path, module=module, rules=rules,
                            component=rules.component_of(path), block=rules.block_of(path),
                            parts=rules.parts_of(path, module))  # fmt: skip


def select(candidates: Sequence[Candidate], arguments: NetworkArguments, *, rank: int, alpha: float) -> list[Target]:
    """Applies default exclusions, the user's patterns, and rates of components.

    Raises NetworkError for patterns that match nothing and rates of components that are not there.
    """
    admitted = [candidate for candidate in candidates if _is_admitted(candidate, arguments)]
    targets = []
    for candidate in admitted:
        reg_dim = _first_match(arguments.network_reg_dims, candidate.path)
        part_rank = candidate.rules.rank_of(candidate.path)
        own_rank, own_alpha = arguments.size_of(
            candidate.block, wide=candidate.is_wide, rank=rank if part_rank is None else part_rank, alpha=alpha
        )
        own_rank = int(reg_dim[1]) if reg_dim else own_rank
        if own_rank:
            parts = candidate.parts if arguments.splits_fused else ()
            targets.append(_target(candidate, arguments, own_rank, own_alpha, parts))
    problems = [*_idle_selections(candidates, admitted, arguments), *_idle_reg_lrs(admitted, arguments),
                *_idle_components(targets, arguments, candidates)]  # fmt: skip
    if not targets and not problems:
        blocks = "train_block_indices, " if getattr(arguments, "train_block_indices", None) is not None else ""
        problems.append(f"no module is left to train: {blocks}exclude_patterns, ranks of 0 and learning rates of 0 leave out "
                        f"every one of the {len(candidates)} that could get a LoRA; loosen them")  # fmt: skip
    if problems:
        raise NetworkError(*problems)
    return targets


def _target(candidate: Candidate, arguments: NetworkArguments, rank: int, alpha: float, parts: tuple[int, ...] = ()) -> Target:
    own_rate = _own_rate(candidate, arguments)
    factor = arguments.block_factor(candidate.block) if own_rate is None else None
    return Target(candidate=candidate, rank=rank, alpha=alpha, own_rate=own_rate, block_factor=factor, parts=parts)


def _is_admitted(candidate: Candidate, arguments: NetworkArguments) -> bool:
    rate = arguments.component_rates.get(candidate.component or "")
    is_idle = rate == 0 or arguments.block_factor(candidate.block) == 0
    if is_idle and not _first_match(arguments.network_reg_lrs, candidate.path):
        return False  # whatever includes it: it would not be trained
    if any(pattern.fullmatch(candidate.path) for pattern in arguments.include_patterns):
        return True
    if any(pattern.fullmatch(candidate.path) for pattern in arguments.exclude_patterns):
        return False
    return bool(rate) or not any(re.fullmatch(pattern, candidate.path) for pattern in candidate.rules.excludes)


def _own_rate(candidate: Candidate, arguments: NetworkArguments) -> tuple[str, float] | None:
    reg_lr = _first_match(arguments.network_reg_lrs, candidate.path)
    if reg_lr:
        return f"reg_lr_{reg_lr[0]}", reg_lr[1]
    rate = arguments.component_rates.get(candidate.component or "")
    return None if rate is None or candidate.component is None else (candidate.component, rate)


def _first_match(table: Sequence[tuple[re.Pattern, float]], path: str) -> tuple[int, float] | None:
    return next(((index, value) for index, (pattern, value) in enumerate(table) if pattern.fullmatch(path)), None)


def _idle_selections(all_of: Sequence[Candidate], admitted: Sequence[Candidate], arguments: NetworkArguments) -> Iterator[str]:
    """One problem for each pattern that matches no module: the user meant something that is not going to happen."""
    yield from _idle("exclude_patterns", arguments.exclude_patterns, all_of)
    yield from _idle("include_patterns", arguments.include_patterns, all_of)
    yield from _idle("network_reg_dims", [pattern for pattern, _ in arguments.network_reg_dims], admitted)


def _idle_reg_lrs(trained: Sequence[Candidate], arguments: NetworkArguments) -> Iterator[str]:
    yield from _idle("network_reg_lrs", [pattern for pattern, _ in arguments.network_reg_lrs], trained)


def _idle(name: str, patterns: Iterable[re.Pattern], among: Sequence[Candidate]) -> Iterator[str]:
    for pattern in patterns:
        if not any(pattern.fullmatch(candidate.path) for candidate in among):
            several = f"; {SEVERAL_PATTERNS}" if "," in pattern.pattern and not name.startswith("network_reg") else ""
            yield (f"--network_args: {name}: {pattern.pattern!r} matches none of the {len(among)} modules that it may match; "
                   f"it must match a whole path, such as {examples(_usual_paths(among))}{several}")  # fmt: skip


def _usual_paths(candidates: Sequence[Candidate]) -> list[str]:
    """Those that people look for first: of the denoiser before text encoders, and what has a LoRA by default before the rest."""

    def rarity(candidate: Candidate) -> tuple[bool, bool]:
        rules = candidate.rules
        return rules.label.startswith(TEXT_ENCODER_LABEL), any(re.fullmatch(p, candidate.path) for p in rules.excludes)

    return [candidate.path for candidate in sorted(candidates, key=rarity)]


def _idle_components(targets: Sequence[Target], arguments: NetworkArguments,
                     candidates: Sequence[Candidate] | None = None) -> Iterator[str]:  # fmt: skip
    """One problem for each component that has a learning rate, but no module. ``candidates`` None: a file decides the modules."""
    used = {target.candidate.component for target in targets}
    for component, rate in arguments.component_rates.items():
        if not rate or component in used:
            continue
        if candidates is None:
            why = "the LoRA file, which decides, has none of its modules"
        elif any(candidate.component == component for candidate in candidates):
            why = "other arguments leave out all of its modules"
        else:
            why = "the model has no such part"
        yield f"--{component}_lr is {rate:g}, but {why}: drop --{component}_lr"


def targets_of_file(candidates: Sequence[Candidate], weights: dict[str, Tensor], arguments: NetworkArguments) -> list[Target]:
    """The modules that a LoRA file holds, with the file's ranks and alphas (a missing alpha is the rank).

    Rates act: one of 0 leaves its modules in the network, untrained. Raises NetworkError for rates without a module in the file.
    """
    targets = []
    for candidate in candidates:
        down = weights.get(f"{candidate.name}.{DOWN}")
        if down is not None:
            alpha = weights.get(f"{candidate.name}.{ALPHA}")
            parts = _parts_in_file(candidate, weights, arguments)
            count, rank = max(len(parts), 1), down.shape[0]
            own_alpha = float(rank if alpha is None else alpha) / count
            targets.append(_target(candidate, arguments, rank // count, own_alpha, parts))
    used = [target.candidate for target in targets]
    problems = [*_idle_reg_lrs(used, arguments), *_idle_components(targets, arguments)] if targets else []
    if problems:
        raise NetworkError(*problems)
    return targets


def _parts_in_file(candidate: Candidate, weights: dict[str, Tensor], arguments: NetworkArguments) -> tuple[int, ...]:
    """The parts of a fused Linear, where the file has a pair for each; the arguments decide of what has learned nothing yet."""
    up = weights.get(f"{candidate.name}.{UP}")
    fits = up is not None and blocks_of(up, candidate.parts) is not None
    return candidate.parts if fits and up is not None and (arguments.splits_fused or is_split(up, candidate.parts)) else ()


def examples(names: Iterable[str]) -> str:
    """``"a, b, c and 12 more"``."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
