"""What stands beside a config's field: the range of a number, rules that no range can say, and what may name a file.

    capacity: Annotated[int, Bounds(ge=16, le=2**24)] = 4096

`convert` reads these marks wherever a config is built.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

LARGEST = {int: 2**31 - 1, float: 1e9}
"""Upper bound of numbers that name none: what every integer and floating-point type in use can hold."""


@dataclass(frozen=True)
class Bounds:
    """The range of a number: `ge` <= x, `gt` < x, x <= `le`, x < `lt`. NaN and infinity are always outside."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    zero: str = ""
    """What 0 means, where it is no number like the others."""
    says: str = ""
    """The rule in words, where the bounds alone would not tell enough."""

    def broken_by(self, value: float) -> str | None:
        """The rule that `value` breaks, as what it "must be"; None where it is within the bounds."""
        # Written so that NaN, with which every comparison is false, is neither above nor below.
        above, below = self._is_above(value), self._is_below(value)
        if above and below:
            return None
        has_upper_bound = self.le is not None or self.lt is not None
        if above and not has_upper_bound:
            largest = LARGEST[type(value)]
            return f"finite, and at most {largest:g}" if isinstance(value, float) else f"at most {largest}"
        return self.says or self._rule(isinstance(value, float), above)

    def _is_above(self, value: float) -> bool:
        """Whether the value keeps the lower bound."""
        if self.ge is not None:
            return value >= self.ge
        if self.gt is not None:
            return value > self.gt
        return value > -LARGEST[type(value)]

    def _is_below(self, value: float) -> bool:
        """Whether the value keeps the upper bound."""
        if self.lt is not None:
            return value < self.lt
        if self.le is not None:
            return value <= self.le
        return value <= LARGEST[type(value)]

    def _rule(self, is_float: bool, is_above: bool) -> str:
        """Both ends of a float's interval; of a whole number's, the end that was passed."""
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if is_float and low is not None and high is not None:
            opening = "(" if self.ge is None else "["
            closing = ")" if self.le is None else "]"
            return f"in {opening}{low:g}, {high:g}{closing}"
        if is_above:
            return f"below {self.lt}" if self.le is None else f"at most {self.le}"
        if low is None:
            return "a finite number"
        if self.ge is None:
            return f"above {self.gt}"
        if self.ge != 0:
            return f"at least {self.ge}"
        return f"0 ({self.zero}) or more" if self.zero else "0 or more"


@dataclass(frozen=True)
class Rule:
    """A rule about one value that is no range: `holds` tells whether a value keeps it, `says` what it "must be"."""

    says: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Expands:
    """Marks text that may name a file: `~` and `$VAR` are expanded in it, as in every Path, and it is not empty."""


@dataclass(frozen=True)
class OneOf:
    """Text that is one of several names, which are looked up when a value is checked."""

    names: Callable[[], Collection[str]]


def _is_set(values: tuple[Any, ...]) -> bool:
    return len(values) >= 1 and len(set(values)) == len(values)


PathText = Annotated[str, Expands()]
"""A path, or another name for what it stands for (a model or data set of the hub)."""
Count = Annotated[int, Bounds(ge=1, le=2**24)]
"""How many of something; also a number of tokens."""
MaxLength = Annotated[int, Bounds(ge=8, le=2**24)]
"""Tokens of the longest sample."""
Epochs = Annotated[int, Bounds(ge=1, le=1000)]
VocabSize = Annotated[
    int, Bounds(ge=300, le=2**20, says="at least 300 (256 bytes and the special tokens) and at most 1048576")
]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1, says="between 0 and 4294967295")]
"""The range that NumPy, scikit-learn and torch all take."""
Seeds = Annotated[tuple[Seed, ...], Rule("at least one seed, each once", _is_set)]
