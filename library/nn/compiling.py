"""torch.compile, block by block: what is made for one block serves all blocks of its widths, at every size of image.

Compiled is the block's forward alone. Around it the model calls its blocks as before, so checkpointing and whatever brings a
block's weights to the device stay outside. How few graphs there are depends on the sizes being variables from the first call
on, and on everything inside a block being found through the block: library/nn and networks/layer.py are written for it.

A model's smaller parts, such as Anima's adapter, stay as they are: they take a hundredth of a step, and their sizes change with
each caption.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError, TrainingError, UserError, did_you_mean
from library.nn.fp8 import FP8

PICTURE = 4  # axes of a tensor that convolutions take: (B, C, h, w)
GRAPHS = 64  # one runs per batch of one and larger batches, with and without gradients, for each strength of the network, ...
GRAPHS_PER_BLOCK = 8  # where a foreign network's layers are not alike to the compiler, so that each block has its own
PACKAGES = {"tvm": "tvm", "onnxrt": "onnxruntime", "openxla": "torch_xla"}  # of backends that PyTorch lists without them
UNLISTED = ("eager", "aot_eager")  # backends that find what breaks, not ones that are fast; PyTorch leaves them out of its list
MACHINERY = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")  # whose errors are about compiling
CPP_ADVICE = (
    "install one (Linux: g++; macOS: xcode-select --install; Windows: the Visual Studio Build Tools, and start from their prompt)"
)
TRITON_ADVICE = "install triton (pip install triton; on Windows triton-windows)"
GIVE_UP = "drop --torch_compile"
DEVICES = {"cudagraphs": ("cuda", "an NVIDIA GPU"), "openxla": ("xla", "an XLA device")}  # which a backend is for
COMPILING = "compiling the blocks: the first steps take minutes; the others are quick (without --torch_compile all are alike)"


class CompilerError(TrainingError):
    """A block could not be compiled."""


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any], *, fullgraph: bool = False) -> None:
    """Compiles the forward of each of ``model.blocks``, when it is first called. Call it when the network is in its layers.

    The modules, their names and their state dict stay what they are. ``fullgraph``: what cannot be compiled whole is an error
    instead of running in parts, uncompiled ones between; tests ask for it.
    ``backend`` may also be a function, as for torch.compile.
    """
    blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    _allow_graphs(max(GRAPHS, GRAPHS_PER_BLOCK * len(blocks)))
    in_8_bits = any(weight.dtype == FP8 for block in blocks for weight in block.parameters())
    compiler = _keeping_less(backend) if in_8_bits else backend
    compiled: dict[type[nn.Module], Any] = {}
    for block in blocks:
        own = vars(block).get("forward")
        assert not isinstance(own, CompiledForward), "the blocks are compiled already"
        if own is not None:  # a network has patched the block itself
            block.forward = CompiledForward(torch.compile(own, backend=compiler, fullgraph=fullgraph))
            continue
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=compiler, fullgraph=fullgraph)
        block.forward = CompiledForward(MethodType(compiled[kind], block))


class CompiledForward:
    """A block's forward, compiled; before each call the inputs are told to have sizes that vary."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function

    def __call__(self, x: Tensor, *inputs: Any) -> Tensor:
        """x (B, N, D), of convolutions (B, C, h, w); of the inputs' tensors, in tuples or not, all axes but that of the channels
        may vary: samples, tokens, rows, columns."""
        if torch.is_grad_enabled() and not x.requires_grad and x.dim() != PICTURE:
            # What enters the first block needs no gradient, unlike what enters the others. To compute it all the same costs less
            # than half a percent of a step of 28 blocks; a second set of graphs would take as long to compile as the first one.
            # A U-Net's first residual blocks have widths of their own, and with them graphs, and make a larger part of a step.
            x = x.detach().requires_grad_()
        for tensor in tensors_in((x, *inputs)):
            for axis in varying_axes(tensor):
                # One of length 1 becomes a constant all the same: batches of one have their own graph.
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return self.function(x, *inputs)


