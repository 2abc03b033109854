"""Reading values of each kind from text and from TOML."""

from pathlib import Path

import pytest

from library.options.kinds import NUMBER, NUMBER_RANGE, PATH, RESOLUTION, STEPS_OR_SHARE, SWITCH, TEXT, WHOLE

READ = [
    (SWITCH, True, True),
    (WHOLE, "8", 8),
    (WHOLE, 8, 8),
    (WHOLE, "-3", -3),
    (NUMBER, "1e-4", 1e-4),
    (NUMBER, 3, 3.0),
    (TEXT, "", ""),
    (PATH, "a b/c", Path("a b/c")),
    (STEPS_OR_SHARE, "100", 100),
    (STEPS_OR_SHARE, 100, 100),
    (STEPS_OR_SHARE, "0.1", 0.1),
    (STEPS_OR_SHARE, 0.1, 0.1),
    (STEPS_OR_SHARE, "50%", 0.5),
    (STEPS_OR_SHARE, "100%", 1.0),
    (STEPS_OR_SHARE, "0", 0),
    (RESOLUTION, 1024, "1024"),
    (RESOLUTION, [832, 1216], "832,1216"),
    (RESOLUTION, "832,1216", "832,1216"),
    (NUMBER_RANGE, "2.0,4.0", "2.0,4.0"),
    (NUMBER_RANGE, [2, 4.5], "2.0,4.5"),
]
REFUSED = [
    (SWITCH, "true"),
    (SWITCH, 1),
    (WHOLE, "8.0"),
    (WHOLE, 8.0),
    (WHOLE, True),
    (WHOLE, "eight"),
    (NUMBER, "nan"),
    (NUMBER, "inf"),
    (NUMBER, False),
    (NUMBER, [1.0]),
    (TEXT, 5),
    (PATH, 5),
    (STEPS_OR_SHARE, "1.5"),
    (STEPS_OR_SHARE, 1.0),
    (STEPS_OR_SHARE, "%"),
    (STEPS_OR_SHARE, True),
    (RESOLUTION, 512.0),
    (RESOLUTION, ["a", "b"]),
    (NUMBER_RANGE, "2"),
    (NUMBER_RANGE, "4,2"),
    (NUMBER_RANGE, "0,2"),
    (NUMBER_RANGE, "a,b"),
    (NUMBER_RANGE, "1,2,3"),
    (NUMBER_RANGE, "1,nan"),
    (NUMBER_RANGE, ["1", "2"]),
    (NUMBER_RANGE, [True, 2]),
    (NUMBER_RANGE, 2.0),
]


@pytest.mark.parametrize(("kind", "given", "expected"), READ)
def test_read(kind, given, expected):
    value = kind.read(given)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(("kind", "given"), REFUSED)
def test_refused(kind, given):
    with pytest.raises(ValueError):  # noqa: PT011 - the caller words the message
        kind.read(given)
