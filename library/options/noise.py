"""Changes to the noise that training adds to the latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseOptions:
    """Noise: what is added to the latents besides plain Gaussian noise."""

    noise_offset: float | None = opt(
        None, "strength of noise that is the same over a whole channel, often 0.05 (not set or 0 = none)"
    )
    noise_offset_random_strength: bool = opt(False, "draw the strength anew from 0 to --noise_offset")
    adaptive_noise_scale: float | None = opt(
        None, "add this times the latents' mean size to --noise_offset (not set or 0 = nothing)"
    )
    multires_noise_iterations: int | None = opt(None, "coarser and coarser layers of noise, often 6 to 10 (not set or 0 = none)")
    multires_noise_discount: float = opt(0.3, "strength of each coarser layer relative to the one before")
    ip_noise_gamma: float | None = opt(None, "strength of extra noise on the model's input only, often 0.1 (not set or 0 = none)")
    ip_noise_gamma_random_strength: bool = opt(False, "draw the strength anew from 0 to --ip_noise_gamma")

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 0, "noise_offset", "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma")
        if self.adaptive_noise_scale and self.noise_offset is None:
            yield "--adaptive_noise_scale needs --noise_offset, which it adds to: give that too, or drop --adaptive_noise_scale"

    def warnings(self) -> Iterator[str]:
        for name in ("noise_offset", "ip_noise_gamma"):
            if getattr(self, f"{name}_random_strength") and not getattr(self, name):
                yield f"--{name}_random_strength does nothing without --{name}"
