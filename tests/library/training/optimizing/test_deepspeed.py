"""What DeepSpeedLearner does around DeepSpeed's engine, with a stand-in for it; test_deepspeed_runs.py has the real one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from library.errors import CheckpointError, OptionError
from library.files.torch_file import torch_bytes
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.files.state import OPTIMIZER, StateDescription, StateSettings, check_identity, optimizer_pieces
from library.training.models.networks import optimizer_groups
from library.training.optimizing import deepspeed as of_deepspeed
from library.training.optimizing.deepspeed import FIRST_SCALE, GROWTH_STEPS, DeepSpeedLearner, LossScale, engine_config, trainable
from library.training.optimizing.learner import Learner
from library.training.steps import Progress

BASE = ["--pretrained_model_name_or_path=x", "--qwen3=x", "--vae=x", "--dataset_config=x", "--output_dir=x", "--output_name=x"]
BASE += ["--network_module=networks.lora_anima", "--learning_rate=1e-2", "--lr_scheduler=cosine"]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.unused = (nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(3))

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        groups = [{"params": [self.first, frozen]}, {"params": [frozen]}, {"params": [self.second, self.unused], "lr": 5e-3}]
        return groups, ["first", "nothing", "second"]

    def apply_max_norm_regularization(self, max_norm, device):
        norm = self.second.norm()
        with torch.no_grad():
            self.second.mul_((max_norm / norm).clamp(max=1.0))
        return (norm > max_norm).float(), norm, norm


class Accelerator(SimpleNamespace):
    """One process. ``scaler``: any object = fp16."""

    device, num_processes, process_index, scaler = torch.device("cpu"), 1, 0, None

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class StandInEngine:
    """Sums, clips and steps for one process as DeepSpeed's stages 0 and 2 do: in stage 2, with a copy of the weights of its own."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, config: dict):
        self.module, self.basic, self.max_norm = network, optimizer, config.get("gradient_clipping", 0.0)
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.refreshed = 0
        shared = config["zero_optimization"]["stage"] > 0
        self.optimizer = self if shared else optimizer
        self.overflow, self.norm = False, torch.zeros(())

    def refresh_fp32_params(self) -> None:
        self.refreshed += 1

    def backward(self, loss: Tensor) -> None:
        assert all(weight.grad is None for weight in self.weights), "gradients reached the engine before they were handed over"
        loss.backward()

    def step(self) -> None:
        self.norm = nn.utils.clip_grad_norm_(self.weights, self.max_norm or float("inf"))
        self.overflow = not bool(torch.isfinite(self.norm))
        if not self.overflow:
            self.basic.step()
        self.zero_grad()

    def get_global_grad_norm(self) -> Tensor | float:
        return float("inf") if self.overflow else self.norm

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    def start(network, optimizer, config, *, device):
        return StandInEngine(network, optimizer, config)

    monkeypatch.setattr(of_deepspeed, "start_engine", start)


def options_of(*arguments: str):
    return read_options(AnimaTrainOptions, [*BASE, *arguments])


def learner_of(*arguments: str, accelerator: Accelerator | None = None) -> Learner:
    network, options = Network(), options_of(*arguments)
    groups = optimizer_groups(network, options.optimizer, None)
    made = DeepSpeedLearner if options.distributed.deepspeed else Learner
    if made is Learner:
        groups = trainable(groups)
    return made(network, accelerator or Accelerator(), options, groups=groups, total_steps=8)


def update(learner: Learner, step: int, *, factor: float = 1.0, parts: int = 2):
    total = torch.zeros(())
    for part in range(parts):
        data = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + part))
        used = data @ learner.network.first if part else data @ learner.network.first @ learner.network.second
        loss = used.square().mean() / parts * factor
        learner.backward(step, loss)
        total += loss.detach()
    learner.sum_gradients()
    return learner.step(step, total)


def weights_of(learner: Learner) -> list[Tensor]:
    return [weight.detach().clone() for weight in learner.network.parameters()]


