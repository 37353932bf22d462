"""A record as its chat template renders it, compared with the record, and the answers found in it.

An answer is learned from where the rendering of the turns before it, with the generation prompt, ends (that is the text
which the model answers when it is used) to the end of turn behind it. Where an answer does not go on as the prompt does
(a prompt that opens `<think>`, an answer without), it is learned from where the two part, and that is counted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lead_engine.pool.chat_template import PROBES, render
from lead_engine.pool.marks import (
    Frames,
    Marks,
    Misfit,
    Step,
    Text,
    common_prefix,
    extent,
    find_texts,
    fold_hint,
    frames_of,
    plain_text,
    show,
    walk,
)
from lead_engine.pool.records import Message, Record
from lead_engine.pool.special_tokens import any_of, control_tokens

PLAIN = {"role", "content"}
SHAPES = 4096
"""Marked renderings that are kept."""


@dataclass
class Rendered:
    """`text`, where in it answers are learned and where texts of the record stand ([begin, end) in characters)."""

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)
    contents: list[tuple[int, int]] = field(default_factory=list)
    unasked: str = ""
    """How the generation prompt goes on where an answer begins otherwise ("<think>\\n", for an answer without)."""
    other_end: str = ""
    """The control token behind an earlier answer where another one ends the last: it is not learned."""
    open_end: bool = False
    """No control token ends the answers."""


class Renderer:
    """Renders records with one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.frames: dict[tuple[Any, ...], Frames] = {}
        """Marked renderings by what a conversation of plain turns looks like: its roles, and which turns are blank."""
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
        ends, text_end = self._ends(turns, record.tools, text, extent(texts, where, last))
        rendered.text, rendered.open_end = text[:text_end], not self.control_pattern.search(ends)
        for i, message in enumerate(messages):
            if message.role == "assistant" and message.train:
                begin, unasked = self._begin(turns, record.tools, text, texts, where, i)
                end = extent(texts, where, i)[1]
                if i == last:
                    end = len(rendered.text.rstrip()) if text_end == len(text) else end + len(ends)
                else:
                    calls = [bool(turns[j].get("tool_calls")) for j in (i, last)]
                    end, other = self._end(text, end, ends, calls=calls, i=i)
                    rendered.other_end = rendered.other_end or other
                    later = (spans[0][0] for each, spans in zip(texts, where, strict=True) if each.turn > i)
                    if end > min(later, default=end):  # a tool's result would be learned
                        what = f"behind turn {i + 1} no end of turn stands before the next turn"
                        raise Misfit("answer_not_found", f"answers end differently: {what}")
                rendered.answers.append((begin, max(end, begin)))
                rendered.unasked = rendered.unasked or unasked
        return rendered

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> Rendered:
        """What the model is asked with after these turns. Raises Misfit."""
        _, where, text = self._compare([message.as_turn() for message in messages], tools, prompt=True)
        return Rendered(text, contents=[span for spans in where for span in spans])

    # --- the texts of the record in the text that is trained ---

    def _render(self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool) -> str:
        spelled = [_with_json_arguments(turn) for turn in turns]
        try:
            text = render(self.tokenizer, turns, prompt=prompt, tools=tools)
            if spelled == turns or not any(str(call) in text for turn in turns for call in _arguments(turn)):
                return text
        except Exception as error:  # a template raises anything that Python code can
            with contextlib.suppress(Exception):
                if spelled != turns:
                    return render(self.tokenizer, spelled, prompt=prompt, tools=tools)
            said = (str(error).strip().splitlines() or [""])[0]
            reason = said if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {said}"
            hint = fold_hint("if that is the system message") if any(turn["role"] == "system" for turn in turns) else ""
            raise Misfit("template_refused", f"the chat template refuses the conversation ({reason}){hint}") from None
        # It wrote an object as Python does: such templates, as those that add it to a text, take the arguments' JSON.
        return self._render(spelled, tools, prompt=prompt)

    def _compare(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[list[Text], list[list[tuple[int, int]]], str]:
        """The record's texts, the places of each in the rendering, and the rendering."""
        text = self._render(turns, tools, prompt=prompt)
        shape = None if tools or any(turn.keys() - PLAIN for turn in turns) else (prompt, *map(_kind, turns))
        if shape in self.frames:  # most often, records of one shape differ in their texts alone
            texts = [plain_text(turn, i) for i, turn in enumerate(turns) if turn["content"].strip()]
            where = walk(text, self.frames[shape].filled(texts), texts)
            if not isinstance(where, Step):
                return texts, where, text
        self._check_fields(turns, tools)
        marks = Marks(text, blocks=1 + len(turns) // 200)
        marked_tools = marks.tools(tools) if tools else tools
        marked_turns = [marks.turn(turn, i) for i, turn in enumerate(turns)]
        frames = frames_of(marks.pieces(self._render(marked_turns, marked_tools, prompt=prompt)))
        if shape and frames.whole and len(self.frames) < SHAPES:
            self.frames[shape] = frames
        return marks.texts, find_texts(text, frames, marks.texts), text

    def _check_fields(self, turns: Sequence[dict[str, Any]], tools: list[Any] | None) -> None:
        """Texts are tokenised so that they forge no control token; other fields may spell none, however rendered."""
        others = [{k: v for k, v in turn.items() if k not in ("content", "reasoning_content")} for turn in turns]
        if tools or any(len(other) > 1 for other in others):
            found = self.control_pattern.search(json.dumps([others, tools], ensure_ascii=False, default=str))
            if found:
                what = f"its tools, tool calls or names spell the control token {found[0]}"
                raise Misfit("control_token_in_text", what)

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
        common = common_prefix(text, prompt)
        before = max((spans[0][1] for each, spans in zip(texts, where, strict=True) if each.turn < i), default=0)
        begin = min(common, extent(texts, where, i)[0])
        rest = prompt[common:]
        if common >= before and not rest.strip():
            return common, ""
        if common >= before and not text[begin : extent(texts, where, i)[0]].strip():
            return begin, prompt[begin:]
        raise Misfit(
            "answer_not_found",
            "the chat template's rendering of the turns before an answer, with the generation prompt, is not a prefix "
            f"of its rendering of the whole conversation: the one goes on with {show(rest)}, the other with "
            f"{show(text[common:])} (turn {i + 1})",
        )

    def _ends(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, text: str, extent: tuple[int, int]
    ) -> tuple[str, int]:
        """What ends every answer, and where the text ends: what asks for another answer behind the last is cut off."""
        eos = self.tokenizer.eos_token
        tail = text[extent[1] :]
        first = self._end_of_calls(tail) if turns[-1].get("tool_calls") else self.control_pattern.search(tail)
        ends = tail[: first.end()] if first else tail.rstrip()
        behind = tail[len(ends) :]
        extra = (behind.replace(eos, "") if eos else behind).strip()
        if not ends.strip() or (first and not extra):
            return ends, len(text)
        asked = self._render(turns[:-1], tools, prompt=False).rstrip()
        if first:
            if asked.endswith(behind.strip()) and (first[0] == eos or first[0] not in self._opening):
                return ends, extent[1] + len(ends) + len(behind) - len(behind.lstrip())
            raise Misfit("text_behind_answer", f"behind the answer and its end of turn stands {show(behind)}")
        reaches = text.startswith(asked) and not text[len(asked) : extent[0]].strip()
        if reaches and asked[-1:] == ends[-1:] and self._always_asks():
            raise Misfit("text_behind_answer", f"behind the answer stands {show(tail)}, which asks for another")
        return ends, len(text)

    def _end_of_calls(self, tail: str) -> re.Match[str] | None:
        """What ends a turn behind its calls, which control tokens may close: what ends any turn, or else the last."""
        found = list(self.control_pattern.finditer(tail))
        known = (self._end_of_turn, self.tokenizer.eos_token)
        ends = [match for end in known for match in found if match[0] == end]
        return next(iter(ends or found[::-1]), None)

    def _end(self, text: str, begin: int, ends: str, *, calls: list[bool], i: int) -> tuple[int, str]:
        """Where answer i ends, whose last text ends at `begin`, given what stands behind the last answer; and the
        control token that ends it, if that is another one.

        calls: whether answer i and the last one call tools, of which the template writes more behind the last text.
        """
        if text.startswith(ends, begin):
            return begin + len(ends), ""
        control = self.control_pattern.findall(ends)[-1:]
        place = text.find(control[0], begin) if control else -1
        if place >= 0 and (calls[0] or (calls[1] and not text[begin:place].strip())):
            return place + len(control[0]), ""
        other = self.control_pattern.search(text, begin)
        if control and other and not text[begin : other.start()].strip():
            return begin, other[0]
        stands = f"behind turn {i + 1} stands {show(text[begin:])}, behind the last answer {ends!r}"
        raise Misfit("answer_not_found", f"answers end differently: {stands}")

    @functools.cached_property
    def _end_of_turn(self) -> str | None:
        """The control token that ends answers without calls."""
        try:
            texts, where, text = self._compare(PROBES[0], None, prompt=False)
        except Misfit:
            return None
        return next(iter(self.control_pattern.findall(text, extent(texts, where, 1)[1])), None)

    @functools.cached_property
    def _opening(self) -> str:
        """What stands before the first turn's text. A control token in it opens turns; all may, where it is unknown."""
        try:
            _, where, text = self._compare(PROBES[0], None, prompt=False)
        except Misfit:
            return "".join(self.control)
        return text[: where[0][0][0]].removeprefix(self.tokenizer.bos_token or "")

    def _always_asks(self) -> bool:
        """Whether an empty conversation has a text or is refused: then what a conversation ends in may be a request."""
        try:
            text = self._render([], None, prompt=False)
        except Misfit:
            return True
        return bool(text.removeprefix(self.tokenizer.bos_token or "").strip())


def _arguments(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of the turn's calls, where they are objects and not empty."""
    found = [(call.get("function") or {}).get("arguments") for call in turn.get("tool_calls") or []]
    return [each for each in found if each and isinstance(each, dict)]


def _with_json_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with the arguments of its calls as JSON text, which some templates need."""
    if not _arguments(turn):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = call["function"]
        if isinstance(function.get("arguments"), dict):
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": function})
    return {**turn, "tool_calls": calls}


def _kind(turn: dict[str, Any]) -> tuple[str, bool]:
    return turn["role"], not turn["content"].strip()
