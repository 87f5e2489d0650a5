"""Amounts of memory and time in words."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from elm_lanczos.memory import duration, free_bytes, size

BYTES = {
    unit: 1024**i for i, unit in enumerate(["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "years": 365 * 86400}
# A unit gives way to the next one before its number reaches this.
LIMITS = {**dict.fromkeys(BYTES, 1000), "s": 60, "min": 60, "h": 24, "d": 365}


def number_and_unit(text: str) -> tuple[float, str]:
    assert re.fullmatch(r"(\d+|\d\.\d|0\.0*\d\d?) \w+", text), text
    number, unit = text.split()
    return float(number), unit


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KiB"),
        (512 * 2**20, "512 MiB"),
        (3.2 * 2**30, "3.2 GiB"),
        (999.7 * 2**20, "1.0 GiB"),  # not 1000 MiB
        (9.97 * 2**30, "10 GiB"),  # not 10.0 GiB
        (2**50, "1.0 PiB"),
    ],
)
def test_sizes(amount: float, words: str) -> None:
    assert size(amount) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (1e-7, "below 1 ms"),
        (0.24, "0.24 s"),
        (1, "1.0 s"),
        (12.4, "12 s"),
        (59.4, "59 s"),
        (59.6, "1.0 min"),
        (60, "1.0 min"),
        (2520, "42 min"),
        (3599, "1.0 h"),
        (18360, "5.1 h"),
        (86000, "1.0 d"),
        (19 * 86400, "19 d"),
        (364.7 * 86400, "1.0 years"),
        (365e3 * 86400, "1000 years"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@given(st.one_of(st.integers(0, 2**69), st.floats(0, 2**69)))
@example(2**10 * 999.5)
@example(2**60 * 999.5)
def test_sizes_are_close_and_never_clumsy(amount: float) -> None:
    number, unit = number_and_unit(size(amount))
    assert number < LIMITS[unit] or unit == "EiB"
    # Half of the last figure shown, of which there are at least two.
    assert abs(number * BYTES[unit] - amount) <= max(0.5, 0.0551 * amount)


@given(st.floats(0.001, 1e12))
@example(59.5)
@example(3570.0)
@example(86400 - 1800.0)
def test_durations_are_close_and_never_clumsy(seconds: float) -> None:
    number, unit = number_and_unit(duration(seconds))
    assert number < LIMITS.get(unit, 1e9)
    assert abs(number * SECONDS[unit] - seconds) <= 0.0551 * seconds


@given(st.floats(0, 1e9), st.floats(1, 100))
def test_more_is_never_said_to_be_less(amount: float, factor: float) -> None:
    for words, units in ((size, BYTES), (duration, SECONDS)):
        pair = [words(amount), words(amount * factor)]
        if "below 1 ms" not in pair:
            less, more = (n * units[u] for n, u in map(number_and_unit, pair))
            assert less <= more


def test_free_bytes_of_this_machine() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**60