@pytest.mark.parametrize("stage", ["0", "2"])
@pytest.mark.parametrize("limit", ["0", "0.1"])
def test_trains_as_without_deepspeed(stage, limit):
    """Also with a weight that no loss depends on, groups without weights, and a limit on the gradient."""
    ours, plain = (learner_of(*more, f"--max_grad_norm={limit}") for more in (("--deepspeed", f"--zero_stage={stage}"), ()))
    for step in range(3):
        assert ours.rates() == plain.rates() and list(ours.rates()) == ["lr/first", "lr/second"]
        (norm, finite, _), (plain_norm, plain_finite, _) = update(ours, step), update(plain, step)
        torch.testing.assert_close(norm, plain_norm)
        assert finite == plain_finite == 1.0 and norm.dtype == torch.float32
    torch.testing.assert_close(weights_of(ours), weights_of(plain))


@pytest.mark.parametrize("stage", ["0", "2"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e38])
def test_a_step_that_is_not_finite_changes_nothing(stage, factor):
    learner = learner_of("--deepspeed", f"--zero_stage={stage}")
    update(learner, 0)
    before, moments = weights_of(learner), learner.state()["optimizer"]["state"][0]["exp_avg"].clone()
    _, finite, _ = update(learner, 1, factor=factor)
    assert finite == 0.0
    assert all(map(torch.equal, weights_of(learner), before))
    assert torch.equal(learner.state()["optimizer"]["state"][0]["exp_avg"], moments)
    assert update(learner, 2)[1] == 1.0 and not torch.equal(weights_of(learner)[0], before[0])


def test_a_loss_that_is_not_finite_elsewhere_skips_the_step_here_too():
    """Of another process: the summed loss tells, while the gradient here is fine."""
    learner = learner_of("--deepspeed")
    before = weights_of(learner)
    learner.backward(0, learner.network.first.sum())
    assert learner.step(0, torch.tensor(float("nan")))[1] == 0.0
    assert all(map(torch.equal, weights_of(learner), before))


def test_a_process_without_images_still_steps():
    """Its gradient is zero; the others wait for it in the engine."""
    learner = learner_of("--deepspeed")
    norm, finite, _ = learner.step(0, torch.zeros(()))
    assert norm == 0 and finite == 1.0


def test_in_fp16_the_loss_is_scaled_and_an_overflow_halves_the_scale():
    fp16 = learner_of("--deepspeed", accelerator=Accelerator(scaler=object()))
    plain = learner_of()
    assert fp16.scales_losses and not plain.scales_losses
    for step in range(2):
        torch.testing.assert_close(update(fp16, step)[0], update(plain, step)[0])
    torch.testing.assert_close(weights_of(fp16), weights_of(plain))
    assert fp16.state()["scaler"] == {"value": FIRST_SCALE, "good_steps": 2}
    update(fp16, 2, factor=float("inf"))
    state = fp16.state()
    assert state["scaler"] == {"value": FIRST_SCALE / 2, "good_steps": 0}
    resumed = learner_of("--deepspeed", accelerator=Accelerator(scaler=object()))
    resumed.load_state({**state, "optimizer": {"parts": [state["optimizer"]]}}, fp16.network.state_dict())
    assert resumed.state()["scaler"] == state["scaler"]


def test_loss_scale_doubles_after_many_good_steps():
    scale = LossScale()
    for _ in range(GROWTH_STEPS):
        assert scale.value == FIRST_SCALE
        scale.update(finite=True)
    assert scale.state() == {"value": 2 * FIRST_SCALE, "good_steps": 0}


def test_weights_that_were_changed_past_the_engine_are_told_to_it():
    learner = learner_of("--deepspeed", "--scale_weight_norms=0.5")
    assert update(learner, 0)[2][0] == 1.0
    assert learner._engine.refreshed == 1 and learner.network.second.norm() <= 0.5001
    alone = learner_of("--deepspeed", "--zero_stage=0", "--scale_weight_norms=0.5")
    assert update(alone, 0)[2][0] == 1.0 and alone._engine.refreshed == 0


