"""Words of the demos' command lines: what argparse makes of them."""

from __future__ import annotations

import argparse
import math


def words(text: str) -> tuple[str, ...]:
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:  # else a default would run in its place, or nothing
        raise argparse.ArgumentTypeError(
            f"{text!r} is an empty list: give one word or more, comma-separated"
        )
    return found


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(positive(word) for word in words(text)))


def whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def rate(text: str) -> str | None:
    from ..emulation import parse_rate

    if text == "none":
        return None
    try:
        parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
