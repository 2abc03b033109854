"""Resumable states: a folder that is complete or absent, and the checks before a run goes on from one.

A state holds what the next step depends on and cannot be computed again: the network's weights, the optimizer, the schedule,
the gradient scaler and the position. Everything random is a pure function of the seed and the position, so no generator is
saved. ``train_state.json`` is written last and lists the other files with their sizes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError, OptionError, did_you_mean
from library.files.atomic import REPLACED_MARK, folder_written_atomically, write_text_atomically
from library.files.safetensors_file import file_fingerprint
from library.options.declare import groups_of
from library.options.reference_table import as_dict
from library.training.files.dataset_history import dataset_history
from library.training.optimizing.optimizer_names import optimizer_source
from library.training.steps import Progress
from library.training.validating.validation_plan import NO_SPLIT, ValidationRecord

if TYPE_CHECKING:
    from torch import Tensor

    from library.dataset.items import DatasetSettings

STATE_FORMAT = 1
DESCRIPTION_FILE = "train_state.json"
NETWORK_FILE = "network.safetensors"
TENSORS_FILE = "optimizer.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDescription:
    """``train_state.json``: readable, and enough to decide whether a run can go on from this state.

    ``identity`` and ``history`` are those of :class:`StateSettings`. ``losses`` are the values behind the shown average.
    """

    epoch: int
    progress: Progress
    seed: int
    identity: dict[str, str]
    history: dict[str, str]
    losses: list[float]
    validation: ValidationRecord = field(default_factory=ValidationRecord)

    def to_json(self, files: Mapping[str, int]) -> str:
        content = {
            "format": STATE_FORMAT,
            "current_epoch": self.epoch,
            "current_step": self.progress.step,
            "data_position": self.progress.position,
            "seed": self.seed,
            "identity": self.identity,
            "history": self.history,
            "losses": self.losses,
            "validation": asdict(self.validation),
            "files": dict(files),
        }
        return json.dumps(content, indent=1)


def save_state(folder: Path, description: StateDescription, *, network: Mapping[str, Tensor], training: Any) -> None:
    """Writes a complete state or leaves the old one. ``training``: optimizer, schedule and scaler states (torch.save)."""
    from library.files.safetensors_file import serialize
    from library.files.torch_file import torch_bytes

    with folder_written_atomically(folder) as temporary:
        (temporary / NETWORK_FILE).write_bytes(serialize(network))
        (temporary / TENSORS_FILE).write_bytes(torch_bytes(training))
        files = {name: (temporary / name).stat().st_size for name in (NETWORK_FILE, TENSORS_FILE)}
        write_text_atomically(temporary / DESCRIPTION_FILE, description.to_json(files))


def remove_replaced_states(states: Iterable[Path]) -> None:
    """Removes those of ``states`` that a killed run had set aside as ``NAME.replaced``, where the state NAME is complete."""
    for path in states:
        if path.name.endswith(REPLACED_MARK) and _is_complete(path.with_name(path.name.removesuffix(REPLACED_MARK))):
            shutil.rmtree(path, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    try:
        read_description(folder)
    except CheckpointError:
        return False
    return True


def read_description(folder: Path) -> StateDescription:
    """Reads and checks a state without loading tensors. Raises CheckpointError naming what is missing or damaged."""
    content = _read_json(folder)
    missing = [name for name, size in content["files"].items() if _file_size(folder / name) != size]
    if missing:
        raise CheckpointError(
            f"the state {folder} is incomplete: {', '.join(missing)} missing or truncated; choose another state, "
            "or use --resume latest"
        )
    try:
        return StateDescription(
            epoch=int(content["current_epoch"]),
            progress=Progress(int(content["current_step"]), int(content["data_position"])),
            seed=int(content["seed"]),
            identity=dict(content["identity"]),
            history=dict(content["history"]),
            losses=list(content["losses"]),
            validation=ValidationRecord(**content.get("validation", {})),  # older states have none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION_FILE} is damaged ({error!r}); choose another state") from error


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"--resume {folder}: there is no such state folder{did_you_mean(folder.name, near)}")
    if not path.is_file():
        raise CheckpointError(
            f"the state {folder} is incomplete: it has no {DESCRIPTION_FILE}; choose another state, or use --resume latest"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged; choose another state") from error
    if not isinstance(content, dict) or content.get("format") != STATE_FORMAT or not isinstance(content.get("files"), dict):
        raise CheckpointError(
            f"{folder} is a state of another trainer or version; to go on from its weights, give its LoRA file as "
            "--network_weights"
        )
    return content


def _file_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def find_state(resume: str, candidates: Sequence[Path]) -> Path | None:
    """The state folder that ``--resume`` means: a path, or ``latest`` = the complete one with the most steps (None: none yet)."""
    if resume != "latest":
        folder = Path(resume)
        replaced = folder.with_name(folder.name + REPLACED_MARK)
        return replaced if replaced.is_dir() and not folder.exists() else folder
    complete: list[tuple[int, bool, Path]] = []
    for folder in candidates:
        try:
            description = read_description(folder)
        except CheckpointError:
            continue  # half or foreign: an older complete one is what "latest" promises
        complete.append((description.progress.step, not folder.name.endswith(REPLACED_MARK), folder))
    return max(complete)[2] if complete else None


# groups whose options change what is trained, those of their options that do not, and options of other groups that do
HISTORY_GROUPS = ("optimizer", "schedule", "loss", "noise", "flow", "ddpm", "rates", "encoder_rates")
HARMLESS = ("optimizer_type", "use_8bit_adam", "use_lion_optimizer")  # they are in the identity
HISTORY_OPTIONS = {
    "run": ("gradient_accumulation_steps", "mixed_precision", "full_fp16", "full_bf16"),
    "memory": ("fp8_base", "fp8_base_unet"),
    "network": ("network_dropout", "scale_weight_norms", "network_train_unet_only", "network_train_text_encoder_only"),
    "dataset": ("masked_loss", "prior_loss_weight"),  # of the others count the datasets' settings, which they become a part of
}
ADAPTER_OPTION = "llm_adapter_path"  # of the architectures that have one: a part of the frozen model
VALIDATION_SPLIT = "the validation split"  # with another one, what was trained would validate
OPTIMIZER = "the optimizer as"
ONE_PIECE = "one piece"
ABSENT = {VALIDATION_SPLIT: NO_SPLIT, OPTIMIZER: ONE_PIECE}  # what an older state means that does not name a setting
RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2", "lr_scheduler")


@dataclass(frozen=True, slots=True)
class StateSettings:
    """What a run's states say of its settings: name -> value as text. ``identity``: those without which a run cannot go on from a
    state; ``history``: those that should stay for the result of an uninterrupted run.
    """

    identity: dict[str, str]
    history: dict[str, str]


def state_settings(
    options: Any,
    architecture: str,
    *,
    batches_per_epoch: int,
    datasets: Sequence[DatasetSettings] = (),
    validation_split: str = NO_SPLIT,
    processes: int = 1,
) -> StateSettings:
    """Options that an architecture does not have are left out."""
    names = ("network_module", "network_dim", "network_alpha", "network_args")
    identity = {f"--{name}": str(getattr(options.network, name)) for name in names}
    identity.update({"--optimizer_type": optimizer_source(options.optimizer).path, "the architecture": architecture})
    identity[VALIDATION_SPLIT] = validation_split
    identity[OPTIMIZER] = optimizer_pieces(options, processes)
    groups = [getattr(options, name) for name in HISTORY_GROUPS if hasattr(options, name)]
    values = {f.name: getattr(group, f.name) for group in groups for f in fields(group) if f.name not in HARMLESS}
    own = {name: getattr(group, "CHANGES_TRAINING", ()) for name, group in groups_of(type(options)).items()}
    of_groups = {**own, **HISTORY_OPTIONS}
    values.update({name: getattr(getattr(options, group), name) for group, names in of_groups.items() for name in names})
    history = {f"--{name}": str(value) for name, value in values.items()}
    fingerprint = base_model_fingerprint(options)
    if fingerprint is not None:
        history["the base model's fingerprint"] = fingerprint
    history["the number of batches per epoch"] = str(batches_per_epoch)
    return StateSettings(identity, {**history, **dataset_history(datasets)})


def optimizer_pieces(options: Any, processes: int) -> str:
    """Processes that share the optimizer go on as many as they were."""
    shared = options.distributed.shares_optimizer
    return f"{processes} piece{'s' * (processes > 1)} of --deepspeed, one for each process" if shared else ONE_PIECE


def base_model_fingerprint(options: Any) -> str | None:
    """Of the frozen model with what is put or merged into it. None where the model is no file or folder."""
    model = Path(str(options.model.pretrained_model_name_or_path))
    if not model.exists():
        return None
    adapter = as_dict(options).get(ADAPTER_OPTION)
    merged = [f"{file_fingerprint(Path(file))} x {strength:g}" for file, strength in options.network.weights_to_merge]
    return " + ".join([file_fingerprint(model), *([file_fingerprint(Path(adapter))] if adapter else []), *merged])


def check_identity(folder: Path, saved: StateDescription, settings: StateSettings) -> list[str]:
    """Raises OptionError when the state belongs to other settings; returns lines about changes that are allowed.

    What an older state does not name is taken to be as it was.
    """
    problems = [
        f"the state {folder} was saved with {flag} {saved.identity.get(flag, ABSENT.get(flag))}, but this run has {value}: "
        "give the old value, or start a new run with --network_weights"
        for flag, value in settings.identity.items()
        if saved.identity.get(flag, ABSENT.get(flag)) != value
    ]
    if problems:
        raise OptionError(*problems)
    changes: dict[tuple[str, str, str], list[str]] = {}  # (setting, old, new) -> the places where it changed so
    for name, new in settings.history.items():
        old = saved.history.get(name, new)
        if old != new:
            place, _, setting = name.rpartition(": ")
            changes.setdefault((setting, old, new), []).append(place)
    return [_change(*change, places) for change, places in changes.items()]


def _change(setting: str, old: str, new: str, places: Sequence[str]) -> str:
    rates = setting.removeprefix("--") in RATES
    effect = "the state's rates and schedule go on" if rates else "the run goes on, but not as one uninterrupted run would"
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    where = f"{places[0]}{more}: " if places[0] else ""
    return f"{where}{setting} was {old} when the state was saved and is {new} now: {effect}"


def load_network_tensors(folder: Path) -> dict[str, Tensor]:
    from library.files.safetensors_file import read_header, read_tensors

    return dict(read_tensors(read_header(folder / NETWORK_FILE)))


def load_training_tensors(folder: Path) -> Any:
    """Optimizer, schedule and scaler states. Raises CheckpointError when the file is damaged."""
    import torch

    path = folder / TENSORS_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); choose another state") from error
