from __future__ import annotations

import io
import sys
import time

import pytest

from library.dataset.caches.writer import FillReport, progress_bar, report_filled


def test_the_bar_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar("caching latents", "image", total=4000, shown=True) as bar:
        for _ in range(3):
            time.sleep(0.12)  # past the time between two refreshes
            bar.update(500)
    last = shown.getvalue().split("\r")[-1]
    assert last.startswith("caching latents:  38%|")
    assert "| 1,500/4,000 images [" in last
    assert " images/s, 00:0" in last
    assert last.rstrip().endswith("left]")


@pytest.mark.parametrize(("total", "shown"), [(0, True), (5, False)])
def test_without_work_or_on_another_process_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, total: int, shown: bool) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    with progress_bar("caching text", "text", total=total, shown=shown) as bar:
        bar.update(total)
    assert output.getvalue() == ""


def test_the_report_tells_of_all_processes(caplog):
    caplog.set_level("INFO")
    reports = [FillReport(1500, 7, 3.0), FillReport(1501, 0, 4.5)]
    report_filled("latent", reports[0], "in memory", gather=lambda own: reports)
    report_filled("text", reports[1], "beside the images")
    assert caplog.messages == [
        "latent cache: 3,001 made, 7 reused in 4.5 s (in memory)",
        "text cache: 1,501 made, 0 reused in 4.5 s (beside the images)",
    ]
