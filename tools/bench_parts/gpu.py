"""A training step of the real-size Anima and SDXL on the GPU: how long, how far from the least that its arithmetic takes, how
much memory.

Weights are random and made on the device; 1024x1024 pixels, one image, LoRA of rank 16 in float32, the rest in bfloat16. Each
figure is also told on stderr when it is there, and a case that fails leaves the others.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima.checkpoint import build_denoiser
from library.anima.denoiser import AnimaDenoiser
from library.anima.fp8_layers import DENOISER_FP8_LAYERS
from library.anima.layout import CONTEXT_ROWS, DenoiserConfig
from library.nn.compiling import compile_blocks
from library.nn.fp8 import use_fp8
from library.nn.fp8_speed import choose_fp8_products
from library.nn.loading import load_into
from library.options.memory import BlockMemoryOptions
from library.sd.denoiser import build_unet
from library.sd.fp8_layers import UNET_FP8_LAYERS
from library.training.models.model_memory import arrange_denoiser, denoiser_place
from networks import lora, lora_anima
from tools.bench_parts import gpu_sdxl
from tools.bench_parts.figures import Figure
from tools.bench_parts.flops import StepSize, counted_flops, step_flops

DTYPE = torch.bfloat16
CAPTION_ROWS = 60  # T5 tokens of a caption of some length
WARM_UP_STEPS, STEPS_IN_A_ROW = 3, 5
GIB = 2**30
TARGET_MS = {"H200": 85.0}  # of the fastest way to run Anima that is measured
TARGET_GIB = 5.0  # of Anima
TARGET_GAIN = 2.0  # SDXL: speed of the fastest way, of the plain one's
# bfloat16 without sparsity, in operations per second; NVIDIA's data sheets. Of others the measured product is the peak.
PUBLISHED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
PRODUCT_SIDE = 8192

Backend = str | Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to run a step. ``memory``: fields of BlockMemoryOptions."""

    name: str
    memory: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    backend: Backend = "inductor"  # of the compiler
    recorded: bool = False  # forward and backward are one CUDA graph, which the benchmark makes; the trainer has no such option
    caption_rows: int | None = CAPTION_ROWS  # of Anima's context; None = the zero rows behind them take part as any other
    fp8: bool = False
    at_most_gib: float | None = None

    @property
    def replays(self) -> bool:
        """CUDA graphs, whose memory is taken when they are recorded and not when they run."""
        return self.recorded or self.backend != "inductor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model whose step is measured, and the ways to run it, the plain one first."""

    label: str  # in the figures' names
    config: Any  # has in_channels
    cases: Sequence[Case]
    build: Callable[[Any], Any]  # config -> the denoiser, on the meta device
    predictor: Callable[[Any, Case, torch.device], Callable[[Tensor], Tensor]]  # of a denoiser: latents -> prediction
    create_network: Callable[..., Any]  # of the network module
    fp8_layers: str
    flops: Callable[[Any, int, int], int] | None = (
        None  # config, latent rows and columns, rank -> as ``flops_of``; None = counted
    )
    target_ms: Mapping[str, float] = field(default_factory=dict)  # by device, of the fastest way
    target_gain: float | None = None  # of the fastest way over the plain one


