"""The sums below the table of a network's modules; what its rows hold is in test_lora_anima.py."""

from __future__ import annotations

from networks.module_table import Row, table_lines


def row(number: int, *rates: float) -> Row:
    return Row(path=f"blocks.{number}", part="unet", rank=4, alpha=1.0, rates=rates, parameters=8, name=f"lora_unet_{number}")


def test_few_rates_are_listed_and_many_are_a_range():
    *_, few, _ = table_lines([row(0, 1e-4), row(1, 2e-4), row(2, 1e-4)])
    assert few.split() == ["unet", "3", "0.0001,", "0.0002", "24"]
    *_, many, everything = table_lines([row(number, 1e-4 * number, 4e-4 * number) for number in range(1, 26)])
    assert many.split() == ["unet", "25", "0.0001", "to", "0.01", "200"] and everything.startswith("all")
    assert len(many) < 100
