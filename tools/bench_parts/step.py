"""The host's own work in a step of the tiny model: what the trainer adds to forward, backward and optimizer."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from library.dataset.batch import Batch
from library.training.running.interrupts import StopRequest
from tools.bench_parts.figures import Figure, seconds
from tools.bench_parts.tiny_run import CACHED_ON_DISK, make_tiny_run
from train_network import NetworkTrainer, StableDiffusionTrainer

OWN_PERCENT = 15.0  # target
SETTLING_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Images in a batch, the area of each as a square's side, and how many pairs a repeat measures."""

    images: int
    resolution: int
    pairs: int
    kind: str = "anima"


CASES = (
    Case(images=2, resolution=128, pairs=20),  # the quick start's
    Case(images=1, resolution=512, pairs=6),
    Case(images=2, resolution=128, pairs=12, kind="sd1"),
    Case(images=2, resolution=128, pairs=12, kind="sdxl"),
    Case(images=2, resolution=128, pairs=12, kind="sd3"),
    Case(images=2, resolution=128, pairs=12, kind="lumina"),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one piece of work: CPU of the whole process (also that of the threads which make batches), and by the clock."""

    cpu_s: float
    wall_s: float


class WatchedTrainer(NetworkTrainer):
    """A trainer, mixed into that of an architecture; ``batch`` is the one that the last update was made of."""

    batch: Any

    def next_batch(self, epoch: int, number: int) -> Batch | None:
        found = super().next_batch(epoch, number)
        assert found is not None  # one process sees every batch
        self.batch = found
        return found


def measure(repeats: int, *, cases: Sequence[Case] = CASES) -> list[Figure]:
    """Float32, AdamW, and one thread, as the guide's command has it. The pictures' sizes are mixed."""
    with one_thread():
        return [own_work(case, repeats * case.pairs) for case in cases]


def own_work(case: Case, turns: int) -> Figure:
    with tempfile.TemporaryDirectory() as folder:
        run = make_tiny_run(Path(folder), kind=case.kind, resolution=case.resolution, batch_size=case.images)
        with training(case.kind, run.checked(*CACHED_ON_DISK, f"--max_train_steps={SETTLING_STEPS + turns + 1}")) as trainer:
            bare = BareStep(trainer)
            pairs = [(cost_of(lambda: whole_step(trainer)), bare.cost()) for _ in range(SETTLING_STEPS + turns)]
    pairs = pairs[SETTLING_STEPS:]
    cpu = own_percent([(whole.cpu_s, least.cpu_s) for whole, least in pairs])
    wall = own_percent([(whole.wall_s, least.wall_s) for whole, least in pairs])
    whole_s, bare_s = (median(cost.cpu_s for cost in costs) for costs in zip(*pairs, strict=True))
    how = f"CPU: step {seconds(whole_s)}, bare {seconds(bare_s)}, medians of {turns} pairs; by the clock {wall:.3g} %"
    name = f"step: own work, {case.kind}, {case.images} x {case.resolution} px"
    return Figure(name=name, value=cpu, unit="%", at_most=OWN_PERCENT, how=how)


def own_percent(pairs: Sequence[tuple[float, float]]) -> float:
    """(whole, bare) of each step -> the median of what is not bare, in percent of the median step."""
    return 100 * median(whole - bare for whole, bare in pairs) / median(whole for whole, _ in pairs)


@contextmanager
def training(kind: str, run: Any) -> Iterator[WatchedTrainer]:
    """A trainer after its set-up, its progress bar and messages unseen."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), StopRequest() as stop:
        trainer = watched_class(kind)(run)
        trainer.set_up()
        trainer.stop = stop
        try:
            yield trainer
        finally:
            trainer.batches.close()
            trainer.close_logging()


def watched_class(kind: str) -> type[WatchedTrainer]:
    from anima_train_network import AnimaNetworkTrainer
    from lumina_train_network import LuminaNetworkTrainer
    from sd3_train_network import Sd3NetworkTrainer
    from sdxl_train_network import SdxlNetworkTrainer

    trainers = {
        "anima": AnimaNetworkTrainer,
        "sd1": StableDiffusionTrainer,
        "sdxl": SdxlNetworkTrainer,
        "sd3": Sd3NetworkTrainer,
        "lumina": LuminaNetworkTrainer,
    }
    return type("Watched", (WatchedTrainer, trainers[kind]), {})


def whole_step(trainer: WatchedTrainer) -> None:
    """One round of the loop in ``train()``."""
    trainer.report(trainer.update())
    trainer.run_due_events()


class BareStep:
    """What a step cannot do without: the denoiser's forward with a squared error, backward, and an optimizer of the same kind."""

    def __init__(self, trainer: WatchedTrainer):
        self.trainer = trainer
        self.weights = [weight for weight in trainer.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=trainer.options.optimizer.learning_rate)

    def cost(self) -> Cost:
        """Measured on the tensors of the trainer's last update; leaves no gradients behind."""
        trainer, batch = self.trainer, self.trainer.batch
        place = {"seed": trainer.seed, "step": 0, "positions": batch.positions}
        noisy = trainer.objective.corrupt(batch.latents, dtype=trainer.weight_dtype, **place)

        def work() -> None:
            with trainer.accelerator.autocast():
                prediction = trainer.predict(trainer.denoiser, noisy, batch)
            F.mse_loss(prediction.float(), noisy.target).backward()
            self.optimizer.step()

        cost = cost_of(work)
        for weight in self.weights:
            weight.grad.zero_()
        return cost


def cost_of(work: Callable[[], None]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