def inductor_with_graphs(graph: Any, inputs: Any) -> Any:
    """The backend "inductor" as torch.compile's mode "reduce-overhead" has it: what it compiles runs as CUDA graphs."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": True})


# ---------------------------------------------------------------- the models


def anima_predictor(denoiser: AnimaDenoiser, case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    sigmas = torch.full((1,), 0.5, device=device)
    context = torch.randn(1, CONTEXT_ROWS, denoiser.config.context_dim, device=device)
    context[:, CAPTION_ROWS:] = 0
    return lambda latents: denoiser(latents, sigmas, context, used_rows=case.caption_rows)


def anima_flops(config: DenoiserConfig, side: int, rank: int) -> int:
    return step_flops(config, StepSize(tokens=(side // config.patch) ** 2, rank=rank))


def sdxl_predictor(unet: Any, case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    return gpu_sdxl.predictor(unet, unet.sizes, device)


CHECKPOINTING = {"gradient_checkpointing": True}
ANIMA = Subject(
    label="",
    config=DenoiserConfig(adapter=None),  # the adapter takes a hundredth of a step
    cases=(
        Case(name="plain"),
        Case(name="plain, with the context's zero rows", caption_rows=None),
        Case(name="compiled", compiled=True),
        Case(name="checkpointing", memory=CHECKPOINTING),
        Case(name="cpu offload", memory={"cpu_offload_checkpointing": True}),
        Case(name="unsloth offload", memory={"unsloth_offload_checkpointing": True}),
        Case(name="swap 14", memory={"blocks_to_swap": 14}),
        Case(name="swap 26", memory={"blocks_to_swap": 26}),
        Case(name="swap 26, unsloth offload", memory={"blocks_to_swap": 26, "unsloth_offload_checkpointing": True}),
        Case(name="fp8", fp8=True),
        Case(name="checkpointing, fp8", memory=CHECKPOINTING, fp8=True, at_most_gib=TARGET_GIB),
    ),
    build=build_denoiser,
    predictor=anima_predictor,
    create_network=lora_anima.create_network,
    fp8_layers=DENOISER_FP8_LAYERS,
    flops=anima_flops,
    target_ms=TARGET_MS,
)
SDXL = Subject(
    label="SDXL ",
    config=gpu_sdxl.REAL,
    cases=(
        Case(name="eager"),
        Case(name="compiled", compiled=True),
        Case(name="checkpointing", memory=CHECKPOINTING),
        Case(name="fp8", fp8=True),
        Case(name="checkpointing, fp8", memory=CHECKPOINTING, fp8=True),
        # from here on what may go wrong, and leave the device unusable
        Case(name="step recorded by the benchmark", recorded=True),
        Case(name="compiled, step recorded by the benchmark", compiled=True, recorded=True),
        Case(name="compiled, CUDA graphs of inductor", compiled=True, backend=inductor_with_graphs),
        Case(name="compiled, --dynamo_backend cudagraphs", compiled=True, backend="cudagraphs"),
    ),
    build=build_unet,
    predictor=sdxl_predictor,
    create_network=lora.create_network,
    fp8_layers=UNET_FP8_LAYERS,
    target_gain=TARGET_GAIN,
)


# ---------------------------------------------------------------- measuring


def measure(repeats: int, *, subjects: Sequence[Subject] = (ANIMA, SDXL), side: int = 128, rank: int = 16,
            device: torch.device | None = None) -> list[Figure]:  # fmt: skip
    """``side``: latent rows and columns. ``device`` None: the GPU; where there is none, it says so and gives no figures.

    A case that fails has a figure all the same, NaN, with the reason.
    """
    if device is None:
        if not torch.cuda.is_available():
            say("no GPU here (it is hidden from other phases: name this one alone)")
            return []
        device = torch.device("cuda", torch.cuda.current_device())
    if SDXL.build in [subject.build for subject in subjects] and importlib.util.find_spec("diffusers") is None:
        say("SDXL is left out: its U-Net needs diffusers, which is not installed here")
        subjects = [subject for subject in subjects if subject.build is not SDXL.build]
    peak = matrix_peak(device)
    found = []
    for subject in subjects:
        for figure in measure_subject(subject, peak, side=side, rank=rank, device=device, repeats=repeats):
            say(f"{figure.name.removeprefix('gpu: ')}: {figure.value:.3g} {figure.unit} {figure.how}")
            found.append(figure)
    return found


def say(text: str) -> None:
    print(f"gpu: {text}", file=sys.stderr, flush=True)


def measure_subject(subject: Subject, peak: tuple[float, str], *, side: int, rank: int, device: torch.device,
                    repeats: int) -> Iterator[Figure]:  # fmt: skip
    """``peak``: of ``matrix_peak``."""
    label, floor_ms = f"gpu: {subject.label}", 1000 * flops_of(subject, side, rank) / peak[0]
    yield Figure(name=f"{label}floor of a step", value=floor_ms, unit="ms", how=f"{peak[0] / 1e12:.0f} TFLOP/s, {peak[1]}")
    times = {}
    for case in subject.cases:
        outcome = outcome_or_reason(case, subject, side=side, rank=rank, device=device, repeats=repeats)
        free_memory(device)
        if isinstance(outcome, str):
            yield Figure(name=f"{label}step, {case.name}", value=float("nan"), unit="ms", how=f"not measured: {outcome}")
            continue
        times[case.name] = outcome.step_ms
        yield from case_figures(case, outcome, floor_ms, label)
    if times:
        yield from closing_figures(subject, times, device)


def flops_of(subject: Subject, side: int, rank: int) -> int:
    """Of a step's forward and backward with ``side`` latent rows and columns and a LoRA on the default modules, that computes
    nothing twice. Nothing is computed."""
    if subject.flops is not None:
        return subject.flops(subject.config, side, rank)
    meta = torch.device("meta")  # which autocast does not know; layers ask for it unless they are in float64
    denoiser = subject.build(subject.config).double().requires_grad_(False)
    network = subject.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    network.to(meta).train()
    predict = subject.predictor(denoiser, subject.cases[0], meta)
    latents = torch.empty(1, subject.config.in_channels, side, side, dtype=torch.float64, device=meta)
    with patch("torch.autocast", lambda kind, enabled: nullcontext()):  # norms switch it off
        return counted_flops(lambda: predict(latents).sum().backward())


def closing_figures(subject: Subject, times: Mapping[str, float], device: torch.device) -> Iterator[Figure]:
    label, fastest = f"gpu: {subject.label}", min(times, key=times.__getitem__)
    target = next((ms for name, ms in subject.target_ms.items() if name in device_name(device)), None)
    yield Figure(name=f"{label}fastest step", value=times[fastest], unit="ms", at_most=target, how=fastest)
    plain = subject.cases[0].name
    if subject.target_gain is not None and plain in times:
        gain = times[plain] / times[fastest]
        yield Figure(name=f"{label}speed, fastest / {plain}", value=gain, unit="x", at_least=subject.target_gain, how=fastest)


def outcome_or_reason(case: Case, subject: Subject, *, side: int, rank: int, device: torch.device, repeats: int) -> Outcome | str:
    """What was measured; or why nothing was, with the traceback on stderr."""
    try:
        return run_case(case, subject, side=side, rank=rank, device=device, repeats=repeats)
    except Exception as error:  # one that fails must not take the others' figures with it
        traceback.print_exc()
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one case: a step in the median and in the slowest row of steps; the most memory on the device (0 where unknown)."""

    step_ms: float
    slowest_ms: float
    peak_bytes: int


