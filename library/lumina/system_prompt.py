"""The text that Lumina Image 2.0 was trained to read before every caption. Needs no torch."""

from __future__ import annotations

MARKER = " <Prompt Start> "  # between system prompt and caption; plain text for the tokenizer


def with_system_prompt(text: str, system_prompt: str) -> str:
    """What the text encoder gets of a caption. An empty text stays empty."""
    return f"{system_prompt}{MARKER}{text}" if text and system_prompt else text


def about_system_prompt(system_prompt: str) -> dict[str, str]:
    """For the text inside a picture."""
    return {"System prompt": system_prompt} if system_prompt else {}
