"""Reading one series out of a TensorBoard log."""

from __future__ import annotations

import os

import pytest

from tools.read_scalars import main, read_scalars


@pytest.fixture
def log(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for age, (name, values) in enumerate({"old": (3.0, 2.0), "new": (1.0, 0.5, 0.25)}.items()):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, value in enumerate(values):
                writer.add_scalar("loss/current", value, step)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (1e9 + age, 1e9 + age))
    return tmp_path


def test_the_newest_run_counts(log):
    assert read_scalars(log, "loss/current") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert read_scalars(log, "nothing") == []


def test_a_missing_series_ends_with_an_error(log, capsys):
    main([str(log)])
    assert '"values": [1.0, 0.5, 0.25]' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="logged lr"):
        main([str(log), "--tag", "lr"])
