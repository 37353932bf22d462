"""A record's texts between marks, so that they can be found in what a chat template makes of the record.

A template is a program: it may drop a system message, cut the reasoning out of an answer, escape or shorten a text. So
every conversation is rendered a second time with each text of the record between two private characters. What the marks
stand around in that rendering must stand, the same but for white space at its ends, in the rendering that is trained
(`frames`). This tells a text from an equal one elsewhere, and from the template's own words. Templates that look into a
text (for `</think>`, say) may part it from a mark; then it must stand, whole, by the other mark.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
"""Characters of private use. A block of them that the rendering does not hold marks texts: text k stands between
block + 2k and block + 2k + 1."""
ESCAPED = re.compile(r"\\U00(?:0f|10)[0-9a-f]{4}|\\ud[b-f][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
"""One of them where a template writes an object as Python does, or as JSON in ASCII."""
FIRST_PRIVATE, END = 0xF0000, 0x110000
BLOCK = 0x1000
"""Marks in one block."""
TOOLS = -1
"""The `turn` of texts that belong to the record's tools."""


class Misfit(Exception):
    """The template and the record do not fit together: (kind of problem, what is wrong)."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Text(NamedTuple):
    """One text of a record: what it is to the user, the turn it belongs to (or TOOLS), and itself."""

    name: str
    turn: int
    value: str
    in_object: bool = False
    """Whether templates may write it inside an object: what a tool is called with and what it gives."""


def plain_text(turn: dict[str, Any], i: int) -> Text:
    """The text of turn i, which has nothing but a role and a content."""
    return Text(f"the content of turn {i + 1} ({turn['role']})", i, turn["content"])


class Marks:
    """Copies of turns and tools in which the texts stand between marks; `texts` are those that were marked."""

    def __init__(self, text: str, blocks: int) -> None:
        """text: the rendering without marks, in which they must not occur. blocks: for how many marks."""
        self.texts: list[Text] = []
        self._num_marks = blocks * BLOCK
        taken = {ord(character) // self._num_marks for character in PRIVATE.findall(_unescaped(text))}
        for number in range(-(-FIRST_PRIVATE // self._num_marks), END // self._num_marks):
            if number not in taken:
                self._first = number * self._num_marks
                return
        raise Misfit("template_refused", "holds characters from every block of private use; one has to mark texts")

    def turn(self, turn: dict[str, Any], i: int) -> dict[str, Any]:
        """Turn i with its texts marked."""
        name, marked = f"turn {i + 1} ({turn['role']})", dict(turn)
        for key in ("reasoning_content", "content"):
            if isinstance(turn.get(key), str):
                marked[key] = self._text(turn[key], f"the {key} of {name}", i, in_object=turn["role"] == "tool")
        if isinstance(turn.get("tool_calls"), list):
            marked["tool_calls"] = [self._call(call, name, i) for call in turn["tool_calls"]]
        return marked

    def tools(self, tools: list[Any]) -> list[Any]:
        """The tools with their names marked; the rest of them is written by templates in ways of their own."""
        return [self._call(tool, "the record's tools", TOOLS) for tool in tools]

    def pieces(self, marked: str) -> list[str | int]:
        """The marked rendering as text, mark, text, ..., text; a mark as 2k (opens text k) or 2k + 1 (closes it)."""
        last = self._first + self._num_marks - 1
        parts = re.split(f"([{chr(self._first)}-{chr(last)}])", _unescaped(marked))
        return [ord(part) - self._first if i % 2 else part for i, part in enumerate(parts)]

    def _text(self, value: str, name: str, turn: int, *, in_object: bool = False) -> str:
        if not value.strip():  # nothing that could be missing
            return value
        k = len(self.texts)
        if 2 * k > self._num_marks - 2:
            raise Misfit("template_refused", f"has more than {k:,} texts")
        self.texts.append(Text(name, turn, value, in_object))
        return f"{chr(self._first + 2 * k)}{value}{chr(self._first + 2 * k + 1)}"

    def _call(self, call: Any, name: str, turn: int) -> Any:
        """A tool call with its name and arguments marked; a tool with its name marked."""
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"], name, turn)}
        marked = dict(call)
        if isinstance(call.get("name"), str):
            marked["name"] = self._text(call["name"], f"a tool's name in {name}", turn, in_object=True)
        if turn != TOOLS and "arguments" in call:
            marked["arguments"] = self._leaves(call["arguments"], f"a tool call's argument in {name}", turn)
        return marked

    def _leaves(self, value: Any, name: str, turn: int) -> Any:
        """Every text inside the value."""
        if isinstance(value, str):
            return self._text(value, name, turn, in_object=True)
        if isinstance(value, dict):
            return {key: self._leaves(each, name, turn) for key, each in value.items()}
        if isinstance(value, list):
            return [self._leaves(each, name, turn) for each in value]
        return value


def _unescaped(text: str) -> str:
    """The text with characters of private use in the place of what spells them."""
    if "\\u" not in text and "\\U" not in text:
        return text
    return ESCAPED.sub(_character, text)


def _character(spelled: re.Match[str]) -> str:
    if spelled[0][1] == "U":  # Python's \U000f0000
        return chr(int(spelled[0][2:], 16))
    return str(json.loads(f'"{spelled[0]}"'))  # JSON's surrogate pair
