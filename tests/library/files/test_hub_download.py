"""Why a repository cannot be read, in words; tests/library/sd/test_source.py asks a hub."""

from __future__ import annotations

import re

import pytest

from library.files.hub_download import is_unreachable, reason

TOKEN = "hf_secret"


def error(name: str, text: str = "it says", *, status: int | None = None, base: type[Exception] = Exception) -> Exception:
    """As huggingface_hub's, whose classes want a response of the HTTP client that the version has."""
    made = type(name, (base,), {})(text)
    if status is not None:
        made.response = type("Response", (), {"status_code": status})()
    return made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (error("OfflineModeIsEnabled", base=ConnectionError), "HF_HUB_OFFLINE is set"),
        (error("LocalEntryNotFoundError"), "it cannot be looked for"),
        (ConnectionError("refused"), "it cannot be looked for .ConnectionError: refused"),
        (error("GatedRepoError", status=403), "ask for access on its page"),
        (error("RepositoryNotFoundError", status=401), "no such repository"),
        (error("HfHubHTTPError", status=404), "no such repository"),
        (
            error("HfHubHTTPError", f"boom {TOKEN} boom\nmore", status=500),
            r"it cannot be read .HfHubHTTPError: boom \*\*\* boom\)$",
        ),
        (ValueError(f"bad {TOKEN}"), r"it cannot be read .ValueError: bad \*\*\*"),
    ],
)
def test_reasons_are_one_line_without_the_token(given, words):
    text = reason(given, TOKEN)
    assert re.search(words, text) and TOKEN not in text and "\n" not in text


def test_an_answer_is_no_missing_network():
    assert not is_unreachable(error("HfHubHTTPError", status=500))
    assert is_unreachable(TimeoutError())