def test_state_has_the_parts_of_all_processes_and_each_takes_its_own():
    learner = learner_of("--deepspeed")
    update(learner, 0)
    other = {"class": "of the other process"}
    group = SimpleNamespace(gather=lambda part: [part, bytes(torch_bytes(other))])
    state = learner.gathered_state(group)
    assert len(state["optimizer"]["parts"]) == 2 and state["optimizer"]["parts"][1] == other
    assert learner.can_save_alone
    with pytest.raises(CheckpointError, match="in 2 parts, one for each process .* this run has 1: start as many"):
        learner.load_state(state, learner.network.state_dict())

    resumed = learner_of("--deepspeed")
    resumed.load_state({**state, "optimizer": {"parts": state["optimizer"]["parts"][:1]}}, learner.network.state_dict())
    assert resumed._engine.refreshed == 1
    assert update(learner, 1)[0] == update(resumed, 1)[0]
    assert all(map(torch.equal, weights_of(resumed), weights_of(learner)))
    with pytest.raises(CheckpointError, match="in 0 parts"):
        resumed.load_state(learner.state(), learner.network.state_dict())


def test_state_of_stage_0_is_that_of_a_run_without_deepspeed():
    learner, plain = learner_of("--deepspeed", "--zero_stage=0"), learner_of()
    update(learner, 0)
    state = learner.gathered_state(SimpleNamespace())
    plain.load_state(state, learner.network.state_dict())
    update(learner, 1), update(plain, 1)
    torch.testing.assert_close(weights_of(learner), weights_of(plain))


def test_a_state_of_another_number_of_processes_is_refused_before_anything_is_loaded(tmp_path):
    def settings(processes: int, *flags: str) -> StateSettings:
        return StateSettings({OPTIMIZER: optimizer_pieces(options_of(*flags), processes)}, {})

    def saved_by(run: StateSettings) -> StateDescription:
        return StateDescription(epoch=0, progress=Progress(1, 1), seed=1, identity=run.identity, history={}, losses=[])

    two, one, alone, plain = (
        settings(2, "--deepspeed"),
        settings(1, "--deepspeed"),
        settings(2, "--deepspeed", "--zero_stage=0"),
        settings(2),
    )
    assert check_identity(tmp_path, saved_by(two), settings(2, "--deepspeed", "--zero_stage=1")) == []
    assert check_identity(tmp_path, saved_by(alone), plain) == []
    for other in (one, plain):
        with pytest.raises(
            OptionError, match="with the optimizer as 2 pieces of --deepspeed, one for each process, but this run has"
        ):
            check_identity(tmp_path, saved_by(two), other)
    older = replace(saved_by(plain), identity={})
    assert check_identity(tmp_path, older, plain) == []
    with pytest.raises(OptionError, match="with the optimizer as one piece, but this run has 1 piece of --deepspeed"):
        check_identity(tmp_path, older, one)


def test_only_one_of_several_cannot_save_a_state():
    assert not learner_of("--deepspeed", accelerator=Accelerator(num_processes=2)).can_save_alone
    assert learner_of("--deepspeed", "--zero_stage=0", accelerator=Accelerator(num_processes=2)).can_save_alone


def test_flags_become_deepspeeds_configuration(monkeypatch):
    for name in ("ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    flags = ("--deepspeed", "--zero_stage=1", "--offload_optimizer_device=cpu", "--max_grad_norm=0.5", "--train_batch_size=3")
    config = engine_config(options_of(*flags), processes=4, weights=1000)
    zero = config["zero_optimization"]
    assert zero["stage"] == 1 and zero["offload_optimizer"]["device"] == "cpu" and zero["offload_param"]["device"] == "none"
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1000
    assert config["gradient_clipping"] == 0.5 and config["gradient_accumulation_steps"] == 1
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (3, 12)
    assert not config["bf16"]["enabled"] and not config["fp16"]["enabled"]

    default = engine_config(options_of("--deepspeed", "--max_grad_norm=0"), processes=1, weights=10**9)
    assert default["zero_optimization"]["stage"] == 2 and default["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    assert default["zero_optimization"]["offload_optimizer"]["device"] == "none" and not default.get("gradient_clipping")
