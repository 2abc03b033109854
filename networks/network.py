"""LoRA networks: the container that trainers drive, its files, and the way an architecture builds one.

An architecture's file (``lora_<arch>.py``) supplies data: ModelRules and an arguments class. It calls
:func:`build_network` and :func:`build_network_from_weights`. The layer is in ``layer.py``, the choice of modules in
``selection.py``, the files' contents in ``weights_file.py``, the table of ``verbose`` in ``module_table.py``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import NetworkError
from networks.arguments import NetworkArguments
from networks.layer import Dropouts, LoRAModule, SplitLoRAModule
from networks.layout_names import OURS, TITLES
from networks.lora_formats import in_our_layout, layout_problems, read_in_our_layout, save_network_as
from networks.module_table import Row, table_lines
from networks.selection import UP, Candidate, ModelRules, Target, candidates_of, examples, select, targets_of_file
from networks.weights_file import (
    LoadReport,
    by_module,
    check_pairs,
    check_shapes,
    in_layer_shapes,
    metadata_of,
    no_module_fits,
    trained_alphas,
    trained_on,
    write_lora_file,
)

__all__ = ["LoRAModule", "LoRANetwork", "build_network", "build_network_from_weights"]

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0
T5_NAMES = "lora_te3_"
DENOISER = "unet"  # the label of the denoiser's optimizer groups and list, whatever it is; the others are text encoders
MODEL_OF_NAME = re.compile(r"lora_(unet|te\d*)_")
# why a network has no place for a module of a file
OTHERWISE = "the network arguments, the trained parts or the model are not those of the file"
LEFT_OUT = "so its part is neither trained nor in the new file; merge it with --base_weights"
TEXT_ENCODER_NOT_TRAINED = f"this text encoder is not trained (its outputs are cached, or it has no LoRA), {LEFT_OUT}"
DENOISER_NOT_TRAINED = f"the denoiser is not trained, {LEFT_OUT}"

Models = Sequence[tuple[nn.Module, ModelRules]]
LearningRates = float | Sequence[float] | None
Group = dict[str, Any]  # {"params": list of parameters, "lr": float}


class LoRANetwork(nn.Module):
    """All LoRAs of a run, with the methods that trainers call on a network module.

    ``text_encoder_loras`` and ``unet_loras`` hold the modules; apply_to() registers them under their names, so that before it
    the network has no parameters. Parameter order is the order of the models' modules, text encoders first.
    """

    def __init__(self, targets: Iterable[Target], *, multiplier: float, dropouts: Dropouts, arguments: NetworkArguments):
        super().__init__()
        self.multiplier = multiplier
        self.arguments = arguments
        self.text_encoder_loras: list[LoRAModule] = []
        self.unet_loras: list[LoRAModule] = []
        self._targets: dict[str, Target] = {}  # by lora_name
        self._backup: dict[str, Tensor] = {}
        self.source: Path | None = None  # the file that decided the modules, where one did
        for target in targets:
            place = target.candidate
            lora = lora_of(target, multiplier=multiplier, dropouts=dropouts)
            (self.unet_loras if place.rules.label == DENOISER else self.text_encoder_loras).append(lora)
            self._targets[place.name] = target

    @property
    def loras(self) -> list[LoRAModule]:
        return [*self.text_encoder_loras, *self.unet_loras]

    @property
    def train_t5xxl(self) -> bool:
        """Part of the protocol, for Stable Diffusion 3: whether T5 has LoRAs."""
        return any(lora.lora_name.startswith(T5_NAMES) for lora in self.text_encoder_loras)

    # --- into the models

    def apply_to(self, text_encoders: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Patches the forward of the chosen modules; the LoRAs of a model that is not chosen are dropped.

        The models are those the network was built for; they are taken for the protocol's sake.
        """
        self.text_encoder_loras = self.text_encoder_loras if apply_text_encoder else []
        self.unet_loras = self.unet_loras if apply_unet else []
        if not self.loras:
            raise NetworkError("no LoRA is left to train: --network_train_unet_only or --network_train_text_encoder_only leaves "
                               "only a model without LoRA modules; drop the flag")  # fmt: skip
        # a target holds on to its layer, and so to the weights of its model
        self._targets = {lora.lora_name: self._targets[lora.lora_name] for lora in self.loras}
        log_network(list(self._targets.values()))
        for lora in self.loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        """False: the models act as if there were no LoRA."""
        for lora in self.loras:
            lora.enabled = is_enabled

    def is_mergeable(self) -> bool:
        return True

    def merge_to(self, text_encoders: Any, unet: Any, weights_sd: Mapping[str, Tensor], dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None) -> None:  # fmt: skip
        """Adds the LoRA of ``weights_sd`` to the models' weights, computed in float32 on ``device`` (None: where they are).

        ``dtype`` is part of the protocol: every weight keeps its own.
        """
        weights = by_module(weights_sd)
        for lora in self.loras:
            if lora.lora_name in weights:
                lora.add_to_weight(weights[lora.lora_name], device)

    @torch.no_grad()
    def backup_weights(self) -> None:
        """Keeps a CPU copy of every frozen weight that pre_calculation() changes."""
        self._backup = {lora.lora_name: lora.org_module_ref[0].weight.detach().cpu().clone() for lora in self.loras}

    def pre_calculation(self) -> None:
        """Merges this network's own weights into the models and takes the LoRAs out of the forward pass."""
        for lora in self.loras:
            lora.add_to_weight(lora.file_tensors())
        self.set_enabled(False)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Undoes pre_calculation(), from backup_weights()'s copies."""
        for lora in self.loras:
            lora.org_module_ref[0].weight.copy_(self._backup[lora.lora_name])
        self.set_enabled(True)

    # --- optimizer

    def prepare_optimizer_params(self, text_encoder_lr: LearningRates, unet_lr: float | None,
                                 default_lr: float | None = None) -> tuple[list[Group], list[str]]:  # fmt: skip
        """-> (optimizer groups {"params", "lr"}, their names in logs).

        Per model: one group per network_reg_lrs pattern, per component with a rate and per block where blocks have factors, in
        the order met, then the rest; with LoRA+ each split in two. A learning rate that is not given is ``default_lr``; a group
        of learning rate 0 is left out: its parameters are frozen, but saved. With ``verbose`` logs a table of all modules.
        """
        found = list(self._groups(text_encoder_lr, unet_lr, default_lr))
        groups: list[Group] = [{"params": params, "lr": lr} for _, lr, params, _ in found if lr]
        if not groups:
            raise NetworkError("nothing would be trained: every learning rate is 0; set --learning_rate or --unet_lr")
        self.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        if self.arguments.verbose:
            self._log_table([(lr, members) for _, lr, _, members in found])
        return groups, [name for name, lr, _, _ in found if lr]

    def _groups(self, text_encoder_lr: LearningRates, unet_lr: float | None,
                default_lr: float | None) -> Iterator[tuple[str, float, list[Tensor], list[LoRAModule]]]:  # fmt: skip
        """(name, learning rate, parameters, the modules they are of) of each group, also of those with learning rate 0."""
        for label, loras in self._by_label().items():
            rate = unet_lr if label == DENOISER else text_encoder_rate(text_encoder_lr, label)
            base, ratio = (default_lr or 0.0) if rate is None else rate, self._plus_ratio(label)
            for name, lr, members in self._by_learning_rate(label, base, loras):
                for suffix, params, group_lr in split_for_lora_plus(members, lr, ratio):
                    yield name + suffix, group_lr, params, members

    def _log_table(self, groups: Iterable[tuple[float, Sequence[LoRAModule]]]) -> None:
        rates: dict[str, list[float]] = {lora.lora_name: [] for lora in self.loras}
        for lr, members in groups:
            for lora in members:
                rates[lora.lora_name].append(lr)
        for line in table_lines([self._row(lora, rates[lora.lora_name]) for lora in self.loras]):
            logger.info("%s", line)

    def _row(self, lora: LoRAModule, rates: Sequence[float]) -> Row:
        place = self._targets[lora.lora_name].candidate
        part = " ".join(filter(None, (place.rules.title, place.component)))
        parameters = sum(parameter.numel() for parameter in lora.parameters())
        pairs = max(len(lora.parts), 1)
        rank = lora.lora_dim // pairs
        alpha = lora.scale * rank  # the buffer may be on the device: reading it there would wait for it
        return Row(path=place.path, part=part, rank=rank, pairs=pairs, alpha=alpha, rates=tuple(rates), parameters=parameters,
                   name=place.name)  # fmt: skip

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: LearningRates, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[Group], list[str]]:
        """As prepare_optimizer_params: that takes one learning rate for each text encoder already."""
        return self.prepare_optimizer_params(text_encoder_lr, unet_lr, default_lr)

    def _by_label(self) -> dict[str, list[LoRAModule]]:
        found: dict[str, list[LoRAModule]] = {}
        for lora in self.loras:
            found.setdefault(self._targets[lora.lora_name].candidate.rules.label, []).append(lora)
        return found

    def _plus_ratio(self, label: str) -> float | None:
        given = self.arguments
        own = given.loraplus_unet_lr_ratio if label == DENOISER else given.loraplus_text_encoder_lr_ratio
        return own if own is not None else given.loraplus_lr_ratio

    def _by_learning_rate(
        self, label: str, base: float, loras: Sequence[LoRAModule]
    ) -> Iterator[tuple[str, float, list[LoRAModule]]]:
        regular: list[LoRAModule] = []
        special: dict[tuple[str, float], list[LoRAModule]] = {}
        for lora in loras:
            target = self._targets[lora.lora_name]
            if target.own_rate is not None:
                special.setdefault((f"{label} {target.own_rate[0]}", target.own_rate[1]), []).append(lora)
            elif target.block_factor is not None:
                group = f"{label}_block{target.candidate.block}", base * target.block_factor
                special.setdefault(group, []).append(lora)
            else:
                regular.append(lora)
        for (name, rate), members in special.items():
            yield name, rate, members
        yield label, base, regular

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # --- events of a run

    def enable_gradient_checkpointing(self) -> None:
        """Part of the protocol. A LoRA lies inside its layer's forward, so the model's own checkpointing covers it."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Part of the protocol. prepare_optimizer_params() has chosen what gets gradients."""

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Part of the protocol. Dropouts are drawn in the forward pass."""

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Shrinks every pair whose product's norm is above ``max_norm_value``, both halves by the same factor.

        -> (pairs that changed, mean norm, largest norm) as 0-d tensors on the network's device: nothing waits for it here.
        """
        norms = torch.stack([lora.norm() for lora in self.loras])
        # a floor keeps an all-zero pair from dividing by zero; it is under the limit, so it changes no other
        floored = norms.clamp_min(max_norm_value / 2)
        ratios = floored.clamp_max(max_norm_value) / floored
        for lora, factor in zip(self.loras, ratios.sqrt().unbind(), strict=True):
            lora.lora_down.weight.mul_(factor)
            lora.lora_up.weight.mul_(factor)
        norms = norms * ratios
        return (ratios != 1.0).sum(), norms.mean(), norms.max()

    # --- files

    def load_weights(self, file: str | Path) -> LoadReport:
        """Copies what the file has for this network's modules, whatever its dtype and layout. Needs every shape to fit.

        Raises CheckpointError for an unreadable or torn file, NetworkError when shapes differ or nothing fits.
        """
        tensors = read_in_our_layout(Path(file), self.arguments.NAMES)
        check_pairs(file, tensors)
        weights = by_module(in_trained_form(file, tensors, [self._targets[lora.lora_name].candidate for lora in self.loras]))
        own = {lora.lora_name: lora for lora in self.loras}
        fitting = [name for name in own if name in weights]
        if not fitting:
            raise no_module_fits(file, weights, own, architecture_of(self.arguments))
        places = [(self._targets[name].candidate, own[name].rank_in(weights[name])) for name in fitting]
        check_shapes(file, places, weights, splits=self.arguments.splits_fused)
        for name in fitting:
            own[name].load_pair(weights[name])
        self._warn_of_homeless(file, learned_beside(weights, own))
        return LoadReport(loaded=len(fitting), missing=tuple(name for name in own if name not in weights),
                          unexpected=tuple(name for name in weights if name not in own))  # fmt: skip

    def _warn_of_homeless(self, file: str | Path, names: Sequence[str]) -> None:
        """Of modules of a file: those of models that have no LoRA here, and those that the arguments leave out."""
        here = {model_of(lora.lora_name) for lora in self.loras}
        absent = [name for name in names if model_of(name) not in (None, *here)]
        for model in dict.fromkeys(map(model_of, absent)):
            cause = DENOISER_NOT_TRAINED if model == DENOISER else TEXT_ENCODER_NOT_TRAINED
            warn_of_homeless(file, [name for name in absent if model_of(name) == model], cause=cause)
        if Path(file) != self.source:  # else it is told already
            warn_of_homeless(file, [name for name in names if name not in absent], cure="; --dim_from_weights takes its modules")

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file holds: state_dict(), but with the pairs of a fused layer's parts as one."""
        return {f"{lora.lora_name}.{part}": t.detach() for lora in self.loras for part, t in lora.file_tensors().items()}

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Writes the file atomically; ``dtype`` None keeps each tensor's. Equal weights and metadata give equal bytes.

        .safetensors files get ``metadata`` and the two sshs_* hashes, others are pickles of a plain dict, which hold no metadata.
        """
        tensors = {key: value.to(device="cpu", dtype=dtype or value.dtype) for key, value in self.file_tensors().items()}
        write_lora_file(Path(file), tensors, metadata or {})

    def save_weights_as(
        self, layout: str, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """As save_weights(), in another program's ``layout`` ("comfy", "diffusers"); layout_problems() says whether it can."""
        assert self.arguments.NAMES is not None
        save_network_as(self, Path(file), self.arguments.NAMES, layout, dtype=dtype, metadata=metadata or {})

    def layout_note(self, layout: str) -> str | None:
        """What there is to say about a ``layout`` that can be written: that it is this project's own."""
        names = self.arguments.NAMES
        if names is None or names.written_layout(layout) != OURS:
            return None
        return f"{TITLES[layout]} for a LoRA of this model are the names that are written anyway"

    def layout_problems(self, layout: str) -> list[str]:
        """Why save_weights_as() cannot write ``layout``, from the names of the applied modules; empty where it can."""
        if self.arguments.NAMES is None:
            return ["it does not know what its modules are called there"]
        return layout_problems(self, self.arguments.NAMES, layout)


