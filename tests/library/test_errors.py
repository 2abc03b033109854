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
        "import library.errors\n"
        "from library.errors import UserError, user_errors_end_the_script\n"
        "library.errors.PATIENCE_S = 0.2\n"
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
        (False, "1", "2", "error (process 1): bad\n"),  # where nothing ends it while it waits for the main process
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


ONE_IS_FASTER = """
import os, time
from library.errors import UserError, user_errors_end_the_script

with user_errors_end_the_script():
    if os.environ["RANK"] == "0":
        time.sleep(0.7)
    raise UserError("bad " + os.environ["TORCHELASTIC_RESTART_COUNT"])
"""


def test_the_main_process_speaks_before_the_launcher_ends_it(tmp_path):
    """Five runs in one: torchrun starts failed processes again."""
    (tmp_path / "script.py").write_text(ONE_IS_FASTER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=4", "--standalone"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_LOG_LEVEL": "ERROR"}
    done = subprocess.run([*command, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert told == [f"error: bad {number}" for number in range(5)]
    assert done.returncode != 0


def test_a_process_whose_launcher_is_gone_leaves_without_a_word():
    child = (
        "import library.errors\n"
        "library.errors.PATIENCE_S = 30.0\n"
        "print('started', flush=True)\n"
        "with library.errors.user_errors_end_the_script():\n    raise library.errors.UserError('bad')\n"
    )
    parent = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}]).stdout\nimport time; time.sleep(1)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", parent], env=environment, capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("started\n", "")  # both streams are closed: the child has ended, too
