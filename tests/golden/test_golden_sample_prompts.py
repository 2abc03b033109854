"""Prompt lines as the reference reads them, except where it silently drops what the user wrote."""

from __future__ import annotations

import pytest

from golden_files import load_golden_json
from library.errors import OptionError
from library.sampling.prompts import read_prompts

# the reference skips a value that it cannot read, cuts a number at the first odd character, and drops a piece it does not know
REFUSED = {
    "z --n low quality --w notanumber": "--w",
    "tag -- not an arg --d -5 --l 1e3": "--d",
    "a --cn img.png --w 512.5": "--w",
}


def test_prompt_lines(tmp_path):
    cases = load_golden_json("data/captions.json")["sample_prompt_lines"]
    path = tmp_path / "prompts.txt"
    accepted = [case for case in cases if case["line"] not in REFUSED]
    path.write_text("\n".join(case["line"] for case in accepted), encoding="utf-8")
    for prompt, case in zip(read_prompts(path), accepted, strict=True):
        expected = dict(case["parsed"])
        if "flow_shift" in expected:
            expected["flow_shift"] = float(expected["flow_shift"])  # the reference leaves it a string
        assert {"prompt": prompt.prompt, **prompt.settings()} == expected


@pytest.mark.parametrize("line", REFUSED)
def test_lines_that_the_reference_misreads_are_refused(tmp_path, line):
    assert line in [case["line"] for case in load_golden_json("data/captions.json")["sample_prompt_lines"]]
    path = tmp_path / "prompts.txt"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(OptionError, match=f"line 1: {REFUSED[line]}"):
        read_prompts(path)
