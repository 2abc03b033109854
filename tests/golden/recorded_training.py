"""Recorded optimizer steps of LoRA training, made again with the parts that a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from golden_files import relative_error
from library.options.optimizer import OptimizerOptions
from library.options.schedule import ScheduleOptions
from library.training.optimizing.gradients import Gradients
from library.training.optimizing.optimizers import create_optimizer
from library.training.optimizing.schedules import create_schedule

STEPS = 5


def optimizer_steps(
    groups: list[dict], options: OptimizerOptions, loss_of: Callable[[int], Tensor], *, losses: Tensor, norms: Tensor
) -> Iterator[int]:
    """Compares each step's loss and the norm of its gradients, before they are clipped; yields after each step."""
    optimizer = create_optimizer(groups, options).optimizer
    schedule = create_schedule(optimizer, ScheduleOptions(), total_steps=STEPS, optimizer=options)
    gradients = Gradients([p for group in groups for p in group["params"]], max_norm=options.max_grad_norm)
    for step in range(STEPS):
        loss = loss_of(step)
        assert relative_error(loss.detach(), losses[step]) < 1e-4
        loss.backward()
        gradients.reduce()
        assert relative_error(gradients.clip(), norms[step]) < 1e-3
        assert gradients.drop_if_not_finite(loss)
        optimizer.step()
        schedule.step()
        gradients.zero()
        yield step


def start_of(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The initial LoRA of a file that keeps one alpha for all modules."""
    start = {name.removeprefix("lora/"): tensor.float() for name, tensor in recorded.items() if name.startswith("lora/")}
    return start | {f"{name.partition('.')[0]}.alpha": recorded["lora_alpha"] for name in start}


def compare_changes(trained: nn.Module, start: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each tensor by its largest element, and all changes together by their direction."""
    own = {name: tensor.reshape(expected[name].shape) for name, tensor in trained.state_dict().items() if name in expected}
    assert expected and own.keys() == expected.keys()
    changes = [torch.cat([(tensors[name] - start[name].reshape(tensors[name].shape)).flatten() for name in sorted(own)])
               for tensors in (own, expected)]  # fmt: skip
    assert changes[1].abs().max() > 1e-4
    assert cosine_similarity(*changes, dim=0) > 0.9999
    assert max(relative_error(own[name], expected[name]) for name in own) < 5e-3


def compare_elements(final: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """At most 1 % of the elements off by more than 2e-5, none by more than 5e-3: Adam amplifies noise around zero."""
    assert final.keys() == expected.keys()
    off = torch.cat([(final[name] - tensor).abs().flatten() for name, tensor in expected.items()])
    assert (off > 2e-5).float().mean() <= 0.01
    assert off.max() <= 5e-3
