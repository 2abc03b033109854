"""Declaring options as dataclass fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.options.declare import groups_of, opt, options_of, problems_of, warnings_of

TABLE = {"fast": max, "slow": min}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes: how large."""

    width: int = opt(64, "pixels")
    scale: float | None = opt(None, "factor")
    names: list[str] | None = opt(None, "labels")
    mode: str = opt("fast", "how", choices=TABLE)
    place: Path | None = opt(None, "folder")
    steps: int | float = opt(0, "steps or share")

    def problems(self) -> Iterator[str]:
        if self.width < 1:
            yield "--width is too small"


@dataclass(frozen=True, slots=True, kw_only=True)
class WideSizes(Sizes):
    """Sizes: of another architecture."""

    width: int = opt(128, "pixels")

    def warnings(self) -> Iterator[str]:
        yield "--width is wide"


@dataclass(frozen=True, kw_only=True)
class Everything:
    """A set of one group."""

    sizes: WideSizes = field(default_factory=WideSizes)

    def problems(self) -> Iterator[str]:
        yield "--all is missing"


def named(group: type) -> dict:
    return {option.name: option for option in options_of(group)}


def test_annotations_give_the_types():
    options = named(Sizes)
    assert [option.kind.words for option in options.values()][:2] == ["a whole number", "a number"]
    assert (options["width"].is_optional, options["scale"].is_optional) == (False, True)
    assert options["names"].is_list and options["names"].metavar == "TEXT ..."
    assert options["place"].path and options["place"].metavar == "PATH"
    assert options["mode"].choices == ("fast", "slow") and options["mode"].allowed == "one of fast, slow"
    assert options["steps"].read("50%") == 0.5


def test_empty_means_not_given_where_that_is_possible():
    options = named(Sizes)
    assert options["scale"].read("") is None and options["names"].read([]) is None
    assert options["mode"].flag == "--mode"

    @dataclass(frozen=True, kw_only=True)
    class Words:
        words: str | None = opt(None, "words", may_be_empty=True)

    (words,) = options_of(Words)
    assert words.read("") == "" and words.default is None and words.is_optional


def test_numbers_for_a_list_may_stand_alone():
    @dataclass(frozen=True, kw_only=True)
    class Rates:
        rates: list[float] | None = opt(None, "numbers")

    (rates,) = options_of(Rates)
    assert rates.read(1e-4) == [1e-4] and rates.read("1e-4") == [1e-4] and rates.read(["1", 2]) == [1.0, 2.0]


def test_subclass_restates_a_default_only():
    assert named(WideSizes)["width"].default == 128
    assert list(named(WideSizes)) == list(named(Sizes))


def test_set_tells_problems_of_its_groups_and_its_own():
    assert groups_of(Everything) == {"sizes": WideSizes}
    assert list(problems_of(Everything(sizes=WideSizes(width=0)))) == ["--width is too small", "--all is missing"]
    assert list(warnings_of(Everything())) == ["--width is wide"]
