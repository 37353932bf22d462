"""A record as its chat template renders it, compared with the record, and the answers found in it.

An answer is learned from where the rendering of the turns before it, with the generation prompt, ends (that is the text
which the model answers when it is used) to the end of turn behind it. Where an answer does not go on as the prompt does
(a prompt that opens `<think>`, an answer without), it is learned from where the two part, and that is counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lead_engine.pool.chat_template import PROBES
from lead_engine.pool.frames import Span, common_prefix, show
from lead_engine.pool.locating import Located, Locator, Turn
from lead_engine.pool.marks import Misfit
from lead_engine.pool.records import Message, Record


@dataclass
class Rendered:
    """`text`, where in it answers are learned and where texts of the record stand."""

    text: str
    answers: list[Span] = field(default_factory=list)
    contents: list[Span] = field(default_factory=list)
    unasked: str = ""
    """How the generation prompt goes on where an answer begins otherwise ("<think>\\n", for an answer without)."""
    other_end: str = ""
    """The control token behind an earlier answer where another one ends the last: it is not learned."""
    open_end: bool = False
    """No control token ends the answers."""


class Renderer(Locator):
    """Renders records with one tokenizer's chat template."""

    def record(self, record: Record) -> Rendered:
        """A whole record, its answers found. Raises Misfit; turns behind the last answer are not rendered."""
        last = max((i for i, m in enumerate(record.messages) if m.role == "assistant"), default=-1)
        messages = record.messages[: last + 1]
        turns = [message.as_turn() for message in messages]
        located = self.locate(turns, record.tools, prompt=False)
        ends, text_end = self._ends(turns, record.tools, located)
        rendered = Rendered(located.text[:text_end], contents=located.all_spans())
        rendered.open_end = not self.control_pattern.search(ends)
        for i, message in enumerate(messages):
            if message.role != "assistant" or not message.train:
                continue
            begin, unasked = self._begin(turns, record.tools, located, i)
            other = ""
            if i < last:
                end, other = self._end(turns, located, i, ends)
            elif text_end < len(located.text):  # a request for another answer was cut off
                end = located.extent(last)[1] + len(ends)
            else:
                end = len(rendered.text.rstrip())
            rendered.answers.append((begin, max(end, begin)))
            rendered.unasked = rendered.unasked or unasked
            rendered.other_end = rendered.other_end or other
        return rendered

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> Rendered:
        """What the model is asked with after these turns. Raises Misfit."""
        located = self.locate([message.as_turn() for message in messages], tools, prompt=True)
        return Rendered(located.text, contents=located.all_spans())

    # --- where an answer begins ---

    def _begin(self, turns: Sequence[Turn], tools: list[Any] | None, located: Located, i: int) -> tuple[int, str]:
        """Where answer i begins to be learned, and how the generation prompt goes on if not so."""
        text = located.text
        prompt = self.render(turns[:i], tools, prompt=True)
        common = common_prefix(text, prompt)
        rest = prompt[common:]
        first_text = located.extent(i)[0]
        if common >= located.end_before(i):  # the two part behind what was asked: only the request itself may differ
            if not rest.strip():
                return common, ""
            begin = min(common, first_text)
            if not text[begin:first_text].strip():
                return begin, prompt[begin:]
        raise Misfit(
            "answer_not_found",
            "the chat template's rendering of the turns before an answer, with the generation prompt, is not a prefix "
            f"of its rendering of the whole conversation: the one goes on with {show(rest)}, the other with "
            f"{show(text[common:])} (turn {i + 1})",
        )

    # --- where it ends ---

    def _ends(self, turns: Sequence[Turn], tools: list[Any] | None, located: Located) -> tuple[str, int]:
        """What ends every answer, and where the text ends: what asks for another answer behind the last is cut off."""
        text, eos = located.text, self.tokenizer.eos_token
        begin, end = located.extent(len(turns) - 1)
        tail = text[end:]
        first = self._end_of_calls(tail) if turns[-1].get("tool_calls") else self.control_pattern.search(tail)
        ends = tail[: first.end()] if first else tail.rstrip()
        behind = tail[len(ends) :]
        extra = (behind.replace(eos, "") if eos else behind).strip()
        if not ends.strip() or (first and not extra):
            return ends, len(text)
        # More words stand behind the answer. They may be how the template asks for the next one: then they also end
        # the rendering of the turns before the answer.
        asked = self.render(turns[:-1], tools, prompt=False).rstrip()
        if first:
            if asked.endswith(behind.strip()) and (first[0] == eos or first[0] not in self._opening):
                return ends, end + len(ends) + len(behind) - len(behind.lstrip())
            raise Misfit("text_behind_answer", f"behind the answer and its end of turn stands {show(behind)}")
        asks_again = text.startswith(asked) and not text[len(asked) : begin].strip() and asked[-1:] == ends[-1:]
        if asks_again and self._always_asks():
            raise Misfit("text_behind_answer", f"behind the answer stands {show(tail)}, which asks for another")
        return ends, len(text)

    def _end_of_calls(self, tail: str) -> re.Match[str] | None:
        """What ends a turn behind its calls, which control tokens may close: what ends any turn, or else the last."""
        found = list(self.control_pattern.finditer(tail))
        for end in (self._end_of_turn, self.tokenizer.eos_token):
            for match in found:
                if match[0] == end:
                    return match
        return found[-1] if found else None

    def _end(self, turns: Sequence[Turn], located: Located, i: int, ends: str) -> tuple[int, str]:
        """Where an earlier answer i ends, given what ends the last one, and its own control token if it is another."""
        calls, last_calls = bool(turns[i].get("tool_calls")), bool(turns[-1].get("tool_calls"))
        end, other = self._find_end(located.text, located.extent(i)[1], i, ends, calls=calls, last_calls=last_calls)
        next_text = located.begin_after(i)
        if next_text is not None and end > next_text:  # a tool's result would be learned
            what = f"behind turn {i + 1} no end of turn stands before the next turn"
            raise Misfit("answer_not_found", f"answers end differently: {what}")
        return end, other

    def _find_end(self, text: str, begin: int, i: int, ends: str, *, calls: bool, last_calls: bool) -> tuple[int, str]:
        """The end behind `begin`, where the answer's last text ends.

        calls, last_calls: whether answer i and the last one call tools, of which the template writes more behind the
        last text.
        """
        if text.startswith(ends, begin):
            return begin + len(ends), ""
        control = self.control_pattern.findall(ends)[-1:]
        if control:
            place = text.find(control[0], begin)
            if place >= 0 and (calls or (last_calls and not text[begin:place].strip())):
                return place + len(control[0]), ""
            other = self.control_pattern.search(text, begin)
            if other and not text[begin : other.start()].strip():
                return begin, other[0]
        stands = f"behind turn {i + 1} stands {show(text[begin:])}, behind the last answer {ends!r}"
        raise Misfit("answer_not_found", f"answers end differently: {stands}")

    # --- what the template does in general ---

    @functools.cached_property
    def _end_of_turn(self) -> str | None:
        """The control token that ends answers without calls."""
        try:
            located = self.locate(PROBES[0], None, prompt=False)
        except Misfit:
            return None
        found = self.control_pattern.search(located.text, located.extent(1)[1])
        return found[0] if found else None

    @functools.cached_property
    def _opening(self) -> str:
        """What stands before the first turn's text. A control token in it opens turns; all may, where it is unknown."""
        try:
            located = self.locate(PROBES[0], None, prompt=False)
        except Misfit:
            return "".join(self.control)
        return located.text[: located.spans[0][0][0]].removeprefix(self.tokenizer.bos_token or "")

    def _always_asks(self) -> bool:
        """Whether an empty conversation has a text or is refused: then what a conversation ends in may be a request."""
        try:
            text = self.render([], None, prompt=False)
        except Misfit:
            return True
        return bool(text.removeprefix(self.tokenizer.bos_token or "").strip())
