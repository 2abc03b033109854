"""--fused_backward_pass gives what the plain way gives, with less gradient memory."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from library.errors import TrainingError
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.models.networks import optimizer_groups
from library.training.optimizing.fused_backward import BUCKETS, FusedBackward
from library.training.optimizing.learner import Learner

BASE = ["--pretrained_model_name_or_path=x", "--qwen3=x", "--vae=x", "--dataset_config=x", "--output_dir=x"]
BASE += ["--output_name=x", "--network_module=networks.lora_anima", "--max_grad_norm=0", "--learning_rate=1e-2"]
SCHEDULE = ("--lr_scheduler=cosine",)
OPTIMIZERS = [
    ("AdamW", "weight_decay=0.1"),
    ("Adafactor", "relative_step=False", "scale_parameter=False", "warmup_init=False"),
    ("Adafactor",),  # finds each weight's step size by itself
    ("AdamW8bit", "min_8bit_size=64"),
    ("bitsandbytes.optim.Lion",),
    ("torch.optim.SGD", "momentum=0.9"),
    ("tests.library.training.optimizing.test_fused_backward.CountsInGroups",),
]


class CountsInGroups(torch.optim.Optimizer):
    """Counts steps in its groups, as some packages' optimizers do."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] / group["step"])


class Tower(nn.Module):
    """A network with the calls that the Learner makes: ``depth`` layers one after the other, at two learning rates."""

    def __init__(self, depth: int = 12, width: int = 72):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.downs = nn.ParameterList(torch.randn(4, width, generator=generator) / 8 for _ in range(depth))
        self.ups = nn.ParameterList(torch.randn(width, 4, generator=generator) / 8 for _ in range(depth))
        self.spare = nn.Parameter(torch.ones(5, 7))  # part of no pass, as a LoRA of a model that is not run

    def forward(self, x: Tensor) -> Tensor:
        for down, up in zip(self.downs, self.ups, strict=True):
            x = x + torch.tanh(x @ down.t()) @ up.t()
        return x

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        groups = [{"params": [*self.downs, self.spare], "lr": default_lr}, {"params": list(self.ups), "lr": 3 * default_lr}]
        return groups, ["down", "up"]

    def apply_max_norm_regularization(self, max_norm, device):
        with torch.no_grad():
            norms = torch.stack([(up @ down).norm() for up, down in zip(self.ups, self.downs, strict=True)])
            for up, norm in zip(self.ups, norms, strict=True):
                up.mul_((max_norm / norm).clamp(max=1.0))
        return (norms > max_norm).sum(), norms.mean(), norms.max()


class PlainAccelerator(SimpleNamespace):
    scaler = None
    device = torch.device("cpu")

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def learner_of(network: nn.Module, *arguments: str, fused: bool, optimizer: tuple[str, ...] = ("AdamW",)) -> Learner:
    name, *given = optimizer
    flags = [*BASE, f"--optimizer_type={name}", *(["--optimizer_args", *given] if given else []), *arguments]
    options = read_options(AnimaTrainOptions, flags + (["--fused_backward_pass"] if fused else []))
    groups = optimizer_groups(network, options.optimizer, None)
    return Learner(network, PlainAccelerator(), options, groups=groups, total_steps=8)


def data(step: int) -> Tensor:
    return torch.randn(3, 72, generator=torch.Generator().manual_seed(step))


