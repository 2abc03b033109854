"""How a script ends on a mistake: through real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def end(code: str, *, all_processes: bool, **variables: str) -> subprocess.CompletedProcess[str]:
    script = (
        "from library.errors import UserError, user_errors_end_the_script\n"
        f"with user_errors_end_the_script({'all_processes=True' if all_processes else ''}):\n    {code}\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**environment, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("all_processes", "rank", "processes", "expected"),
    [
        (False, None, None, "error: bad\n"),
        (False, "0", "2", "error: bad\n"),
        (False, "1", "2", ""),
        (True, None, None, "error: bad\n"),
        (True, "0", "1", "error: bad\n"),
        (True, "0", "2", "error (process 0): bad\n"),
        (True, "1", "2", "error (process 1): bad\n"),
    ],
)
def test_who_speaks(all_processes, rank, processes, expected):
    variables = {"RANK": rank, "WORLD_SIZE": processes} if rank else {}
    done = end("raise UserError('bad')", all_processes=all_processes, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_several_problems_of_one_process():
    done = end("raise UserError('bad', 'worse')", all_processes=True, RANK="1", WORLD_SIZE="2")
    assert done.stderr == "error (process 1): several things must be mended:\n  - bad\n  - worse\n"


def test_ctrl_c_promises_only_what_is_on_disk():
    done = end("raise KeyboardInterrupt", all_processes=False)
    assert done.returncode == 130
    assert done.stderr == "\nstopped; the same command goes on from what is saved and cached\n"
