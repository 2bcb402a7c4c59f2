"""Types of flags: each function converts a string or raises an error saying what is expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

LARGEST = 10**9  # of any count
LONGEST = 366 * 24 * 3600.0  # seconds
SHOWN = 60  # characters of a wrong value that are repeated


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise wrong(text, f"a whole number from {least} to {most}")
        return number

    return parse


def number(least: float = -math.inf, *, below: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that takes a finite number of `least` or more, and less than `below`."""

    def parse(text: str) -> float:
        value = as_float(text)
        if not (least <= value < below and math.isfinite(value)):
            bounds = "" if least == -math.inf else f" of {least:g} or more"
            bounds += "" if below == math.inf else f", below {below:g}"
            raise wrong(text, f"a finite number{bounds}")
        return value

    return parse


def millimetres(text: str) -> float:
    """A voxel size in mm: above 0 and within a plausible range."""
    value = as_float(text)
    if not 1e-4 <= value <= 1e4:
        raise wrong(text, "a length in mm from 0.0001 to 10000")
    return value


def path(text: str) -> Path:
    """A path that is not empty."""
    if not text or "\0" in text:
        raise wrong(text, "a path")
    return Path(text)


def words(text: str) -> str:
    """A string that is not empty."""
    if not text.strip():
        raise wrong(text, "a name or value; it is empty")
    return text


def share(text: str) -> float:
    """A fraction from 0 to 1, given as `keep` (1), `drop` (0) or `N%`."""
    percent = {"keep": 100.0, "drop": 0.0}.get(text)
    percent = as_float(text.removesuffix("%")) if percent is None else percent
    if not 0 <= percent <= 100:
        raise wrong(text, "keep, drop or a percentage from 0% to 100%")
    return percent / 100


def duration(text: str) -> float:
    """Seconds, given as `90s`, `30m` or `2h`."""
    seconds = as_float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}.get(text[-1:], math.nan)
    if not 0 < seconds <= LONGEST:
        raise wrong(text, "a time above 0 like 90s, 30m or 2h, of a year at most")
    return seconds


def duration_text(seconds: float) -> str:
    """Seconds as `duration` reads them, in the largest unit of which there is at least one."""
    unit, size = next((unit for unit in (("h", 3600), ("m", 60)) if seconds >= unit[1]), ("s", 1))
    return f"{seconds / size:.3g}{unit}"


def prompt_mode(text: str) -> int | str:
    """A key of PROMPT_MODES or MIXED; other values are unchanged, for argparse to refuse."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 3 else text


def jitter(text: str) -> str:
    """`N` pixels or `N%` of the image's side, less than 100%; kept as a string."""
    if not 0 <= as_float(text.removesuffix("%")) < (100 if text.endswith("%") else math.inf):
        raise wrong(text, "a number of pixels like 4, or a percentage like 2% below 100%")
    return text


def jitter_pixels(text: str, img_size: int) -> float:
    """The value of `--prompt_jitter` in pixels, for images of side `img_size`."""
    number = float(text.removesuffix("%"))
    return number * img_size / 100 if text.endswith("%") else number


def class_weights(text: str) -> str:
    """`none`, `balanced` or numbers separated by commas; kept as a string."""
    numbers = [] if text in ("none", "balanced") else text.split(",")
    if not all(0 <= as_float(number) < math.inf for number in numbers):
        raise wrong(text, "none, balanced or numbers like 1,2,4")
    return text


def address(text: str) -> tuple[str, int]:
    """PORT on 127.0.0.1, or HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise wrong(text, "PORT or HOST:PORT, with a port from 1 to 65535")
    return host.strip("[]") or "127.0.0.1", int(port)


def orientation(text: str) -> str:
    """Three letters, one each of R/L, A/P and S/I."""
    letters = text.upper()
    pairs = sorted("RAS"["RLAPSI".index(c) // 2] for c in letters if c in "RLAPSI")
    if len(letters) != 3 or pairs != ["A", "R", "S"]:
        raise wrong(text, "three letters such as LPS or RAS, one of each of R/L, A/P and S/I")
    return letters


def as_float(text: str) -> float:
    """`text` as a number; NaN if it is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def wrong(text: str, expected: str) -> argparse.ArgumentTypeError:
    """The error for a `text` that is not as expected; long texts are shortened."""
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return argparse.ArgumentTypeError(f"{shown!r} is not {expected}")
