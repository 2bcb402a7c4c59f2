"""What the values of flags must look like: types for argparse, which names what does not fit.

usam.flags gives them to the flags.
"""

from __future__ import annotations

import argparse
import math


def share(text: str) -> float:
    """A share from 0 to 1: `keep` is 1, `drop` is 0, `N%` a part; as a flag's value."""
    number = {"keep": 100.0, "drop": 0.0}.get(text)
    try:
        number = float(text.removesuffix("%")) if number is None else number
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not keep, drop or a percentage")
    return number / 100


def prompt_mode(text: str) -> int | str:
    """A key of PROMPT_MODES or MIXED; anything else as it is, for argparse to refuse."""
    return int(text) if text.isdigit() else text


def jitter(text: str) -> str:
    """`N` pixels or `N%` of the image, from 0 to a whole image, as a flag's value."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number < (100 if text.endswith("%") else math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not a number of pixels or a percentage")
    return text


def class_weights(text: str) -> str:
    """`none`, `balanced` or numbers with commas between, as a flag's value."""
    numbers = [] if text in ("none", "balanced") else text.split(",")
    try:
        fit = all(0 <= float(number) < math.inf for number in numbers)
    except ValueError:
        fit = False
    if not fit:
        raise argparse.ArgumentTypeError(f"{text} is not none, balanced or numbers like 1,2,4")
    return text


def decay(text: str) -> float:
    """A number of 0 or more and below 1, as a flag's value."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return number


def count(text: str) -> int:
    """An integer of 0 or more, as a flag's value."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def positive(text: str) -> int:
    """An integer of 1 or more, as a flag's value."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def non_negative(text: str) -> float:
    """A finite number of 0 or more, as a flag's value."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return number


def above_zero(text: str) -> float:
    """A finite number above 0, as a flag's value."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number