def split_for_lora_plus(loras: Sequence[LoRAModule], lr: float, ratio: float | None) -> Iterator[tuple[str, list[Tensor], float]]:
    """(suffix of the group's name, parameters, learning rate): all at once, or lora_down and lora_up apart.

    The second is LoRA+, arXiv 2402.12354.
    """
    if not loras:
        return
    downs, ups = [lora.lora_down.weight for lora in loras], [lora.lora_up.weight for lora in loras]
    if ratio is None:
        yield "", [weight for pair in zip(downs, ups, strict=True) for weight in pair], lr
    else:
        yield "", downs, lr
        yield " plus", ups, lr * ratio


def text_encoder_rate(rates: LearningRates, label: str) -> float | None:
    """The learning rate of "textencoder N": the Nth of the list, the last one where there are fewer, or the only number.

    A model's only text encoder may have no number.
    """
    if not isinstance(rates, Sequence):
        return rates
    position = int(label.rpartition(" ")[2]) if " " in label else 1
    return rates[min(position, len(rates)) - 1] if rates else None


def build_network(models: Models, arguments: NetworkArguments, *, multiplier: float, rank: int | None, alpha: float | None,
                  neuron_dropout: float | None) -> LoRANetwork:  # fmt: skip
    """A new network, which changes nothing until it is trained. ``rank`` None is 4, ``alpha`` None is 1.0, ``alpha`` 0 the rank.

    Raises NetworkError, with all problems, for impossible numbers and for patterns that match nothing.
    """
    rank = DEFAULT_RANK if rank is None else rank
    alpha = DEFAULT_ALPHA if alpha is None else float(alpha)
    neuron_dropout = arguments.dropout if neuron_dropout is None else neuron_dropout
    tell(arguments.warnings())
    problems = []
    if rank < 1:
        problems.append(f"--network_dim is {rank}: give a whole number from 1 on, such as 16")
    if alpha < 0:
        problems.append(f"--network_alpha is {alpha}: give 0 (the same as the rank) or a number above it")
    if neuron_dropout is not None and not 0.0 <= neuron_dropout < 1.0:
        problems.append(f"--network_dropout is {neuron_dropout}: give a number from 0 up to, but not including, 1")
    try:
        targets = select(candidates_of(models), arguments, rank=rank, alpha=alpha)
    except NetworkError as error:
        problems.extend(error.problems)
    if problems:
        raise NetworkError(*problems)
    warn_of_rank(rank, targets)
    return _network(targets, arguments, multiplier, _dropouts(arguments, neuron_dropout))


