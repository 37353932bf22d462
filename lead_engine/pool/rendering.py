"""A record as its chat template renders it, compared with the record.

A template is a program: it may drop a system message, cut the reasoning out of an answer, escape or shorten a text, or
ask for the next answer behind every one. So every conversation is rendered a second time with each text of the record
between two private characters. What the marks stand around in that rendering must stand, the same but for white space
at its ends, in the rendering that is trained; this tells a text from an equal one elsewhere, and from the template's
own words. Templates that look into a text (for `</think>`, say) may part it from a mark; then it is searched for in
what follows the text before it.

An answer is learned from where the rendering of the turns before it, with the generation prompt, ends (that is the text
which the model answers when it is used) to the end of turn behind it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lead_engine.pool.chat_template import render
from lead_engine.pool.records import Message, Record
from lead_engine.pool.special_tokens import REASONING, any_of, control_tokens

PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
"""Characters of private use. A block of them that the rendering does not hold marks texts: text k stands between block + 2k
and block + 2k + 1."""
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


@dataclass
class Rendered:
    """`text`, where in it answers are learned and where texts of the record stand ([begin, end) in characters)."""

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)
    contents: list[tuple[int, int]] = field(default_factory=list)
    unasked: str = ""
    """How the generation prompt goes on where an answer begins otherwise ("<think>\\n", for an answer without)."""
    open_end: bool = False
    """No control token ends the answers."""


class Renderer:
    """Renders records with one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self.control_ids = set(self.control.values())
        self.control_pattern = any_of(self.control)

    def record(self, record: Record) -> Rendered:
        """A whole record, its answers found. Raises Misfit; turns behind the last answer are not rendered."""
        last = max((i for i, m in enumerate(record.messages) if m.role == "assistant"), default=-1)
        messages = record.messages[: last + 1]
        turns = [message.as_turn() for message in messages]
        texts, where, text = self._compare(turns, record.tools, prompt=False)
        rendered = Rendered(text, contents=[span for spans in where for span in spans])
        ends, text_end = self._ends(turns, record.tools, rendered, _extent(texts, where, last))
        rendered.text, rendered.open_end = text[:text_end], not self.control_pattern.search(ends)
        for i, message in enumerate(messages):
            if message.role == "assistant" and message.train:
                begin, unasked = self._begin(turns, record.tools, text, texts, where, i)
                end = _extent(texts, where, i)[1]
                if i == last:
                    end = len(rendered.text.rstrip()) if text_end == len(text) else end + len(ends)
                elif text.startswith(ends, end):
                    end += len(ends)
                else:
                    raise Misfit("answer_not_found", f"behind answer {i + 1} stands {_show(text[end:])}, behind the last one {ends!r}")
                rendered.answers.append((begin, max(end, begin)))
                rendered.unasked = rendered.unasked or unasked
        return rendered

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> Rendered:
        """What the model is asked with after these turns. Raises Misfit."""
        _, where, text = self._compare([message.as_turn() for message in messages], tools, prompt=True)
        return Rendered(text, contents=[span for spans in where for span in spans])

    # --- the texts of the record in the text that is trained ---

    def _render(self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool) -> str:
        try:
            return render(self.tokenizer, turns, prompt=prompt, tools=tools)
        except Exception as error:  # a template raises anything that Python code can
            said = (str(error).strip().splitlines() or [""])[0]
            reason = said if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {said}"
            raise Misfit("template_refused", f"the chat template refuses the conversation ({reason})") from None

    def _compare(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[list[Text], list[list[tuple[int, int]]], str]:
        """The record's texts, the places of each in the rendering, and the rendering."""
        text = self._render(turns, tools, prompt=prompt)
        self._check_fields(turns, tools)
        marks = Marks(text, blocks=1 + len(turns) // 200)
        marked_tools = marks.tools(tools) if tools else tools
        marked_turns = [marks.turn(turn, i) for i, turn in enumerate(turns)]
        try:
            marked = self._render(marked_turns, marked_tools, prompt=prompt)
        except Misfit:  # the marks alone are refused: a template that compares a text with others
            marked = "".join(marks.around(k) for k in range(len(marks.texts)))
        pieces = marks.pieces(marked)
        return marks.texts, _walk(text, pieces, marks.texts) or _search(text, pieces, marks.texts), text

    def _check_fields(self, turns: Sequence[dict[str, Any]], tools: list[Any] | None) -> None:
        """Texts are tokenised so that they forge no control token; other fields may spell none, however rendered."""
        others = [{k: v for k, v in turn.items() if k not in ("content", "reasoning_content")} for turn in turns]
        if tools or any(len(other) > 1 for other in others):
            found = self.control_pattern.search(json.dumps([others, tools], ensure_ascii=False, default=str))
            if found:
                raise Misfit("control_token_in_text", f"its tools, tool calls or names spell the control token {found[0]}")

    # --- the answers in it ---

    def _begin(
        self,
        turns: Sequence[dict[str, Any]],
        tools: list[Any] | None,
        text: str,
        texts: Sequence[Text],
        where: Sequence[list[tuple[int, int]]],
        i: int,
    ) -> tuple[int, str]:
        """Where answer i begins to be learned, and how the generation prompt goes on if not so."""
        prompt = self._render(turns[:i], tools, prompt=True)
        common = len(os.path.commonprefix([text, prompt]))
        before = max((spans[0][1] for each, spans in zip(texts, where, strict=True) if each.turn < i), default=0)
        begin = min(common, _extent(texts, where, i)[0])
        rest = prompt[common:]
        if common >= before and not rest.strip():
            return common, ""
        if common >= before and not text[begin : _extent(texts, where, i)[0]].strip():
            return begin, prompt[begin:]
        raise Misfit(
            "answer_not_found",
            "the chat template's rendering of the turns before an answer, with the generation prompt, is not a prefix of "
            f"its rendering of the whole conversation: the one goes on with {_show(rest)}, the other with "
            f"{_show(text[common:])} (turn {i + 1})",
        )

    def _ends(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, rendered: Rendered, extent: tuple[int, int]
    ) -> tuple[str, int]:
        """What ends every answer, and where the text ends: what asks for another answer behind the last is cut off."""
        text, eos = rendered.text, self.tokenizer.eos_token
        tail = text[extent[1] :]
        first = self.control_pattern.search(tail)
        ends = tail[: first.end()] if first else tail.rstrip()
        behind = tail[len(ends) :]
        extra = (behind.replace(eos, "") if eos else behind).strip()
        if not ends.strip() or (first and not extra):
            return ends, len(text)
        asked = self._render(turns[:-1], tools, prompt=False).rstrip()
        if first:
            opening = text[: min(begin for begin, _ in rendered.contents)].removeprefix(self.tokenizer.bos_token or "")
            if asked.endswith(behind.strip()) and (first[0] == eos or first[0] not in opening):
                return ends, extent[1] + len(ends) + len(behind) - len(behind.lstrip())
            raise Misfit("text_behind_answer", f"behind the answer and its end of turn stands {_show(behind)}")
        reaches = text.startswith(asked) and not text[len(asked) : extent[0]].strip()
        if reaches and os.path.commonprefix([asked[::-1], ends[::-1]]).strip() and self._always_asks():
            raise Misfit("text_behind_answer", f"behind the answer stands {_show(tail)}, with which an answer is asked for")
        return ends, len(text)

    def _always_asks(self) -> bool:
        """Whether an empty conversation, or none, has a text: then what a conversation ends in may ask for an answer."""
        try:
            text = self._render([], None, prompt=False)
        except Misfit:
            return True
        return bool(text.removeprefix(self.tokenizer.bos_token or "").strip())


# --- marks ---


class Marks:
    """Copies of turns and tools in which the texts stand between marks; `texts` are those that were marked."""

    def __init__(self, text: str, blocks: int) -> None:
        self.texts: list[Text] = []
        self.size = blocks * BLOCK
        taken = {ord(character) // self.size for character in PRIVATE.findall(text)}
        free = (n for n in range(-(-0xF0000 // self.size), 0x110000 // self.size) if n not in taken)
        self.first = next(free, 0) * self.size
        if not self.first:
            raise Misfit("template_refused", "holds characters from every block of private use, one of which marks texts")

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
        """The marked rendering as text, mark, text, mark, ..., text; a mark as 2k (opens text k) or 2k + 1 (closes it)."""
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


def _walk(text: str, pieces: Sequence[Any], texts: Sequence[Text]) -> list[list[tuple[int, int]]] | None:
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
    """As `_walk`, for templates that look into the texts: one after the other, in the marked rendering's order.

    Raises Misfit for a text of which no mark was rendered, and for one that does not follow the text before it.
    """
    order = list(dict.fromkeys(mark // 2 for mark in pieces[1::2]))
    for k, each in enumerate(texts):
        if k not in order:
            raise Misfit("template_drops_text", f"the chat template drops {each.name}: {_show(each.value)} is not in the text")
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
            raise Misfit("template_changes_text", _parting(text, place, texts[k]))
        where[k] = [found.span()]
        place = found.end()
    return where


def _spellings(value: str) -> tuple[str, ...]:
    """How a text may stand in a rendering: as it is, or inside JSON."""
    if value.isascii() and '"' not in value and "\\" not in value and value.isprintable():
        return (value,)
    return value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]


def _parting(text: str, place: int, missing: Text) -> str:
    """The message for a text that is not in the rendering as it should be: where the two part."""
    value, shared, at = missing.value.strip(), 0, place
    low, high = 1, len(value)
    while low <= high:  # the longest start of the record's text that stands in the rendering
        middle = (low + high) // 2
        found = text.find(value[:middle], place)
        low, high, shared, at = (middle + 1, high, middle, found) if found >= 0 else (low, middle - 1, shared, at)
    here = text[at + shared :] if shared else text[place:]
    return (
        f"the chat template changes {missing.name}: the record has {_show(value[max(0, shared - 8) :])}, "
        f"the text {_show(text[at + max(0, shared - 8) :] if shared else here)}"
    )


def _extent(texts: Sequence[Text], where: Sequence[list[tuple[int, int]]], turn: int) -> tuple[int, int]:
    """[begin, end) from the first to the last text of a turn."""
    spans = [span for each, spans in zip(texts, where, strict=True) if each.turn == turn for span in spans]
    if not spans:
        raise Misfit("answer_not_found", f"turn {turn + 1} has no text that could be told from the template's own")
    return min(begin for begin, _ in spans), max(end for _, end in spans)


def _show(text: str) -> str:
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "") if text else "nothing more"
