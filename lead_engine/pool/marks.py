"""A record's texts between marks, and where they stand in a rendering without marks.

A template is a program: it may drop a system message, cut the reasoning out of an answer, escape or shorten a text. So
every conversation is rendered a second time with each text of the record between two private characters. What the marks
stand around in that rendering must stand, the same but for white space at its ends, in the rendering that is trained;
this tells a text from an equal one elsewhere, and from the template's own words. Templates that look into a text (for
`</think>`, say) may part it from a mark; then it must stand, whole, by the other mark.
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
ESCAPED = re.compile(r"\\U00(?:0f|10)[0-9a-f]{4}|\\ud[b-f][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
"""One of them where a template writes an object as Python does, or as JSON in ASCII."""
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
    json: bool = False
    """Whether templates may write it inside an object: what a tool is called with and what it gives."""


def plain_text(turn: dict[str, Any], i: int) -> Text:
    return Text(f"the content of turn {i + 1} ({turn['role']})", i, turn["content"])


class Marks:
    """Copies of turns and tools in which the texts stand between marks; `texts` are those that were marked."""

    def __init__(self, text: str, blocks: int) -> None:
        self.texts: list[Text] = []
        self.size = blocks * BLOCK
        taken = {ord(character) // self.size for character in PRIVATE.findall(_unescaped(text))}
        free = (n for n in range(-(-0xF0000 // self.size), 0x110000 // self.size) if n not in taken)
        self.first = next(free, 0) * self.size
        if not self.first:
            raise Misfit("template_refused", "holds characters from every block of private use; one has to mark texts")

    def turn(self, turn: dict[str, Any], i: int) -> dict[str, Any]:
        name, marked = f"turn {i + 1} ({turn['role']})", dict(turn)
        for key in ("reasoning_content", "content"):
            if isinstance(turn.get(key), str):
                marked[key] = self._text(turn[key], f"the {key} of {name}", i, json=turn["role"] == "tool")
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
        parts = re.split(f"([{chr(self.first)}-{chr(self.first + self.size - 1)}])", _unescaped(marked))
        return [ord(part) - self.first if i % 2 else part for i, part in enumerate(parts)]

    def _text(self, value: str, name: str, turn: int, *, json: bool = False) -> str:
        if not value.strip():  # nothing that could be missing
            return value
        if 2 * len(self.texts) > self.size - 2:
            raise Misfit("template_refused", f"has more than {len(self.texts):,} texts")
        self.texts.append(Text(name, turn, value, json))
        return self.around(len(self.texts) - 1)

    def _call(self, call: Any, name: str, turn: int) -> Any:
        """Of a tool call, name and arguments; of a tool, its name."""
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"], name, turn)}
        marked = dict(call)
        if isinstance(call.get("name"), str):
            marked["name"] = self._text(call["name"], f"a tool's name in {name}", turn, json=True)
        if turn != TOOLS and "arguments" in call:
            marked["arguments"] = self._leaves(call["arguments"], f"a tool call's argument in {name}", turn)
        return marked

    def _leaves(self, value: Any, name: str, turn: int) -> Any:
        if isinstance(value, str):
            return self._text(value, name, turn, json=True)
        if isinstance(value, dict):
            return {key: self._leaves(each, name, turn) for key, each in value.items()}
        if isinstance(value, list):
            return [self._leaves(each, name, turn) for each in value]
        return value


def _unescaped(text: str) -> str:
    """With characters of private use in the place of what spells them."""
    return ESCAPED.sub(_character, text) if "\\u" in text or "\\U" in text else text


def _character(spelled: re.Match[str]) -> str:
    return chr(int(spelled[0][2:], 16)) if spelled[0][1] == "U" else json.loads(f'"{spelled[0]}"')


# --- finding the texts ---


class Step(NamedTuple):
    """A text in a rendering: which, as what it stands there (None: a mark was lost), whether anything may stand before
    it, and the template's words behind it (None: not known).
    """

    k: int
    inside: str | None
    gap: bool
    frame: str | None


class Frames(NamedTuple):
    """A marked rendering: the template's words before the first text (None: not known), and the texts."""

    first: str | None
    steps: list[Step]

    @property
    def whole(self) -> bool:
        """Whether no mark was lost."""
        return self.first is not None and all(step.inside is not None for step in self.steps)

    def filled(self, texts: Sequence[Text]) -> Frames:
        """With other texts in the places of these."""
        return Frames(self.first, [step._replace(inside=texts[step.k].value) for step in self.steps])


