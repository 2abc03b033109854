"""Whether a LoRA file is one for a model, by the names in its header alone. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from networks.layout_names import DOWN, KEY, NAMED, OURS, UP, Key, NameTable, is_for_another_model, not_understood


def names_problem(file: object, keys: Iterable[str], table: NameTable) -> str | None:
    """Why the file cannot be used for the table's model: it is for another one, or pairs are torn. None where nothing is seen,
    which is no promise that ranks and sizes fit. ``file``: how messages call it."""
    found = {key: table.find(key) for key in keys}
    unknown = [key for key, meaning in found.items() if meaning is None]
    is_mixed = bool(unknown) and not all(map(is_ours, found, found.values()))
    if len(unknown) == len(found) or is_mixed or is_for_another_model(unknown, table):
        return str(not_understood(file, list(found), unknown, table))
    if torn := torn_modules(found):
        return (
            f"{file}: {len(torn)} modules have only one of lora_down and lora_up ({', '.join(torn[:NAMED])}"
            f"{' and others' if len(torn) > NAMED else ''}): the file is damaged; copy or download it again"
        )
    return None


def is_ours(key: str, meaning: Key | None) -> bool:
    """Whether the file may have this key under our names; in such a file unknown modules are left out, not refused,
    unless another model has them."""
    return meaning is None or meaning.written(OURS) == key


def torn_modules(found: Mapping[str, Key | None]) -> list[str]:
    """Modules, known or not, with one half of their LoRA."""
    halves: dict[str, set[str]] = {}
    for key, meaning in found.items():
        match = KEY.fullmatch(key)
        if match is not None and match.lastgroup in (DOWN, UP):
            name = match["name"] if meaning is None or meaning.projection is not None else meaning.name(OURS)
            halves.setdefault(name, set()).add(str(match.lastgroup))
    return [name for name, parts in halves.items() if len(parts) == 1]
