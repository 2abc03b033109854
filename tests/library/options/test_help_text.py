"""The text of --help."""

from library.options.anima import AnimaTrainOptions
from library.options.declare import groups_of, options_of
from library.options.help_text import help_text

GROUPS = {group.__doc__ or "": options_of(group) for group in groups_of(AnimaTrainOptions).values()}


def test_every_flag_stands_under_its_group():
    text = help_text("train.py", GROUPS, columns=100)
    assert text.startswith("usage: train.py ") and text.isascii()
    position = 0
    for title, options in GROUPS.items():
        position = text.index(f"\n{title}\n", position)
        for option in options:
            position = text.index(f"\n  {option.flag}", position)


def test_defaults_choices_and_width():
    text = help_text("train.py", GROUPS, columns=100)
    assert "[default: 2e-06]" in text and "no, fp16, bf16 [default: no]" in " ".join(text.split())
    titles = set(GROUPS)
    assert all(len(line) <= 100 for line in text.splitlines()[2:-1] if line not in titles)