def update(learner: Learner, step: int, factor: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    loss = learner.network(data(step)).square().mean() * factor
    learner.backward(step, loss)
    learner.sum_gradients()
    return learner.step(step, loss.detach())


def same(one, other) -> bool:
    """Tensors bit by bit, also inside dictionaries and lists."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(params=OPTIMIZERS, ids=lambda optimizer: optimizer[0].rpartition(".")[2])
def pair(request) -> tuple[Learner, Learner]:
    """The same network twice, trained the fused way and the plain one."""
    return tuple(learner_of(Tower(), *SCHEDULE, fused=fused, optimizer=request.param) for fused in (True, False))


def test_weights_states_and_rates_are_those_of_the_plain_way(pair):
    fused, plain = pair
    for step in range(4):
        (norm, finite, _), (plain_norm, plain_finite, _) = update(fused, step), update(plain, step)
        torch.testing.assert_close(norm, plain_norm, rtol=1e-6, atol=0)
        assert finite == plain_finite == 1.0 and norm.dtype == plain_norm.dtype
        assert same(fused.network.state_dict(), plain.network.state_dict())
        assert fused.rates() == plain.rates()
    assert same(fused.state(), plain.state())
    assert all(param.grad is None for param in fused.network.parameters())


def test_a_loss_that_is_not_finite_is_dropped_as_in_the_plain_way(pair):
    fused, plain = pair
    for step, factor in enumerate((1.0, float("nan"), 1.0, float("inf"), 1.0)):
        before = {key: value.clone() for key, value in fused.network.state_dict().items()}
        (_, finite, _), (_, plain_finite, _) = update(fused, step, factor), update(plain, step, factor)
        assert finite == plain_finite == float(factor == 1.0)
        assert same(fused.network.state_dict(), before) == (factor != 1.0)
        assert same(fused.network.state_dict(), plain.network.state_dict())
    assert same(fused.state(), plain.state())


def test_a_gradient_that_is_not_finite_halfway(pair):
    """The loss is finite, and so are the gradients of the last layers: the weights stay, and no moment is spoilt."""
    fused, _ = pair
    update(fused, 0)
    before = {key: value.clone() for key, value in fused.network.state_dict().items()}
    handle = fused.network.ups[5].register_hook(lambda grad: torch.full_like(grad, float("nan")))
    norm, finite, _ = update(fused, 1)
    handle.remove()
    assert not torch.isfinite(norm) and finite == 0.0
    assert same(fused.network.state_dict(), before)
    assert update(fused, 2)[1] == 1.0
    assert all(torch.isfinite(value).all() for value in fused.network.state_dict().values())


def test_it_learns_with_less_gradient_memory():
    """The largest sum of live gradients, in bytes, seen whenever one arrives."""

    def peak(fused: bool) -> tuple[int, int]:
        network = Tower(depth=40)
        weights = list(network.parameters())
        seen = []
        for weight in weights:  # before the learner's own, so that they see what has not been freed yet
            weight.register_post_accumulate_grad_hook(
                lambda _: seen.append(sum(w.grad.nbytes for w in weights if w.grad is not None))
            )
        learner = learner_of(network, fused=fused)
        for step in range(2):
            update(learner, step)
        return max(seen), sum(weight.nbytes for weight in weights)

    largest, everything = peak(fused=True)
    assert everything / BUCKETS <= largest <= 2 * everything / BUCKETS
    assert peak(fused=False)[0] == everything


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer[0].rpartition(".")[2])
def test_resumed_equals_uninterrupted(optimizer):
    whole = learner_of(Tower(), *SCHEDULE, fused=True, optimizer=optimizer)
    for step in range(2):
        update(whole, step)
    state = torch.load(saved(whole.state()), weights_only=True)
    other = learner_of(Tower(), *SCHEDULE, fused=True, optimizer=optimizer)
    other.load_state(state, {key: value.clone() for key, value in whole.network.state_dict().items()})
    for step in range(2, 5):
        update(whole, step)
        update(other, step)
    assert same(whole.network.state_dict(), other.network.state_dict()) and same(whole.state(), other.state())


def saved(state: dict) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream


def test_weights_go_back_to_the_last_good_ones():
    learner = learner_of(Tower(), fused=True)
    first = {key: value.clone() for key, value in learner.network.state_dict().items()}
    _, finite, _ = update(learner, 0)
    learner.weights.learned(0, bool(finite))
    assert not same(learner.network.state_dict(), first)
    learner.weights.restore_good()
    assert same(learner.network.state_dict(), first)


def test_max_norm_acts_after_the_step():
    fused, plain = (learner_of(Tower(), "--scale_weight_norms=0.5", fused=way) for way in (True, False))
    for step in range(3):
        assert same(update(fused, step)[2], update(plain, step)[2])
        assert same(fused.network.state_dict(), plain.network.state_dict())


def test_one_dtype_beside_another():
    learners = []
    for way in (True, False):
        network = Tower().bfloat16()
        network.spare.data = network.spare.data.float()
        learners.append(learner_of(network, fused=way))
    for learner in learners:
        for step in range(2):
            loss = learner.network(data(step).bfloat16()).float().square().mean()
            learner.backward(step, loss)
            learner.sum_gradients()
            learner.step(step, loss.detach())
    assert same(learners[0].network.state_dict(), learners[1].network.state_dict())


def test_validation_leaves_the_gradients_alone():
    learner = learner_of(Tower(), fused=True)
    with learner.evaluating(), torch.no_grad():
        learner.network(data(0))
    update(learner, 0)
    assert all(param.grad is None for param in learner.network.parameters())


def test_a_second_gradient_of_a_weight_is_told():
    weight = nn.Parameter(torch.ones(3))
    fused = FusedBackward(torch.optim.SGD([weight], lr=0.1))
    loss = weight.square().sum()
    fused.begin(loss)
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError, match="--fused_backward_pass: a weight got a second gradient"):
        weight.sum().backward()


def test_checkpointed_layers():
    """What is computed again in the backward pass sees the weights of the forward pass."""
    from torch.utils.checkpoint import checkpoint

    def run(fused: bool, reentrant: bool) -> Learner:
        learner = learner_of(Tower(), fused=fused)
        for step in range(2):
            x = data(step).requires_grad_()
            for down, up in zip(learner.network.downs, learner.network.ups, strict=True):
                x = checkpoint(lambda x, a, b: x + torch.tanh(x @ a.t()) @ b.t(), x, down, up, use_reentrant=reentrant)
            loss = x.square().mean()
            learner.backward(step, loss)
            learner.sum_gradients()
            learner.step(step, loss.detach())
        return learner

    for reentrant in (True, False):
        assert same(run(True, reentrant).network.state_dict(), run(False, False).network.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    def run(fused: bool) -> dict[str, Tensor]:
        network = Tower().cuda()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        way = FusedBackward(optimizer) if fused else None
        for step in range(3):
            loss = network(data(step).cuda()).square().mean()
            if way is not None:
                way.begin(loss)
            else:
                optimizer.zero_grad()
            loss.backward()
            if way is not None:
                way.finish(loss)
            else:
                network.spare.grad = torch.zeros_like(network.spare)
                optimizer.step()
        return network.state_dict()

    torch.testing.assert_close(run(fused=True), run(fused=False))
