"""Compiling the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

BACKENDS = ("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
            "tensort", "ipex", "tvm", "no")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Compile: the denoiser's blocks as generated kernels. The first steps take minutes, later ones less time."""

    torch_compile: bool = opt(False, "compile the denoiser's blocks with torch.compile")
    dynamo_backend: str = opt(
        "inductor", "what compiles them; this PyTorch's backends only; no = do not compile", choices=BACKENDS
    )

    @property
    def compiles(self) -> bool:
        return self.torch_compile and self.dynamo_backend != "no"

    def problems(self) -> Iterator[str]:
        return iter(())

    def warnings(self) -> Iterator[str]:
        if self.torch_compile and not self.compiles:
            yield "--torch_compile does nothing with --dynamo_backend=no: nothing is compiled"
        if self.dynamo_backend not in ("inductor", "no") and not self.torch_compile:
            yield f"--dynamo_backend={self.dynamo_backend} does nothing without --torch_compile"
