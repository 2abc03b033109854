from __future__ import annotations

from pathlib import Path

import pytest

from library.files.user_path import PathProblem, dead_link, user_path


def test_home(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert (user_path("~"), user_path("~/a b")) == (str(tmp_path), str(tmp_path / "a b"))
    for text in ("", ".", "a~", "./~nobody_here/x", "C:/x", "not there", "a//b"):
        assert user_path(text) == text


@pytest.mark.parametrize("text", ["x" * 300, "x/" * 5000, "p\0x", "half \ud800"])
def test_what_no_path_can_be(text: str):
    with pytest.raises(PathProblem):
        user_path(text)


def test_the_link_to_blame(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "good").symlink_to("real")
    (tmp_path / "dead").symlink_to("gone")
    assert dead_link(tmp_path / "good" / "x") is None and dead_link(tmp_path / "none") is None
    assert dead_link(tmp_path / "dead" / "x") == f"{tmp_path / 'dead'} is a link that leads nowhere (to gone)"
    assert user_path(str(tmp_path / "dead")) == str(tmp_path / "dead")  # something may be made there
