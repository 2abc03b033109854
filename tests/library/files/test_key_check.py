from __future__ import annotations

from library.files.key_check import NAMED_PER_KIND, compare_keys


def test_equal_keys_give_no_text():
    assert compare_keys({"a": (1, 2)}, {"a": (1, 2)}) == ""


def test_every_kind_of_problem_is_in_one_text():
    text = compare_keys({"a": (1, 2), "stray": (1,)}, {"a": (2, 2), "b": ()})
    assert text == "1 missing: b; 1 unexpected: stray; 1 of another shape: a (1x2 instead of 2x2)"


def test_long_lists_are_cut_and_counted():
    text = compare_keys({}, {f"k{i}": (1,) for i in range(NAMED_PER_KIND + 1500)})
    assert text.startswith("1,512 missing: k0, k1,") and text.endswith("k11 and 1,500 more")
