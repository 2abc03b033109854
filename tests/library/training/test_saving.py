"""Removing old files."""

from __future__ import annotations

import logging

from library.training.saving import remove_old


def test_files_and_folders_go(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "inside").touch()
    remove_old(tmp_path / "file", tmp_path / "state", tmp_path / "was never there")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_told_and_the_rest_goes(tmp_path, caplog):
    (tmp_path / "file").touch()
    (tmp_path / "old").touch()
    remove_old(tmp_path / "file" / "below", tmp_path / "old")
    assert not (tmp_path / "old").exists()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"could not remove {tmp_path / 'file' / 'below'} (" in record.getMessage()
