"""A conversation as its chat template renders it, with the places of the record's texts in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lead_engine.pool.chat_template import render
from lead_engine.pool.frames import Frames, Slot, Span, find_texts, fold_hint, frames_of, locate
from lead_engine.pool.marks import Marks, Misfit, Text, plain_text
from lead_engine.pool.special_tokens import any_of, control_tokens

Turn = dict[str, Any]
"""A message as chat templates take it."""
PLAIN = {"role", "content"}
MOST_SHAPES = 4096
"""Marked renderings that are kept."""
TURNS_PER_BLOCK = 200
"""Turns for which one block of marks is enough."""


@dataclass(frozen=True)
class Located:
    """A rendering, and the record's texts in it."""

    text: str
    texts: list[Text]
    spans: list[list[Span]]
    """The places of each text; a template may write one several times."""

    def all_spans(self) -> list[Span]:
        return [span for spans in self.spans for span in spans]

    def extent(self, turn: int) -> Span:
        """From the first to the last text of a turn. Raises Misfit where it has none."""
        found: list[Span] = []
        for each, spans in zip(self.texts, self.spans, strict=True):
            if each.turn == turn:
                found += spans
        if not found:
            raise Misfit("answer_not_found", f"turn {turn + 1} has no text that can be told from the template's own")
        return min(begin for begin, _ in found), max(end for _, end in found)

    def end_before(self, turn: int) -> int:
        """Where the last text of earlier turns (or of the tools) ends; 0 where there is none."""
        ends = (spans[0][1] for each, spans in zip(self.texts, self.spans, strict=True) if each.turn < turn)
        return max(ends, default=0)

    def begin_after(self, turn: int) -> int | None:
        """Where the first text of later turns begins; None where there is none."""
        begins = (spans[0][0] for each, spans in zip(self.texts, self.spans, strict=True) if each.turn > turn)
        return min(begins, default=None)


class Locator:
    """Renders conversations with one tokenizer's chat template and finds their texts in the rendering."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self.control_ids = set(self.control.values())
        self.control_pattern = any_of(self.control)
        self._frames: dict[tuple[Any, ...], Frames] = {}
        """Marked renderings by the shape of a conversation of plain turns."""

    def render(self, turns: Sequence[Turn], tools: list[Any] | None, *, prompt: bool) -> str:
        """The template's rendering, with `prompt` what asks for an answer behind it. Raises Misfit if it refuses."""
        spelled = [_with_json_arguments(turn) for turn in turns]
        try:
            text = render(self.tokenizer, turns, prompt=prompt, tools=tools)
            if spelled == turns or not any(str(call) in text for turn in turns for call in _arguments(turn)):
                return text
        except Exception as error:  # a template raises anything that Python code can
            with contextlib.suppress(Exception):
                if spelled != turns:
                    return render(self.tokenizer, spelled, prompt=prompt, tools=tools)
            raise _refusal(error, turns) from None
        # It wrote an object as Python does: such templates, as those that add it to a text, take the arguments' JSON.
        return self.render(spelled, tools, prompt=prompt)

    def locate(self, turns: Sequence[Turn], tools: list[Any] | None, *, prompt: bool) -> Located:
        """The rendering with the record's texts found in it. Raises Misfit where one is missing or changed."""
        text = self.render(turns, tools, prompt=prompt)
        shape = None if tools else _shape_of(turns, prompt)
        if shape in self._frames:  # most often, records of one shape differ in their texts alone
            texts = [plain_text(turn, i) for i, turn in enumerate(turns) if turn["content"].strip()]
            found = locate(text, self._frames[shape].filled(texts), texts)
            if not isinstance(found, Slot):
                return Located(text, texts, found)
        self._check_fields(turns, tools)
        marks = Marks(text, blocks=1 + len(turns) // TURNS_PER_BLOCK)
        marked_tools = marks.tools(tools) if tools else tools
        marked_turns = [marks.turn(turn, i) for i, turn in enumerate(turns)]
        frames = frames_of(marks.pieces(self.render(marked_turns, marked_tools, prompt=prompt)))
        spans = find_texts(text, frames, marks.texts)
        # Only now: frames in which a text of this record has no place would let other records of the shape lose theirs.
        if shape and frames.whole and len(self._frames) < MOST_SHAPES:
            self._frames[shape] = frames
        return Located(text, marks.texts, spans)

    def _check_fields(self, turns: Sequence[Turn], tools: list[Any] | None) -> None:
        """Texts are tokenised so that they forge no control token; other fields may spell none, however rendered."""
        others = [{k: v for k, v in turn.items() if k not in ("content", "reasoning_content")} for turn in turns]
        if tools or any(len(other) > 1 for other in others):
            found = self.control_pattern.search(json.dumps([others, tools], ensure_ascii=False, default=str))
            if found:
                what = f"its tools, tool calls or names spell the control token {found[0]}"
                raise Misfit("control_token_in_text", what)


def _refusal(error: Exception, turns: Sequence[Turn]) -> Misfit:
    said = (str(error).strip().splitlines() or [""])[0]
    reason = said if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {said}"
    has_system = any(turn["role"] == "system" for turn in turns)
    hint = fold_hint("if that is the system message") if has_system else ""
    return Misfit("template_refused", f"the chat template refuses the conversation ({reason}){hint}")


def _shape_of(turns: Sequence[Turn], prompt: bool) -> tuple[Any, ...] | None:
    """What plain turns look like to a template: their roles, and which are blank. None for turns with other fields."""
    if any(turn.keys() - PLAIN for turn in turns):
        return None
    return (prompt, *((turn["role"], not turn["content"].strip()) for turn in turns))


def _arguments(turn: Turn) -> list[dict[str, Any]]:
    """The arguments of the turn's calls, where they are objects and not empty."""
    found = [(call.get("function") or {}).get("arguments") for call in turn.get("tool_calls") or []]
    return [each for each in found if each and isinstance(each, dict)]


def _with_json_arguments(turn: Turn) -> Turn:
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
