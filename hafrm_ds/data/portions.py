"""Portions of a set: `:5%`, `10%:`, `5%:50%`, `:1000`."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

BOUND = r"(?:(\d+(?:\.\d+)?)(%?))?"
PORTION = re.compile(f"{BOUND}:{BOUND}")


@dataclass(frozen=True)
class Bound:
    """One end of a portion: a share of the whole (between 0 and 1), or a number of pairs."""

    amount: Fraction
    is_share: bool

    def position(self, total: int) -> int:
        return min(total, math.floor(self.amount * total if self.is_share else self.amount))


def parse_portion(text: str) -> tuple[Bound, Bound]:
    """`START:STOP`, each a percentage, a number of pairs or nothing -> bounds. Raises ValueError."""
    match = PORTION.fullmatch(text)
    if match is None or text == ":":
        raise ValueError(f"{text!r} is no portion: write START:STOP, each a percentage or a count: :5%, 10%: or :1000")

    def bound(number: str | None, percent: str | None, default: int) -> Bound:
        if number is None:
            return Bound(Fraction(default), is_share=True)
        return Bound(Fraction(number) / 100, is_share=True) if percent else Bound(Fraction(number), is_share=False)

    start, stop = bound(match[1], match[2], default=0), bound(match[3], match[4], default=1)
    if any(end.is_share and end.amount > 1 for end in (start, stop)):
        raise ValueError(f"portion {text!r} goes beyond 100%")
    if any(not end.is_share and end.amount.denominator > 1 for end in (start, stop)):
        raise ValueError(f"portion {text!r} asks for a part of a pair")
    if stop.amount == 0 or (start.is_share == stop.is_share and start.amount >= stop.amount):
        raise ValueError(f"portion {text!r} is empty: its start is not before its stop")
    return start, stop


def portion_range(text: str, total: int) -> range:
    """Positions of a portion of `total` pairs; percentages are rounded down."""
    start, stop = parse_portion(text)
    return range(start.position(total), stop.position(total))
