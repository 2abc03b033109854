from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from library.errors import CheckpointError, OptionError
from library.options.optimizer import OptimizerOptions
from library.training.optimizing.optimizers import create_optimizer, evaluation_weights, load_optimizer_state, optimizer_state

RESUMABLE = {
    "AdamW": ("AdamW",),
    "AdamW, amsgrad": ("AdamW", "amsgrad=True"),
    "AdamW8bit": ("AdamW8bit",),
    "Lion8bit": ("Lion8bit",),
    "PagedAdamW8bit": ("PagedAdamW8bit",),
    "SGDNesterov8bit": ("SGDNesterov8bit",),
    "SGDNesterov": ("SGDNesterov",),
    "SGD": ("SGD",),
    "NAdam": ("NAdam",),
    "Adafactor, own rates": ("Adafactor",),
    "Adafactor": ("Adafactor", "relative_step=False", "scale_parameter=False"),
    "Adafactor, first moment": ("Adafactor", "beta1=0.9"),
}
OPTIONAL = {
    "Lion": "lion_pytorch",
    "Prodigy": "prodigyopt",
    "DAdaptAdam": "dadaptation",
    "DAdaptLion": "dadaptation",
    "AdamWScheduleFree": "schedulefree",
    "RAdamScheduleFree": "schedulefree",
    "SGDScheduleFree": "schedulefree",
}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def options(name: str = "", *arguments: str, learning_rate: float = 1e-2) -> OptimizerOptions:
    return OptimizerOptions(optimizer_type=name, optimizer_args=list(arguments) or None, learning_rate=learning_rate)


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One tensor that 8-bit optimizers quantise (4096 elements and more), one that they do not, and a vector."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((64, 96), (16, 8), (8,))]


def groups(params: list[nn.Parameter], second_lr: float = 3e-3) -> list[dict]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": second_lr}]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def check_resume(made: OptimizerOptions, dtype: torch.dtype, second_lr: float = 3e-3) -> None:
    straight = weights(dtype)
    optimizer = create_optimizer(groups(straight, second_lr), made).optimizer
    train(optimizer, straight, range(3))
    saved, values = through_a_file(optimizer_state(optimizer)), [param.detach().clone() for param in straight]
    train(optimizer, straight, range(3, 7))

    resumed = [nn.Parameter(value) for value in values]
    other = create_optimizer(groups(resumed, second_lr), made).optimizer
    load_optimizer_state(other, saved)
    train(other, resumed, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert same(optimizer_state(optimizer), optimizer_state(other))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESUMABLE)
def test_resumed_is_uninterrupted(case, dtype):
    check_resume(options(*RESUMABLE[case]), dtype)


@pytest.mark.parametrize("name", OPTIONAL)
def test_resumed_is_uninterrupted_with_optional_packages(name):
    pytest.importorskip(OPTIONAL[name])
    check_resume(options(name, learning_rate=1.0), torch.float32, second_lr=1.0)


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_one_step_size_for_all(name):
    pytest.importorskip(OPTIONAL[name])
    with pytest.raises(OptionError, match="finds one step size for all weights.*--unet_lr"):
        create_optimizer(groups(weights()), options(name, learning_rate=1.0))


def test_eight_bit_states_are_bytes_and_stay_so():
    params = weights()
    optimizer = create_optimizer(groups(params), options("AdamW8bit")).optimizer
    train(optimizer, params, range(2))
    saved = through_a_file(optimizer_state(optimizer))
    assert saved["state"][0]["state1"].dtype == torch.uint8
    assert saved["state"][1]["state1"].dtype == torch.float32
    load_optimizer_state(optimizer, saved)
    assert optimizer.state[params[0]]["state2"].dtype == torch.uint8
    assert optimizer.state[params[0]]["step"] == 2


def test_loaded_states_are_copies():
    params = weights()
    optimizer = create_optimizer(groups(params), options()).optimizer
    train(optimizer, params, range(2))
    saved = optimizer_state(optimizer)
    before = saved["state"][0]["exp_avg"].clone()
    other = create_optimizer(groups(weights()), options()).optimizer
    load_optimizer_state(other, saved)
    train(optimizer, params, range(2, 3))
    assert torch.equal(other.state[other.param_groups[0]["params"][0]]["exp_avg"], before)


def test_a_state_before_the_first_step():
    optimizer = create_optimizer(groups(weights()), options("AdamW8bit")).optimizer
    load_optimizer_state(optimizer, through_a_file(optimizer_state(optimizer)))
    assert not optimizer.state


def test_state_of_another_optimizer():
    saved = optimizer_state(create_optimizer(groups(weights()), options("SGD")).optimizer)
    with pytest.raises(CheckpointError, match=r"saved with the optimizer torch.optim.sgd.SGD.*AdamW"):
        load_optimizer_state(create_optimizer(groups(weights()), options("AdamW")).optimizer, saved)


