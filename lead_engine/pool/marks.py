"""A record's texts between marks, and where they stand in a rendering without marks.

A template is a program: it may drop a system message, cut the reasoning out of an answer, escape or shorten a text. So
every conversation is rendered a second time with each text of the record between two private characters. What the marks
stand around in that rendering must stand, the same but for white space at its ends, in the rendering that is trained;
this tells a text from an equal one elsewhere, and from the template's own words. Templates that look into a text (for
`</think>`, say) may part it from a mark; then it is searched for in what follows the text before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lead_engine.pool.special_tokens import REASONING

PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
"""Characters of private use. A block of them that the rendering does not hold marks texts: text k stands between
block + 2k and block + 2k + 1."""
BLOCK = 0x1000
SHOWN = 48
"""Characters of a text that a message shows."""


class Misfit(Exception):
    """The template and the record do not fit together: (kind of problem, what is wrong)."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


TOOLS = -1


class Text(NamedTuple):
    """One text of a record: what it is to the user, the turn it belongs to (or TOOLS), and itself."""

    name: str
    turn: int
    value: str


def plain_text(turn: dict[str, Any], i: int) -> Text:
    return Text(f"the content of turn {i + 1} ({turn['role']})", i, turn["content"])


def filled(pieces: Sequence[str | int], texts: Sequence[Text]) -> list[str | int]:
    """A marked rendering's pieces with other texts between the marks."""
    return [texts[pieces[i - 1] // 2].value if i % 4 == 2 else piece for i, piece in enumerate(pieces)]


class Marks:
    """Copies of turns and tools in which the texts stand between marks; `texts` are those that were marked."""

    def __init__(self, text: str, blocks: int) -> None:
        self.texts: list[Text] = []
        self.size = blocks * BLOCK
        taken = {ord(character) // self.size for character in PRIVATE.findall(text)}
        free = (n for n in range(-(-0xF0000 // self.size), 0x110000 // self.size) if n not in taken)
        self.first = next(free, 0) * self.size
        if not self.first:
            raise Misfit("template_refused", "holds characters from every block of private use; one has to mark texts")

    def turn(self, turn: dict[str, Any], i: int) -> dict[str, Any]:
        name, marked = f"turn {i + 1} ({turn['role']})", dict(turn)
        for key in ("reasoning_content", "content"):
            if isinstance(turn.get(key), str):
                marked[key] = self._text(turn[key], f"the {key} of {name}", i)
        if isinstance(turn.get("tool_calls"), list):
            marked["tool_calls"] = [self._call(call, name, i) for call in turn["tool_calls"]]
        return marked

    def tools(self, tools: list[Any]) -> list[Any]:
        """With their names marked; what else they say is told by templates in ways of their own."""
        return [self._call(tool, "the record's tools", TOOLS) for tool in tools]

    def around(self, k: int) -> str:
        return f"{chr(self.first + 2 * k)}{self.texts[k].value}{chr(self.first + 2 * k + 1)}"

    def pieces(self, marked: str) -> list[str | int]:
        """The marked rendering as text, mark, text, ..., text; a mark as 2k (opens text k) or 2k + 1 (closes it)."""
        parts = re.split(f"([{chr(self.first)}-{chr(self.first + self.size - 1)}])", marked)
        return [ord(part) - self.first if i % 2 else part for i, part in enumerate(parts)]

    def _text(self, value: str, name: str, turn: int) -> str:
        if not value.strip():  # nothing that could be missing
            return value
        if 2 * len(self.texts) > self.size - 2:
            raise Misfit("template_refused", f"has more than {len(self.texts):,} texts")
        self.texts.append(Text(name, turn, value))
        return self.around(len(self.texts) - 1)

    def _call(self, call: Any, name: str, turn: int) -> Any:
        """Of a tool call, name and arguments; of a tool, its name."""
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"], name, turn)}
        marked = dict(call)
        if isinstance(call.get("name"), str):
            marked["name"] = self._text(call["name"], f"a tool's name in {name}", turn)
        if turn != TOOLS and "arguments" in call:
            marked["arguments"] = self._leaves(call["arguments"], f"a tool call's argument in {name}", turn)
        return marked

    def _leaves(self, value: Any, name: str, turn: int) -> Any:
        if isinstance(value, str):
            return self._text(value, name, turn)
        if isinstance(value, dict):
            return {key: self._leaves(each, name, turn) for key, each in value.items()}
        if isinstance(value, list):
            return [self._leaves(each, name, turn) for each in value]
        return value


# --- finding the texts ---


def find_texts(text: str, pieces: Sequence[Any], texts: Sequence[Text]) -> list[list[tuple[int, int]]]:
    """Where in `text`, [begin, end) in characters, each of `texts` stands, given the marked rendering's pieces.

    Raises Misfit for a text that does not stand there.
    """
    return walk(text, pieces, texts) or _search(text, pieces, texts)


def walk(text: str, pieces: Sequence[Any], texts: Sequence[Text]) -> list[list[tuple[int, int]]] | None:
    """The places of every text, if `text` is the marked rendering but for white space at the ends of marked texts."""
    where: list[list[tuple[int, int]]] = [[] for _ in texts]
    if len(pieces) % 4 != 1 or not text.startswith(pieces[0]):
        return None
    place = len(pieces[0])
    for at in range(1, len(pieces), 4):
        opening, inside, closing, frame = pieces[at : at + 4]
        k, odd = divmod(opening, 2)
        if odd or closing != opening + 1 or (inside != texts[k].value and inside not in _spellings(texts[k].value)):
            return None
        final = at + 4 == len(pieces)
        for begin, end in _strippings(text, place, inside):
            if text.startswith(frame, end) and (not final or end + len(frame) == len(text)):
                where[k].append((begin, end))
                place = end + len(frame)
                break
        else:
            return None
    return where if all(where) else None


def _strippings(text: str, place: int, inside: str) -> Iterator[tuple[int, int]]:
    """Where `inside` may stand from `place` on: whole first, then with less and less white space at its ends."""
    core = inside.strip()
    lead = len(inside) - len(inside.lstrip())
    trail = inside[lead + len(core) :]
    for cut in range(lead + 1):
        begin = place + lead - cut
        if text.startswith(core, begin) and text.startswith(inside[cut:lead], place):
            for kept in range(len(trail), -1, -1):
                end = begin + len(core) + kept
                if text.startswith(trail[:kept], begin + len(core)):
                    yield begin, end


def _search(text: str, pieces: Sequence[Any], texts: Sequence[Text]) -> list[list[tuple[int, int]]]:
    """As `walk`, for templates that look into the texts: one after the other, in the marked rendering's order.

    Raises Misfit for a text of which no mark was rendered, and for one that does not follow the text before it.
    """
    order = list(dict.fromkeys(mark // 2 for mark in pieces[1::2]))
    for k, each in enumerate(texts):
        if k not in order:
            what = f"{show(each.value)} is not in the text"
            raise Misfit("template_drops_text", f"the chat template drops {each.name}: {what}")
    where: list[list[tuple[int, int]]] = [[] for _ in texts]
    place = 0
    for k in order:
        value = texts[k].value
        found = None
        for spelling in _spellings(value):
            # Around what marks reasoning, templates put line breaks of their own.
            parts = [part.strip() for part in re.split(f"({REASONING.pattern})", spelling)]
            found = found or re.compile(r"\s*".join(re.escape(part) for part in parts if part)).search(text, place)
        if found is None:
            raise Misfit("template_changes_text", _parting(text[place:], pieces, k, texts[k]))
        where[k] = [found.span()]
        place = found.end()
    return where


def _spellings(value: str) -> tuple[str, ...]:
    """How a text may stand in a rendering: as it is, or inside JSON."""
    if value.isascii() and '"' not in value and "\\" not in value and value.isprintable():
        return (value,)
    return value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]


def _parting(text: str, pieces: Sequence[Any], k: int, missing: Text) -> str:
    """The message for a text that is not in the rendering as it should be: where the two part."""
    value = missing.value.strip()
    marks = pieces[1::2]
    if 2 * k in marks and marks[marks.index(2 * k) + 1 :][:1] == [2 * k + 1]:
        text = pieces[2 * marks.index(2 * k) + 2].strip()  # what the template made of it
    parted = max(0, common_prefix(value, text) - 8)
    parting = f"the record has {show(value[parted:])}, the text {show(text[parted:])}"
    return f"the chat template changes {missing.name}: {parting}"


def extent(texts: Sequence[Text], where: Sequence[list[tuple[int, int]]], turn: int) -> tuple[int, int]:
    """[begin, end) from the first to the last text of a turn."""
    spans = [span for each, spans in zip(texts, where, strict=True) if each.turn == turn for span in spans]
    if not spans:
        raise Misfit("answer_not_found", f"turn {turn + 1} has no text that can be told from the template's own")
    return min(begin for begin, _ in spans), max(end for _, end in spans)


def common_prefix(a: str, b: str) -> int:
    """How many characters the two texts begin with alike."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def show(text: str) -> str:
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "") if text else "nothing more"
