"""Logging to TensorBoard or wandb through accelerate."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.training.running.interrupts import without_secrets

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from library.options.trackers import LoggingOptions

DEFAULT_TRACKER_NAME = "network_train"


def tracker_names(options: LoggingOptions) -> list[str]:
    """Names of the trackers in use: --log_with, or tensorboard when only --logging_dir is given."""
    if options.log_with == "all":
        return ["tensorboard", "wandb"]
    if options.log_with:
        return [options.log_with]
    return ["tensorboard"] if options.logging_dir else []


def tracker_problems(options: LoggingOptions) -> list[str]:
    """Trackers whose package is not installed, and a settings file that cannot be read. Needs no torch."""
    problems = [
        f"--log_with {name} needs the package {name}: pip install {name}"
        for name in tracker_names(options)
        if find_spec(name) is None
    ]
    if options.log_tracker_config:
        import toml

        try:
            toml.load(options.log_tracker_config)
        except (OSError, ValueError) as error:  # TomlDecodeError is a ValueError
            problems.append(f"--log_tracker_config {options.log_tracker_config} cannot be read: {error}")
    return problems


def run_log_dir(options: LoggingOptions) -> Path | None:
    """--logging_dir / [--log_prefix]YYYYmmddHHMMSS, a folder for each run."""
    if not options.logging_dir:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


def start_trackers(accelerator: Accelerator, options: LoggingOptions, config: dict[str, Any]) -> None:
    """Starts the trackers that the Accelerator was made with; the main process only.

    From here on ``sys.argv`` is without keys and tokens: wandb sends it along, and may look at it at any time.
    """
    import toml

    if not tracker_names(options) or not accelerator.is_main_process:
        return
    settings: dict[str, Any] = {}
    if options.log_tracker_config:
        settings = toml.load(options.log_tracker_config)  # checked by tracker_problems
    if accelerator.project_dir is not None:
        os.environ.setdefault("WANDB_DIR", str(accelerator.project_dir))
    if options.wandb_run_name:
        settings.setdefault("wandb", {})["name"] = options.wandb_run_name
    if options.wandb_api_key:
        os.environ.setdefault("WANDB_API_KEY", options.wandb_api_key)
    sys.argv[:] = without_secrets(sys.argv)
    plain = {name: value for name, value in config.items() if isinstance(value, (int, float, str, bool))}
    accelerator.init_trackers(options.log_tracker_name or DEFAULT_TRACKER_NAME, config=plain, init_kwargs=settings)


def log_picture(accelerator: Accelerator, name: str, pixels: Tensor, step: int, caption: str) -> None:
    """One picture, (3, H, W) in [-1, 1], to every tracker."""
    image = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, image, global_step=step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(image, caption=caption)}, step=step)