def test_state_of_other_weights():
    saved = optimizer_state(create_optimizer(groups(weights()), options()).optimizer)
    with pytest.raises(CheckpointError, match="3 weights in 2 groups.* 3 in 1|3 weights in 2 groups.*3 weights in 1 groups"):
        load_optimizer_state(create_optimizer([{"params": weights()}], options()).optimizer, saved)


def test_a_foreign_state():
    with pytest.raises(CheckpointError, match="has no class, groups, shapes"):
        load_optimizer_state(create_optimizer(groups(weights()), options()).optimizer, {"state": {}})


def test_descriptions_for_the_metadata():
    assert create_optimizer(groups(weights()), options()).description == "torch.optim.adamw.AdamW"
    made = create_optimizer(groups(weights()), options("SGDNesterov", "weight_decay=0.01", "momentum=0.8"))
    assert made.description == "torch.optim.sgd.SGD(weight_decay=0.01,momentum=0.8)"


def test_learning_rates_of_groups():
    optimizer = create_optimizer(groups(weights()), options(learning_rate=0.5)).optimizer
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 3e-3]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_sgd_nesterov_is_one():
    (group, _) = create_optimizer(groups(weights()), options("sgdnesterov")).optimizer.param_groups
    assert group["nesterov"] is True
    assert group["momentum"] == 0.9


def test_adafactor_with_its_own_rates_gets_none():
    optimizer = create_optimizer(groups(weights()), options("Adafactor")).optimizer
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    plain = create_optimizer(groups(weights()), options("Adafactor", "relative_step=False")).optimizer
    assert [group["lr"] for group in plain.param_groups] == [1e-2, 3e-3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("AdamW", "beta=0.9"), r"AdamW has no argument beta \(did you mean betas\?\); it takes amsgrad, betas"),
        (("AdamW", "weight_decay='a'"), r"weight_decay='a' must be a number \(default 0.01\)"),
        (("AdamW", "betas=0.9"), r"betas=0.9 must be several values"),
        (("AdamW", "amsgrad=1"), r"amsgrad=1 must be True or False"),
        (("AdamW", "lr=0.1"), r"the trainer sets lr itself"),
        (("SGDNesterov", "nesterov=False"), r"the trainer sets nesterov itself"),
        (("AdamW", "weight_decay=-1"), r"torch.optim.AdamW cannot be made with weight_decay=-1: Invalid weight_decay value"),
        (("Adafactor", "relative=False"), r"did you mean relative_step"),
        (("torch.nn.Linearr",), r"torch.nn has no class Linearr \(did you mean Linear\?\)"),
        (("torch.nothing.Here",), r"importing torch.nothing failed"),
    ],
)
def test_arguments_the_class_does_not_take(arguments, expected):
    with pytest.raises(OptionError, match=expected):
        create_optimizer(groups(weights()), options(*arguments))


def test_missing_package_when_importing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(OptionError, match="pip install prodigyopt"):
        create_optimizer(groups(weights()), options("Prodigy"))


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_optimizers.py").write_text("import torch\nclass Mine(torch.optim.SGD):\n    pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert create_optimizer(groups(weights()), options("my_optimizers.Mine")).description == "my_optimizers.Mine"


class Averaging(torch.optim.SGD):
    """Switches to other weights for evaluation, as schedule-free optimizers do: there and back rounds."""

    training = False

    def train(self) -> None:
        if not self.training:
            self._scale(3.0)
        self.training = True

    def eval(self) -> None:
        if self.training:
            self._scale(1 / 3.0)
        self.training = False

    @torch.no_grad()
    def _scale(self, factor: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(factor)


def test_evaluation_leaves_no_trace():
    params = weights()
    optimizer = Averaging(params, lr=0.1)
    optimizer.train()
    before = [param.detach().clone() for param in params]
    with evaluation_weights(optimizer):
        assert torch.allclose(params[0], before[0] / 3)
        assert not optimizer.training
    assert optimizer.training
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_evaluation_of_ordinary_optimizers_changes_nothing():
    params = weights()
    with evaluation_weights(create_optimizer(groups(params), options()).optimizer):
        assert torch.equal(params[0], weights()[0])


def test_optimizers_with_modes_start_in_training_mode(tmp_path, monkeypatch):
    code = (
        "import torch\nclass Switching(torch.optim.SGD):\n    mode = 'eval'\n    def train(self):\n        self.mode = 'train'\n"
    )
    (tmp_path / "switching.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert create_optimizer(groups(weights()), options("switching.Switching")).optimizer.mode == "train"


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_evaluation_leaves_no_trace(name):
    pytest.importorskip("schedulefree")
    params = weights()
    made = create_optimizer(groups(params), options(name))
    train(made.optimizer, params, range(12))
    before = [param.detach().clone() for param in params]
    with evaluation_weights(made.optimizer):
        assert not torch.equal(params[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