def build_network_from_weights(  # noqa: PLR0913  # what the protocol's function gets, and the models it did not get
    models: Models, arguments: NetworkArguments, *, multiplier: float, file: str | Path, weights_sd: dict[str, Tensor] | None,
    absent: tuple[str, ...] = (),
) -> tuple[LoRANetwork, dict[str, Tensor]]:  # fmt: skip
    """A network with the modules, ranks and alphas of a LoRA file; -> (network, the file's tensors under our names).

    It is not loaded yet. ``absent``: prefixes of the models that are not given; that their modules are left out is no news.

    Dropouts, LoRA+ and learning rates by pattern act as given; arguments that select modules do not, which is logged.
    Raises NetworkError for a file of another architecture, CheckpointError for a torn one.
    """
    names = arguments.NAMES
    if weights_sd is None:
        weights = read_in_our_layout(Path(file), names)
    else:
        weights = weights_sd if names is None else in_our_layout(file, weights_sd, names)
    check_pairs(file, weights)
    candidates = candidates_of(models)
    weights = in_trained_form(file, weights, candidates)
    modules = by_module(weights)
    targets = targets_of_file([place for place in candidates if place.name in modules], weights, arguments)
    if not targets:
        known = [place.name for place in candidates]
        raise no_module_fits(file, modules or weights, known, architecture_of(arguments))
    check_shapes(file, [(target.candidate, target.file_rank) for target in targets], modules)
    used = {target.candidate.name for target in targets}
    warn_of_homeless(file, [name for name in learned_beside(modules, used) if not name.startswith(absent)])
    tell_of_split(file, targets, arguments)
    if idle := [name for name in arguments.SELECTING if getattr(arguments, name)]:
        logger.warning("%s: it decides the modules and ranks, so %s does nothing", file, ", ".join(idle))
    tell(arguments.warnings())
    network = _network(targets, arguments, multiplier, _dropouts(arguments, arguments.dropout))
    network.source = Path(file)
    return network, weights


