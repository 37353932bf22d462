"""The record as the rest of the engine sees it: messages, with what the chat template gets and what is learned."""

from __future__ import annotations

from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    train: bool = True
    """Whether an assistant's turn is learned. Other turns never are."""
    extra: dict[str, Any] | None = None
    """Further fields that the chat template gets: tool_calls, tool_call_id, name, reasoning_content."""

    def as_turn(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


class Record(NamedTuple):
    """One usable sample; `dataset` is "" where the record names none, `line` is the line where it starts (JSON Lines,
    CSV, TSV) or the record's number (else).
    """

    id: str
    dataset: str
    messages: tuple[Message, ...]
    file: str
    line: int
    tools: list[Any] | None = None
    """The tools that the chat template is given, as JSON schemas."""
