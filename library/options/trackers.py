"""Where the numbers of a run are logged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.declare import opt

TRACKERS = ("tensorboard", "wandb", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingOptions:
    """Logging: losses, rates and speed, sent to TensorBoard or wandb."""

    logging_dir: str | None = opt(
        None, "folder for logs, each run in its own (set = TensorBoard unless --log_with says otherwise)", path=True
    )
    log_with: str | None = opt(
        None, "where to log (not set = tensorboard if --logging_dir is given, else nowhere)", choices=TRACKERS
    )
    log_prefix: str | None = opt(None, "start of the name of a run's log folder, before its date and time (not set = none)")
    log_tracker_name: str | None = opt(None, "project name in the tracker (not set = network_train)")
    wandb_run_name: str | None = opt(None, "name of the run in wandb (not set = wandb invents one)")
    log_tracker_config: str | None = opt(None, "TOML file with more settings for the tracker", path=True)
    wandb_api_key: str | None = opt(None, "key to log in to wandb (not set = as logged in with its own tool)", secret=True)
    log_config: bool = opt(False, "send the options to the tracker, without paths and keys")

    def problems(self) -> Iterator[str]:
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            yield f"--log_with={self.log_with} needs --logging_dir: name a folder for the logs"

    def warnings(self) -> Iterator[str]:
        for name in ("wandb_api_key", "wandb_run_name"):
            if getattr(self, name) and self.log_with not in ("wandb", "all"):
                yield f"--{name} does nothing without --log_with=wandb"
        if self.log_config and not self.log_with and not self.logging_dir:
            yield "--log_config does nothing without --logging_dir or --log_with"