def lora_of(target: Target, *, multiplier: float, dropouts: Dropouts) -> LoRAModule:
    """The module of one layer; SplitLoRAModule where the layer's parts have pairs of their own."""
    place = target.candidate
    if target.parts:
        assert isinstance(place.module, nn.Linear)
        return SplitLoRAModule(place.name, place.module, parts=target.parts, lora_dim=target.rank, alpha=target.alpha,
                               multiplier=multiplier, dropouts=dropouts)  # fmt: skip
    return LoRAModule(place.name, place.module, lora_dim=target.rank, alpha=target.alpha, multiplier=multiplier,
                      dropouts=dropouts)  # fmt: skip


def in_trained_form(file: str | Path, weights: dict[str, Tensor], places: Sequence[Candidate]) -> dict[str, Tensor]:
    """``weights`` of a file in the shapes of the layers, and with the strength that they were trained with."""
    weights = in_layer_shapes(weights, places)
    alphas = trained_alphas(by_module(weights), metadata_of(file), places) if any(place.parts for place in places) else {}
    if alphas:
        logger.warning(
            "%s was trained with split_qkv by a program that writes the alpha of one part: %d modules of it are read with the "
            "strength that they were trained with, which is more than the file itself says",
            file,
            len(alphas),
        )
    return {**weights, **alphas} if alphas else weights


