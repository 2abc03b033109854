from __future__ import annotations

import pytest

from library.sd.prompt_weights import STRONGER, WEAKER, parse_weights


@pytest.mark.parametrize(("text", "expected"), [
    ("a cat", [("a cat", 1.0)]),
    ("", [("", 1.0)]),
    ("(a) [b]", [("a", STRONGER), (" ", 1.0), ("b", WEAKER)]),
    ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
    ("((a) b)", [("a", STRONGER * STRONGER), (" b", STRONGER)]),
    ("(a:.5)(b:-1)(c:2.)", [("a", 0.5), ("b", -1.0), ("c", 2.0)]),
    ("(a [b]:2)", [("a ", 2.0), ("b", WEAKER * 2)]),
    (r"\(a\) \[b\] \\", [(r"(a) [b] \ "[:-1], 1.0)]),
    (r"(a\):1.5)", [("a)", 1.5)]),
    (r"a\b", [("ab", 1.0)]),
    ("a:b :1.5) c", [("a:b :1.5) c", 1.0)]),
    ("[a:1.5]", [("a:1.5", WEAKER)]),
    ("a) b] c", [("a) b] c", 1.0)]),
    ("a (b [c", [("a ", 1.0), ("b ", STRONGER), ("c", STRONGER * WEAKER)]),
    ("(a:1.2.3)", [("a:1.2.3", STRONGER)]),
    ("()", [("", 1.0)]),
    ("(a:1.0) b", [("a b", 1.0)]),
])  # fmt: skip
def test_brackets(text, expected):
    assert parse_weights(text) == expected


def test_what_is_long_is_not_slow():
    text = "(" * 2000 + "a" + ")" * 2000
    ((word, weight),) = parse_weights(text)
    assert word == "a" and weight > 1e80