def frames_of(pieces: Sequence[Any]) -> Frames:
    """`Marks.pieces` as Frames. Between a text whose mark was lost and its neighbour nothing is known."""
    first, steps, at = pieces[0], [], 1
    while at < len(pieces):
        k, closing = divmod(pieces[at], 2)
        if not closing and pieces[at + 2 : at + 3] == [pieces[at] + 1]:
            steps.append(Step(k, pieces[at + 1], False, pieces[at + 3]))
            at += 4
            continue
        if not closing:
            steps.append(Step(k, None, False, None))
        else:
            if steps:
                steps[-1] = steps[-1]._replace(frame=None)
            first = first if steps else None
            steps.append(Step(k, None, True, pieces[at + 1]))
        at += 2
    return Frames(first, steps)


def fold_hint(when: str = "") -> str:
    """The way out where a template has no system message, as the end of an error's text."""
    return f"; {when}{', ' if when else ''}--fold-system puts it before the first question"


def find_texts(text: str, frames: Frames, texts: Sequence[Text]) -> list[list[tuple[int, int]]]:
    """Where in `text`, [begin, end) in characters, each of `texts` stands. Raises Misfit for one that does not."""
    rendered = {step.k for step in frames.steps}
    for k, each in enumerate(texts):
        if k not in rendered:
            what = f"{show(each.value)} is not in the text"
            hint = fold_hint() if each.name.endswith("(system)") else ""
            raise Misfit("template_drops_text", f"the chat template drops {each.name}: {what}{hint}")
    for k, inside, _, _ in frames.steps:
        if inside is not None and inside != texts[k].value and inside not in _spellings(texts[k]):
            raise _changed(texts[k], inside)
    where = walk(text, frames, texts)
    if isinstance(where, Step):
        lost = next((step for step in frames.steps if step.inside is None), where)
        raise _changed(texts[lost.k], text if where.inside is None else where.inside)
    return where


def walk(text: str, frames: Frames, texts: Sequence[Text]) -> list[list[tuple[int, int]]] | Step:
    """The places of every text if `text` is `frames` but for white space at its texts' ends; else the step that fails."""
    where: list[list[tuple[int, int]]] = [[] for _ in texts]
    first, steps = frames
    place = len(first or "")
    if first and not text.startswith(first):
        return steps[0]
    for number, step in enumerate(steps, 1):
        k, inside, gap, frame = step
        spellings = (inside,) if inside is not None else _spellings(texts[k])
        for begin, end in (span for spelling in spellings for span in _places(text, place, spelling, gap)):
            behind = end + len(frame or "")
            if not frame or text.startswith(frame, end):
                if number == len(steps) and frame is not None and behind != len(text):
                    continue
                where[k].append((begin, end))
                place = behind
                break
        else:
            return step
    return where


def _places(text: str, place: int, spelling: str, gap: bool) -> Iterator[tuple[int, int]]:
    """Where a text may stand: at `place`, with `gap` anywhere behind it; whole, or without white space at its ends."""
    core = spelling.strip()
    lead = len(spelling) - len(spelling.lstrip())
    trail = spelling[lead + len(core) :]
    if not gap:
        for cut in range(lead + 1):
            begin = place + lead - cut
            if text.startswith(core, begin) and text.startswith(spelling[cut:lead], place):
                for kept in range(len(trail), -1, -1):
                    if text.startswith(trail[:kept], begin + len(core)):
                        yield place, begin + len(core) + kept
    # Around what marks reasoning, templates put line breaks of their own.
    parts = [part.strip() for part in re.split(f"({REASONING.pattern})", core)]
    parts = [part for part in parts if part]
    if len(parts) == 1 and not gap:
        return
    begin = text.find(parts[0], place)
    while begin >= 0 and (gap or not text[place:begin].strip()):
        end = begin + len(parts[0])
        for part in parts[1:]:
            end += len(text[end:]) - len(text[end:].lstrip())
            if not text.startswith(part, end):
                break
            end += len(part)
        else:
            if trail and text.startswith(trail, end):
                yield begin, end + len(trail)
            yield begin, end
        begin = text.find(parts[0], begin + 1)


def _spellings(text: Text) -> tuple[str, ...]:
    """How a text may stand in a rendering."""
    value = text.value
    if not text.json:
        return (value,)
    return value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]


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
