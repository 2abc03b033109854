from __future__ import annotations

from library.dataset.page.html import Html, element, joined


def test_texts_and_attributes_are_escaped_and_pieces_are_not():
    inner = element("b", "a < b & c")
    assert inner == "<b>a &lt; b &amp; c</b>"
    assert element("p", inner, title='"x" <y>') == '<p title="&quot;x&quot; &lt;y&gt;"><b>a &lt; b &amp; c</b></p>'


def test_names_of_attributes():
    made = element("input", class_="x", aria_label="y", hidden=True, checked=False, id=None)
    assert made == '<input class="x" aria-label="y" hidden>'


def test_content_of_many_kinds():
    assert element("p", None, 3, ["a", [Html("<br>"), "&"]]) == "<p>3a<br>&amp;</p>"
    assert joined(["<", Html("<")]) == "&lt;<"


def test_control_characters_do_not_reach_the_page():
    assert element("p", "a\x00b\x1b[31m\tc\nd") == "<p>a\ufffdb\ufffd[31m\tc\nd</p>"