def tell_of_split(file: str | Path, targets: Sequence[Target], arguments: NetworkArguments) -> None:
    """A file decides whether q, k and v have LoRAs of their own."""
    fused = [target for target in targets if target.candidate.parts]
    split = [target for target in fused if target.parts]
    if arguments.splits_fused and len(split) < len(fused):
        logger.warning("%s: it has one LoRA for all of %s, so split_qkv does nothing there", file,
                       examples(target.candidate.name for target in fused if not target.parts))  # fmt: skip
    elif split and not arguments.splits_fused:
        logger.info("%s: the q, k and v of %d modules have LoRAs of their own there (split_qkv), and keep them", file, len(split))


def architecture_of(arguments: NetworkArguments) -> str:
    return "" if arguments.NAMES is None else arguments.NAMES.architecture


def tell(warnings: Iterable[str]) -> None:
    for line in warnings:
        logger.warning("warning: --network_args: %s", line)


def learned_beside(weights: Mapping[str, Mapping[str, Tensor]], known: Collection[str]) -> list[str]:
    """The modules of a file, apart from the ``known`` ones, that change something: where lora_up is zero nothing was trained, as
    in the last layer of a text encoder that is read before it."""
    return [name for name, parts in weights.items() if name not in known and bool(parts[UP].count_nonzero())]


