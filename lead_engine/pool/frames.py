"""A template's own words around a record's texts, read off a marked rendering, and the texts found by them.

Frames are what a marked rendering (`marks`) says: the template's words before the first text, and for each text what
the template wrote in its place and the words behind it. The rendering without marks must be the same words with the
record's texts between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lead_engine.pool.marks import Misfit, Text
from lead_engine.pool.special_tokens import REASONING

Span = tuple[int, int]
"""[begin, end) in characters of a rendering."""
SHOWN = 48
"""Characters of a text that a message shows."""


class Slot(NamedTuple):
    """A text in a marked rendering."""

    number: int
    """Which of the record's texts."""
    inside: str | None
    """What stands between its marks; None where a mark was lost."""
    gap_before: bool
    """Whether anything may stand before it, its opening mark being lost."""
    behind: str | None
    """The template's words between it and the next text; None where they are not known."""


class Frames(NamedTuple):
    """A marked rendering: the template's words before the first text (None: not known), and the texts."""

    before: str | None
    slots: list[Slot]

    @property
    def whole(self) -> bool:
        """Whether no mark was lost."""
        return self.before is not None and all(slot.inside is not None for slot in self.slots)

    def filled(self, texts: Sequence[Text]) -> Frames:
        """The same frames around other texts."""
        return Frames(self.before, [slot._replace(inside=texts[slot.number].value) for slot in self.slots])


def frames_of(pieces: Sequence[Any]) -> Frames:
    """`Marks.pieces` as Frames. Between a text whose mark was lost and its neighbour nothing is known."""
    before: str | None = pieces[0]
    slots: list[Slot] = []
    i = 1  # marks stand at odd places, text at even ones
    while i < len(pieces):
        number, is_closing = divmod(pieces[i], 2)
        if not is_closing and pieces[i + 2 : i + 3] == [pieces[i] + 1]:
            slots.append(Slot(number, pieces[i + 1], gap_before=False, behind=pieces[i + 3]))
            i += 4
            continue
        if is_closing:  # its opening mark was lost: where it begins, and so what stands before it, is not known
            if slots:
                slots[-1] = slots[-1]._replace(behind=None)
            else:
                before = None
            slots.append(Slot(number, None, gap_before=True, behind=pieces[i + 1]))
        else:  # its closing mark was lost
            slots.append(Slot(number, None, gap_before=False, behind=None))
        i += 2
    return Frames(before, slots)


# --- finding the texts ---


def find_texts(text: str, frames: Frames, texts: Sequence[Text]) -> list[list[Span]]:
    """Where in `text` each of `texts` stands, which may be several times. Raises Misfit for one that does not."""
    rendered = {slot.number for slot in frames.slots}
    for index, each in enumerate(texts):
        if index not in rendered:
            hint = fold_hint() if each.name.endswith("(system)") else ""
            what = f"{show(each.value)} is not in the text"
            raise Misfit("template_drops_text", f"the chat template drops {each.name}: {what}{hint}")
    for slot in frames.slots:
        expected = texts[slot.number]
        if slot.inside is not None and slot.inside != expected.value and slot.inside not in _spellings(expected):
            raise _changed(expected, slot.inside)
    spans = locate(text, frames, texts)
    if isinstance(spans, Slot):
        # The text that failed may be the next one's neighbour: the first that lost a mark is the one to name.
        lost = next((slot for slot in frames.slots if slot.inside is None), spans)
        raise _changed(texts[lost.number], text if spans.inside is None else spans.inside)
    return spans


def locate(text: str, frames: Frames, texts: Sequence[Text]) -> list[list[Span]] | Slot:
    """The spans of every text if `text` is `frames` but for white space at texts' ends; else the slot that fails."""
    spans: list[list[Span]] = [[] for _ in texts]
    if frames.before and not text.startswith(frames.before):
        return frames.slots[0]
    place = len(frames.before or "")
    for slot in frames.slots:
        found = _find(text, place, slot, texts[slot.number], is_last=slot is frames.slots[-1])
        if found is None:
            return slot
        spans[slot.number].append(found)
        place = found[1] + len(slot.behind or "")
    return spans