def varying_axes(tensor: Tensor) -> tuple[int, ...]:
    if tensor.dtype == torch.bool:  # a mask has no channels
        return tuple(range(tensor.dim()))
    return (0, 2, 3) if tensor.dim() == PICTURE else tuple(range(tensor.dim() - 1))


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Also those inside of tuples."""
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_in(value)


def _keeping_less(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The backend, free to compute again what a matrix product of the backward pass reads.

    As it is, it keeps such values from the forward pass: weights in 8 bits would stay in memory dequantised, those of all blocks.
    """
    from torch._functorch import config

    compiler: Any = torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: Any, inputs: Any) -> Any:
        with config.patch(ban_recompute_materialized_backward=False):
            return compiler(graph, inputs)

    return compile_graph


def _allow_graphs(count: int) -> None:
    """Past its limit the compiler gives up and runs everything uncompiled, with a line in the log. The setting is torch's own."""
    config: Any = torch._dynamo.config
    for name, value in (("cache_size_limit", count), ("accumulated_cache_size_limit", 2 * count)):
        setattr(config, name, max(value, getattr(config, name)))


# ---------------------------------------------------------------- what can go wrong


def check_backend(name: str, device: torch.device | None = None) -> None:
    """Raises OptionError when ``--dynamo_backend name`` cannot compile for ``device`` (None: whichever it is)."""
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
    except RuntimeError as error:
        raise OptionError(f"--torch_compile cannot work here: {_first_line(error)}; {GIVE_UP}") from error
    known = available_backends()
    if name not in known:
        raise OptionError(
            f"--dynamo_backend {name}: PyTorch {torch.__version__} does not have it here{did_you_mean(name, known)}; "
            f"it has {', '.join(known)}"
        )
    needed, words = DEVICES.get(name, (None, ""))
    if needed is not None and device is not None and device.type != needed:
        raise OptionError(f"--dynamo_backend {name} needs {words}, but this run is on {device.type}: drop it, or {GIVE_UP}")
    if name == "inductor" and device is not None and (problem := _inductor_problem(device)):
        raise OptionError(problem)


def available_backends() -> list[str]:
    """The names of backends that this PyTorch can use with the packages that are installed."""
    names = {*torch._dynamo.list_backends(), *UNLISTED}
    return sorted(name for name in names if name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None)


def _inductor_problem(device: torch.device) -> str | None:
    """What it lacks to generate code for the device; that there is a compiler does not mean that it works."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return f"--torch_compile: triton is not installed, which compiles for the GPU; {TRITON_ADVICE}, or {GIVE_UP}"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            return f"--torch_compile: no C++ compiler works here ({_first_line(error)}); {CPP_ADVICE}, or {GIVE_UP}"
    return None


@contextmanager
def compile_errors_are_told() -> Iterator[None]:
    """Around everything that may call a compiled block or go backward through one: both are when code is generated.

    An error of the compiler becomes one CompilerError that says what is missing. Others pass, being out of memory among them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = list(_causes(error))
        for cause in chain:
            if isinstance(cause, torch.OutOfMemoryError) and cause is not error:
                raise cause from error
        if isinstance(error, torch.OutOfMemoryError) or not any(type(e).__module__.startswith(MACHINERY) for e in chain):
            raise
        raise CompilerError(_told(chain)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from, outermost first."""
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def _told(chain: list[BaseException]) -> str:
    text, kinds = " ".join(map(str, chain)), {type(error).__name__ for error in chain}
    what = f"({_first_line(chain[-1])})"
    if "TritonMissing" in kinds or "triton installation" in text:
        return f"--torch_compile: triton is not installed, which compiles for the GPU {what}; {TRITON_ADVICE}, or {GIVE_UP}"
    if "InvalidCxxCompiler" in kinds or "C compiler" in text or "C++ compiler" in text:
        return f"--torch_compile: no C++ compiler works here {what}; {CPP_ADVICE}, or {GIVE_UP}"
    if "GPUTooOldForTriton" in kinds:
        return f"--torch_compile: triton cannot compile for this GPU {what}; {GIVE_UP}"
    advice = f"{GIVE_UP}, or try another --dynamo_backend; for the compiler's whole story set TORCHDYNAMO_VERBOSE=1"
    return f"--torch_compile failed: {type(chain[-1]).__name__} {what}; {advice}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