def model_of(name: str) -> str | None:
    """``"unet"``, ``"te2"``: whose module it is, by its name in a file; None where that does not show."""
    match = MODEL_OF_NAME.match(name)
    return None if match is None else match[1]


def warn_of_homeless(file: str | Path, names: Sequence[str], *, cause: str = OTHERWISE, cure: str = "") -> None:
    """Of modules of a file that this network does not have. ``cure`` ends the line."""
    if names:
        has = "1 module has" if len(names) == 1 else f"{len(names)} modules have"
        logger.warning("warning: %s: %s no place in this network and what the file learned there is left out (%s): %s%s%s", file,
                       has, examples(names), cause, trained_on(file) if cause == OTHERWISE else "", cure)  # fmt: skip


def warn_of_rank(rank: int, targets: Sequence[Target]) -> None:
    """A change of a layer's weight has at most the rank of that: more is room that nothing can use."""
    sides = [min(weight.shape[0], weight[0].numel()) for weight in (target.candidate.module.weight for target in targets)]
    if sides and rank > max(sides):
        logger.warning("warning: --network_dim=%d is more than any layer can use: the largest has rank %d; a smaller one learns "
                       "as much with less memory and time", rank, max(sides))  # fmt: skip


def _dropouts(arguments: NetworkArguments, neuron: float | None) -> Dropouts:
    return Dropouts(neuron=neuron or 0.0, rank=arguments.rank_dropout or 0.0, module=arguments.module_dropout or 0.0)


def _network(targets: Sequence[Target], arguments: NetworkArguments, multiplier: float, dropouts: Dropouts) -> LoRANetwork:
    return LoRANetwork(targets, multiplier=multiplier, dropouts=dropouts, arguments=arguments)


def log_network(targets: Sequence[Target]) -> None:
    """One line per model: modules, ranks."""
    for title in dict.fromkeys(target.candidate.rules.title for target in targets):
        members = [target for target in targets if target.candidate.rules.title == title]
        ranks = sorted({target.rank for target in members})
        logger.info("LoRA for %s: %d modules, rank %s", title, len(members), ", ".join(map(str, ranks)))
