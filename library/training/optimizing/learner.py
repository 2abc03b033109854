"""What turns losses into weights: optimizer, schedule, gradients, loss scaling, and the state that resuming needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.training.models.precision import allow_fp16_gradients
from library.training.models.strength import NetworkStrength
from library.training.optimizing.fused_backward import FusedBackward
from library.training.optimizing.gradients import Gradients
from library.training.optimizing.optimizers import create_optimizer, evaluation_weights, load_optimizer_state, optimizer_state
from library.training.optimizing.schedules import create_schedule
from library.training.optimizing.trained_weights import TrainedWeights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.train import TrainOptions
    from library.training.running.processes import HostGroup

MAX_NORM_CURVES = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")  # what --scale_weight_norms logs


def try_optimizer(options: TrainOptions, total_steps: int) -> str:
    """Makes optimizer and schedule for a stand-in weight, so that wrong arguments show before anything is loaded.

    Returns the optimizer's description for metadata. Raises OptionError.
    """
    with _silence():
        made = create_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], options.optimizer)
        create_schedule(made.optimizer, options.schedule, total_steps=total_steps, optimizer=options.optimizer)
    return made.description


@contextmanager
def _silence() -> Iterator[None]:
    """Around what is only tried: what its makers print and warn of comes when it is made for good."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


class Learner:
    """One network's training machinery. ``network`` is applied and on its device; ``groups`` are networks.optimizer_groups()."""

    def __init__(
        self,
        network: Any,
        accelerator: Accelerator,
        options: TrainOptions,
        *,
        groups: tuple[list[dict[str, Any]], list[str]],
        total_steps: int,
    ):
        self.network, self._accelerator = network, accelerator
        self.strength = NetworkStrength(network)
        self._max_weight_norm = options.network.scale_weight_norms
        parameters, self._group_names = groups
        self._optimizer = create_optimizer(parameters, options.optimizer).optimizer
        self._schedule = create_schedule(self._optimizer, options.schedule, total_steps=total_steps, optimizer=options.optimizer)
        self._trained = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        self._prepare(options)
        self.weights = TrainedWeights(self._trained)

    def _prepare(self, options: TrainOptions) -> None:
        """One of two ways from gradients to new weights (library/training/optimizing/deepspeed.py is the third)."""
        # accelerate's wrapper does the loss scaling of fp16; without it, the optimizer itself takes less time
        self._stepped = self._accelerator.prepare_optimizer(self._optimizer) if self.scales_losses else self._optimizer
        self._fused = FusedBackward(self._optimizer) if options.memory.fused_backward_pass else None
        self._gradients = None if self._fused else Gradients(self._trained, max_norm=options.optimizer.max_grad_norm)
        if options.run.full_fp16 and self._accelerator.scaler is not None:
            allow_fp16_gradients(self._accelerator.scaler)

    @property
    def scales_losses(self) -> bool:
        """fp16: the scale of the loss is searched for, and a step that overflows is part of the search."""
        return self._accelerator.scaler is not None

    @property
    def can_save_alone(self) -> bool:
        """Whether one process has all that a state needs, so that it can save one when the others are gone."""
        return True

    def backward(self, step: int, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch of update number ``step``; with --fused_backward_pass weights change already."""
        if self._fused is not None:
            self.weights.remember(step)
            self._fused.begin(loss)
        self._accelerator.backward(loss)

    def sum_gradients(self) -> None:
        """Over processes; then true-sized again, so that all processes see the same overflow."""
        if self._gradients is not None:
            self._gradients.reduce()
        if self.scales_losses:
            self._accelerator.unscale_gradients(self._stepped)

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Update number ``step`` with the gradients there are. ``loss`` () is summed over processes.

        Returns the gradient's norm before clipping, whether loss and gradient were finite (else the weights stay), and
        MAX_NORM_CURVES with --scale_weight_norms; all on the device.
        """
        norm, finite = self._change_weights(step, loss)
        self.weights.keep_if(finite)
        self._schedule.step()
        return norm.float(), finite.float(), self._keep_max_norm()

    def _change_weights(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self._fused is not None:
            return self._fused.finish(loss)
        assert self._gradients is not None
        norm = self._gradients.clip()
        finite = self._gradients.drop_if_not_finite(loss)
        self.weights.remember(step)
        self._stepped.step()
        self._gradients.zero()
        return norm, finite

    def _keep_max_norm(self) -> list[Tensor]:
        if not self._max_weight_norm:
            return []
        device = self._accelerator.device
        numbers = self.network.apply_max_norm_regularization(self._max_weight_norm, device)
        return [n.float() if isinstance(n, Tensor) else torch.full((), float(n), device=device) for n in numbers]

    def rates(self) -> dict[str, float]:
        """The learning rates of the next step, under the names of their curves."""
        rates: dict[str, float] = {}
        for name, group in zip(self._group_names, self._optimizer.param_groups, strict=True):
            rates[f"lr/{name}"] = float(group["lr"])
            if "d" in group:  # D-Adaptation and Prodigy estimate the step size
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
        return rates

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off, averaged weights in, full strength; back to training afterwards."""
        self.network.eval()
        try:
            with self.strength.at(1.0), evaluation_weights(self._optimizer):
                yield
        finally:
            self.network.train()

    def advance_schedule(self, steps: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects an optimizer step before each of these
            for _ in range(steps):
                self._schedule.step()

    def state(self) -> dict[str, Any]:
        """Optimizer, schedule and scaler, for torch.save; the network's weights are apart."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": optimizer_state(self._optimizer),
            "schedule": self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def gathered_state(self, group: HostGroup) -> dict[str, Any]:
        """``state()`` of all processes together, in each of them. Called by all."""
        return self.state()

    def load_state(self, training: dict[str, Any], network: dict[str, Tensor]) -> None:
        """Puts back what ``gathered_state()`` and the network's ``state_dict()`` gave. Raises CheckpointError where that does not
        fit."""
        own = self.network.state_dict()
        wrong = [name for name in own.keys() | network.keys() if name not in own or name not in network]
        if wrong:
            raise CheckpointError(f"the state is of another network: {len(wrong)} tensors differ, such as {sorted(wrong)[0]}")
        with torch.no_grad():
            for name, tensor in network.items():
                own[name].copy_(tensor)
        load_optimizer_state(self._optimizer, training["optimizer"])
        self._schedule.load_state_dict(training["schedule"])
        if training["scaler"] is not None:
            self._load_scale(training["scaler"])
        self.weights = TrainedWeights(self._trained)

    def _load_scale(self, saved: dict[str, Any]) -> None:
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(saved)