def case_figures(case: Case, outcome: Outcome, floor_ms: float, label: str) -> Iterator[Figure]:
    share = f"{100 * floor_ms / outcome.step_ms:.0f} % of the matrix peak, slowest row {outcome.slowest_ms:.1f} ms"
    yield Figure(name=f"{label}step, {case.name}", value=outcome.step_ms, unit="ms", how=share)
    if outcome.peak_bytes:
        yield Figure(name=f"{label}memory, {case.name}", value=outcome.peak_bytes / GIB, unit="GiB", at_most=case.at_most_gib)


def run_case(case: Case, subject: Subject, *, side: int, rank: int, device: torch.device, repeats: int) -> Outcome:
    step = training_step(case, subject, side=side, rank=rank, device=device)
    forget_peak(device)
    for _ in range(WARM_UP_STEPS):
        step()
    if not case.replays:
        forget_peak(device)
    times = [timed_ms(partial(several, step), device) / STEPS_IN_A_ROW for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Outcome(median(times), max(times), peak)


def several(step: Callable[[], None]) -> None:
    """The host is ahead of the device, as in training."""
    for _ in range(STEPS_IN_A_ROW):
        step()


def training_step(case: Case, subject: Subject, *, side: int, rank: int, device: torch.device) -> Step:
    """On inputs that stay the same."""
    denoiser, network = make_model(case, subject, rank=rank, device=device)
    groups, _ = network.prepare_optimizer_params(None, 1e-4)
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    latents = torch.randn(1, subject.config.in_channels, side, side, device=device)
    target = torch.randn_like(latents)
    predict = subject.predictor(denoiser, case, device)

    def forward_and_backward() -> None:
        if case.replays and not case.recorded:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs' results of the step before may be overwritten
        with torch.autocast(device.type, DTYPE, cache_enabled=not case.recorded):  # a graph must make its own copies
            prediction = predict(latents)
        F.mse_loss(prediction.float(), target).backward()

    return (RecordedStep if case.recorded else Step)(forward_and_backward, optimizer)


class Step:
    """Forward, backward and the optimizer's step."""

    def __init__(self, forward_and_backward: Callable[[], None], optimizer: torch.optim.Optimizer):
        self.forward_and_backward, self.optimizer = forward_and_backward, optimizer

    def __call__(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class RecordedStep(Step):
    """Its forward and backward are recorded as one CUDA graph when it is first called, and replayed from then on."""

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None:
            self.graph = self._record()
        self.graph.replay()
        self.optimizer.step()  # the gradients stay where they are: the next replay writes them anew

    def _record(self) -> torch.cuda.CUDAGraph:
        """Plain runs come first, for what is chosen, compiled or made at first use; all on one stream, as recording wants it."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.forward_and_backward()
                self.optimizer.zero_grad()  # None, so that the graph makes gradients of its own instead of adding to these
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            self.forward_and_backward()
        return graph


def make_model(case: Case, subject: Subject, *, rank: int, device: torch.device) -> tuple[Any, Any]:
    """The denoiser and its network, put together as in training."""
    options = SimpleNamespace(memory=BlockMemoryOptions(**case.memory))
    denoiser = subject.build(subject.config)
    if case.fp8:
        use_fp8(denoiser, subject.fp8_layers)
    load_into(denoiser, random_weights(denoiser, device), device=denoiser_place(options, denoiser, device), dtype=DTYPE)
    network = subject.create_network(1.0, rank, float(rank), None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    network.to(device).train()
    if case.fp8:
        choose_fp8_products(denoiser, device, dtype=DTYPE)
    if case.compiled:
        compile_blocks(denoiser, case.backend)
    arrange_denoiser(options, denoiser, device)
    return denoiser, network


def random_weights(denoiser: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Scaled so that no layer is dead; one at a time."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in denoiser.state_dict().items():
        if tensor.dim() == 1:
            yield name, torch.ones(tensor.shape, device=device, dtype=DTYPE)
        else:
            values = torch.randn(tensor.shape, generator=generator, device=device, dtype=DTYPE)
            yield name, values.div_(tensor[0].numel() ** 0.5)


# ---------------------------------------------------------------- the device


def matrix_peak(device: torch.device, side: int | None = None) -> tuple[float, str]:
    """Operations per second of bfloat16 products, and where the number is from."""
    name = device_name(device)
    for known, peak in PUBLISHED_PEAKS.items():
        if known in name:
            return peak, f"published for {known}"
    side = side or (PRODUCT_SIDE if device.type == "cuda" else 256)
    a = torch.randn(side, side, device=device, dtype=DTYPE)
    times = [timed_ms(lambda: a @ a, device) for _ in range(10)]
    return 2 * side**3 / (min(times) / 1000), f"the fastest of ten products of {side} x {side} matrices"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def timed_ms(work: Callable[[], object], device: torch.device) -> float:
    """By the clock, until the device is done."""
    wait_for(device)
    begin = time.perf_counter()
    work()
    wait_for(device)
    return 1000 * (time.perf_counter() - begin)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """What the case before has left must not count in the next one."""
    torch._dynamo.reset()
    if device.type == "cuda":
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()  # those of ``inductor_with_graphs``, of which the compiler's own reset does not know
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
