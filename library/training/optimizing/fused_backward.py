"""--fused_backward_pass: weights change while the backward pass still runs, so that their gradients never exist all at once.

As soon as a bucket of gradients is complete, the optimizer steps for its weights and the gradients are freed. A bucket is what
has arrived since the last one, about a transformer block's share. The order of an update::

    fused.begin(loss)                  # loss (): of the whole update, which has one micro-batch
    loss.backward()                    # steps for each bucket that fills up
    norm, finite = fused.finish(loss)  # steps for the rest; a weight without a gradient gets one of zeros, as in Gradients

Each weight's result is the one that a step for all of them gives, bit by bit, for optimizers that look at one weight at a time.
There is no clipping, and of a gradient that is not finite what came before the first such bucket has gone into the optimizer's
moments; the caller takes the weights back (TrainedWeights). A loss that is not finite is known in time: all gradients are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import TrainingError
from library.training.optimizing.gradients import Gradients

BUCKETS = 32  # in an update: about as many as the models have blocks; each costs the host one call of the optimizer


class FusedBackward:
    """Steps of ``optimizer`` from inside the backward pass, for its weights that require gradients now."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        numbered = [(param, number) for number, group in enumerate(optimizer.param_groups) for param in group["params"]]
        self._params: list[nn.Parameter] = [param for param, _ in numbered if param.requires_grad]
        self._group_of = {id(param): number for param, number in numbered}
        self._full_bytes = sum(param.nbytes for param in self._params) / BUCKETS
        self._is_open = False
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, loss: Tensor) -> None:
        """Called before the backward pass of ``loss`` (), the only one of this update."""
        self._is_open = True
        self._bucket: list[nn.Parameter] = []
        self._bucket_bytes = 0
        self._taken: set[int] = set()  # ids of weights that are done with this update, or wait in the bucket
        self._norms: list[Tensor] = []
        self._watched = loss.detach().float()  # not finite as soon as the loss or a bucket's norm is not
        self._values = [_without_params(group) for group in self._optimizer.param_groups]
        self._new_values = list(self._values)

    def finish(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Called after the backward pass, with the loss summed over processes.

        Returns the 2-norm of the whole gradient, () float32, and whether loss and gradient were finite, () bool.
        """
        for param in self._params:
            if id(param) not in self._taken:
                self._put(param)
        if self._bucket:
            self._step_bucket()
        for group, values in zip(self._optimizer.param_groups, self._new_values, strict=True):
            _set_values(group, values, group["params"])
        self._is_open = False
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        return norm, torch.isfinite(norm) & torch.isfinite(self._watched) & torch.isfinite(loss.detach()).all().to(norm.device)

    def _arrived(self, param: nn.Parameter) -> None:
        """Called by autograd when ``param.grad`` is complete."""
        assert self._is_open, "begin() comes before the backward pass"
        if id(param) in self._taken:
            raise TrainingError(
                "--fused_backward_pass: a weight got a second gradient in one step, when it had changed already; this model or "
                "network runs a layer twice: drop the flag"
            )
        self._put(param)

    def _put(self, param: nn.Parameter) -> None:
        self._taken.add(id(param))
        self._bucket.append(param)
        self._bucket_bytes += param.nbytes
        if self._bucket_bytes >= self._full_bytes:
            self._step_bucket()

    def _step_bucket(self) -> None:
        bucket, self._bucket, self._bucket_bytes = self._bucket, [], 0
        gradients = Gradients(bucket, max_norm=0.0)
        norm = gradients.clip()
        gradients.drop_if_not_finite(self._watched)
        self._norms.append(norm)
        self._watched = self._watched + norm
        with self._only(bucket):
            self._optimizer.step()
        for param in bucket:
            param.grad = None

    @contextmanager
    def _only(self, bucket: Sequence[nn.Parameter]) -> Iterator[None]:
        """The optimizer has these weights alone, and its groups have the values from before the update.

        Optimizers that count steps in a group would otherwise count one for each bucket.
        """
        groups = list(self._optimizer.param_groups)
        everything = [group["params"] for group in groups]
        members: dict[int, list[nn.Parameter]] = {}
        for param in bucket:
            members.setdefault(self._group_of[id(param)], []).append(param)
        for number, params in members.items():
            _set_values(groups[number], self._values[number], params)
        self._optimizer.param_groups[:] = [groups[number] for number in members]
        try:
            yield
        finally:
            self._optimizer.param_groups[:] = groups
            for number in members:
                self._new_values[number] = _without_params(groups[number])
                _set_values(groups[number], self._values[number], everything[number])


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _set_values(group: dict[str, Any], values: dict[str, Any], params: Sequence[Tensor]) -> None:
    group.clear()
    group.update(params=params, **values)