def _find(text: str, place: int, slot: Slot, expected: Text, *, is_last: bool) -> Span | None:
    """The first span from `place` on where the text may stand and behind which the template's words follow."""
    spellings = _spellings(expected) if slot.inside is None else (slot.inside,)
    for spelling in spellings:
        for begin, end in _candidates(text, place, spelling, slot.gap_before):
            if slot.behind and not text.startswith(slot.behind, end):
                continue
            if is_last and slot.behind is not None and end + len(slot.behind) != len(text):
                continue
            return begin, end
    return None


def _candidates(text: str, place: int, spelling: str, gap: bool) -> Iterator[Span]:
    """Where a text may stand: at `place`, with `gap` anywhere behind it; whole, or without white space at its ends."""
    core = spelling.strip()
    lead = len(spelling) - len(spelling.lstrip())
    trail = spelling[lead + len(core) :]
    if not gap:
        yield from _candidates_at(text, place, spelling[:lead], core, trail)
    # Around what marks reasoning, templates put line breaks of their own.
    parts = [part.strip() for part in re.split(f"({REASONING.pattern})", core)]
    parts = [part for part in parts if part]
    if len(parts) == 1 and not gap:
        return
    begin = text.find(parts[0], place)
    while begin >= 0 and (gap or not text[place:begin].strip()):
        end = _end_of_parts(text, begin, parts)
        if end is not None:
            if trail and text.startswith(trail, end):
                yield begin, end + len(trail)
            yield begin, end
        begin = text.find(parts[0], begin + 1)


def _candidates_at(text: str, place: int, lead: str, core: str, trail: str) -> Iterator[Span]:
    """At `place`: the text with all, some or none of the white space at its ends, the longest first."""
    for cut in range(len(lead) + 1):
        begin = place + len(lead) - cut
        if not text.startswith(core, begin) or not text.startswith(lead[cut:], place):
            continue
        for kept in range(len(trail), -1, -1):
            if text.startswith(trail[:kept], begin + len(core)):
                yield place, begin + len(core) + kept


def _end_of_parts(text: str, begin: int, parts: Sequence[str]) -> int | None:
    """Where the parts end that stand from `begin` on with nothing but white space between; None if they do not."""
    end = begin + len(parts[0])
    for part in parts[1:]:
        end += len(text[end:]) - len(text[end:].lstrip())
        if not text.startswith(part, end):
            return None
        end += len(part)
    return end


def _spellings(text: Text) -> tuple[str, ...]:
    """How a text may stand in a rendering: as it is and, inside an object, as JSON or Python writes it."""
    value = text.value
    if not text.in_object:
        return (value,)
    return value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]


# --- what the errors say ---


def _changed(missing: Text, text: str) -> Misfit:
    """The problem of a text that is not in the rendering as it should be: where the two part."""
    value = missing.value.strip()
    for start in (value, value[:16], value[:4]):  # where the rendering comes nearest
        if start in text:
            text = text[text.index(start) :]
            break
    text = text.strip()
    parted = max(0, common_prefix(value, text) - 8)
    parting = f"the record has {show(value[parted:])}, the text {show(text[parted:])}"
    return Misfit("template_changes_text", f"the chat template changes {missing.name}: {parting}")


def fold_hint(when: str = "") -> str:
    """The way out where a template has no system message, as the end of an error's text."""
    condition = f"{when}, " if when else ""
    return f"; {condition}--fold-system puts it before the first question"


def common_prefix(a: str, b: str) -> int:
    """How many characters the two texts begin with alike."""
    if a.startswith(b):
        return len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def show(text: str) -> str:
    """The text's start, quoted, as a message shows it."""
    if not text:
        return "nothing more"
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")
