"""What stands beside a config's field: the range of a number, and that text may name a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

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
        largest = LARGEST[type(value)]
        bounded = self.le is not None or self.lt is not None
        above = value >= self.ge if self.ge is not None else value > (-largest if self.gt is None else self.gt)
        below = value < self.lt if self.lt is not None else value <= (largest if self.le is None else self.le)
        if above and below:
            return None
        if above and not bounded:
            return f"finite, and at most {largest:g}" if isinstance(value, float) else f"at most {largest}"
        return self.says or self._rule(isinstance(value, float), above)

    def _rule(self, is_float: bool, is_above: bool) -> str:
        """Both ends of a float's interval; of a whole number's, the end that was passed."""
        if is_float and self.low is not None and self.high is not None:
            return f"in {'(' if self.ge is None else '['}{self.low:g}, {self.high:g}{')' if self.le is None else ']'}"
        if is_above:
            return f"below {self.lt}" if self.le is None else f"at most {self.le}"
        if self.low is None:
            return "a finite number"
        if self.ge is None:
            return f"above {self.gt}"
        if self.ge == 0:
            return f"0 ({self.zero}) or more" if self.zero else "0 or more"
        return f"at least {self.ge}"

    @property
    def low(self) -> float | None:
        return self.gt if self.ge is None else self.ge

    @property
    def high(self) -> float | None:
        return self.lt if self.le is None else self.le


@dataclass(frozen=True)
class Expands:
    """Marks text that may name a file: `~` and `$VAR` are expanded in it, as in every Path, and it is not empty."""


PathText = Annotated[str, Expands()]
"""A path, or another name for what it stands for (a model or data set of the hub)."""
Count = Annotated[int, Bounds(ge=1, le=2**24)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1, says="between 0 and 4294967295")]
"""The range that NumPy, scikit-learn and torch all take."""
