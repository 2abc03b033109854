"""The packages that have attention kernels of their own, for --attn_mode. Needs neither torch nor the packages."""

from __future__ import annotations

from dataclasses import dataclass

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What a kernel of others needs. ``head_dim``: the widest head that it takes; ``dtypes``: none named = it knows itself."""

    module: str
    name: str  # for pip
    head_dim: int
    dtypes: tuple[str, ...] = HALVES
    trains: bool = True

    @property
    def top_module(self) -> str:
        """What shows, without importing it, whether the package is there."""
        return self.module.partition(".")[0]


PACKAGES = {
    "xformers": Package(module="xformers.ops", name="xformers", head_dim=512, dtypes=()),
    "flash": Package(module="flash_attn", name="flash-attn", head_dim=256),
    "sageattn": Package(module="sageattention", name="sageattention", head_dim=128, trains=False),
}
