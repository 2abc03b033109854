"""Prints one series of a TensorBoard log as JSON: ``python tools/read_scalars.py LOG_DIR [--tag loss/current]``.

The newest run below LOG_DIR that has the tag counts. Output: ``{"tag": ..., "steps": [...], "values": [...]}``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print one series of a TensorBoard log as JSON.")
    parser.add_argument("log_dir", type=Path, help="a folder with event files, at any depth")
    parser.add_argument("--tag", default="loss/current", help="name of the series")
    options = parser.parse_args(argv)
    series = read_scalars(options.log_dir, options.tag)
    if not series:
        sys.exit(f"error: no run under {options.log_dir} logged {options.tag}")
    json.dump({"tag": options.tag, "steps": [step for step, _ in series], "values": [value for _, value in series]}, sys.stdout)
    print()


def read_scalars(log_dir: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) pairs of ``tag`` in the newest event file that has it; empty where none has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(log_dir.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            return [(event.step, event.value) for event in events.Scalars(tag)]
    return []


if __name__ == "__main__":
    main()
