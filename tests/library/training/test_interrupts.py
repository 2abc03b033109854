"""Signals are remembered; a second Ctrl-C ends at once."""

from __future__ import annotations

import os
import signal

import pytest

from library.training.interrupts import StopRequest


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_remembered(number, status):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.exit_status == status
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_is_not_remembered():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_status == 130
