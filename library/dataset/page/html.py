"""HTML that cannot be broken by what it shows: every text is escaped unless it was made here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "img", "input", "meta", "path", "rect"})  # elements without content; the last two inside an SVG
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # no HTML document may hold them

Content = object  # Html, a text to escape, a number, None (nothing), or an iterable of them


class Html(str):
    """A piece of HTML that needs no escaping any more."""

    __slots__ = ()


def element(tag: str, /, *content: Content, **attributes: object) -> Html:
    """``element("a", "R & D", href="#x")`` -> ``<a href="#x">R &amp; D</a>``.

    Names of attributes: a trailing underscore is dropped (``class_``), others become hyphens (``aria_label``). True gives the
    bare name; None and False leave the attribute out.
    """
    opening = "".join([tag, *(_attribute(key, value) for key, value in attributes.items())])
    if tag in VOID:
        return Html(f"<{opening}>") if tag not in ("path", "rect") else Html(f"<{opening}/>")
    return Html(f"<{opening}>{joined(content)}</{tag}>")


def joined(content: Iterable[Content]) -> Html:
    """The pieces one after the other."""
    return Html("".join(map(_text, content)))


def _text(content: Content) -> str:
    if isinstance(content, Html):
        return content
    if content is None:
        return ""
    if isinstance(content, Iterable) and not isinstance(content, str):
        return joined(content)
    return _escaped(str(content))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{_escaped(str(value))}"'


def _escaped(text: str) -> str:
    return escape(CONTROL_CHARACTERS.sub("\ufffd", text))
