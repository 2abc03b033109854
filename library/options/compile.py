"""Compiling the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

BACKENDS = ("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
            "tensort", "ipex", "tvm")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Compile: the denoiser's blocks as generated kernels. The first steps take minutes, later ones less time."""

    torch_compile: bool = opt(False, "compile the denoiser's blocks with torch.compile")
    dynamo_backend: str = opt("inductor", "what compiles them; this PyTorch's backends only", choices=BACKENDS)

    def problems(self) -> Iterator[str]:
        return iter(())

    def warnings(self) -> Iterator[str]:
        if self.dynamo_backend != "inductor" and not self.torch_compile:
            yield f"--dynamo_backend={self.dynamo_backend} does nothing without --torch_compile"
