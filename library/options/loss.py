"""How far a prediction is from its target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt
from library.options.rules import above_zero

THRESHOLD_LOSSES = ("huber", "smooth_l1")  # those that --huber_schedule is for
LOSS_TYPES = ("l1", "l2", *THRESHOLD_LOSSES)
HUBER_SCHEDULES = ("constant", "exponential", "snr")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """Loss: how far a prediction is from its target."""

    loss_type: str = opt(
        "l2", "l2 = squared, l1 = absolute, huber and smooth_l1 = squared when small, absolute when large", choices=LOSS_TYPES
    )
    huber_schedule: str = opt("snr", "how the threshold of huber and smooth_l1 changes with the noise", choices=HUBER_SCHEDULES)
    huber_c: float = opt(0.1, "threshold of huber and smooth_l1: smaller errors count squared")
    huber_scale: float = opt(1.0, "factor on the threshold of huber and smooth_l1 (1 = none)")

    def problems(self) -> Iterator[str]:
        yield from above_zero(self, "huber_c", "huber_scale")

    def warnings(self) -> Iterator[str]:
        if self.loss_type in THRESHOLD_LOSSES and self.huber_schedule == "snr" and self.huber_scale != 1:
            yield f"--huber_scale={self.huber_scale:g} does nothing with --huber_schedule=snr, whose threshold has no factor"

    def flow_problems(self) -> Iterator[str]:
        """For models trained with rectified flow, which have no signal-to-noise table."""
        if self.loss_type in THRESHOLD_LOSSES and self.huber_schedule == "snr":
            yield (
                f"--huber_schedule is snr, which --loss_type={self.loss_type} cannot use with a flow model: "
                "give --huber_schedule=constant or --huber_schedule=exponential"
            )
