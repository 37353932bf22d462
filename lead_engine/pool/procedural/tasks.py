"""The tasks of the made-up world, by name; the order decides which task gets which random numbers."""

from __future__ import annotations

from lead_engine.pool.procedural.numbers import arithmetic, sequences, units
from lead_engine.pool.procedural.people import facts
from lead_engine.pool.procedural.question import Task
from lead_engine.pool.procedural.words import formatting, sorting, strings

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic,
    "sequences": sequences,
    "units": units,
    "strings": strings,
    "sorting": sorting,
    "facts": facts,
    "formatting": formatting,
}
