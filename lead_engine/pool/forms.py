"""The forms in which a record may hold its conversation, and the fields that change what is trained.

docs/POOLS.md is the table of all of this. What has a meaning is honoured, or refused as a problem; any other field is
counted as unread by its name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lead_engine.pool.fields import Bad, empty, listed, objects, only, text
from lead_engine.pool.message import Message
from lead_engine.pool.turns import MEDIA, REASONING_FIELDS, read_turn, refuse_media, switch

CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
)
"""Question and answer as they usually go together; any of the one may stand with any of the other."""
QUESTIONS, ANSWERS = (tuple(names) for names in zip(*PAIRS, strict=True))
MESSAGE_LISTS = ("prompt", "completion", "response")
"""Questions and answers that may be lists of messages."""
ADDITIONS = ("input", "context")
"""What the question is about; follows it after an empty line."""
SYSTEMS = ("system", "system_prompt", "system_message")
WEIGHTS = ("weight", "train")
TEMPLATE_OPTIONS = ("chat_template", "chat_template_kwargs")
_CHECKED = frozenset((*WEIGHTS, *MEDIA, *TEMPLATE_OPTIONS))


class Conversation(NamedTuple):
    """A record's messages, its tools, and the fields that were not read."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    unread: list[str]
    """Names; those of turns with the field that holds them: messages.emotion."""


class _Reading:
    """One record's fields, with those that have been read."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.used = {"id", "dataset"}
        self.unread: list[str] = []

    def one(self, names: tuple[str, ...]) -> tuple[str, Any] | None:
        """Name and value of the one field among several of one meaning that says something."""
        self.used.update(names)
        found = {n: self.fields[n] for n in names if n in self.fields and not empty(self.fields[n])}
        return only(found, names, "the record") if found else None

    def has(self, *names: str) -> list[str]:
        """Those of the names that the record has."""
        return [name for name in names if name in self.fields]

    def turns(self, name: str, *, learned: bool = True) -> list[Message]:
        """The turns in the list `name`. learned: whether answers are that do not say so themselves."""
        self.used.add(name)
        place = "" if name == "messages" else f" of {name!r}"
        unread: list[str] = []
        turns = [
            read_turn(turn, f"message {number}{place}", unread, learned=learned)
            for number, turn in enumerate(listed(self.fields[name], name), 1)
        ]
        self.unread += dict.fromkeys(f"{name}.{key}" for key in unread)
        return turns

    def rest(self) -> list[str]:
        """The fields that say something and have not been read."""
        own = [name for name, value in self.fields.items() if name not in self.used and not empty(value)]
        return own + self.unread


def read_conversation(fields: dict[str, Any]) -> Conversation:
    """The conversation of a record's present fields. Raises Bad where there is none, or where it is not clear."""
    reading = _Reading(fields)
    _refuse(reading)
    found = reading.has(*CONVERSATIONS)
    if found:
        reading.one(CONVERSATIONS)  # two that differ are refused
        messages = reading.turns(found[0])
        _history(reading, beside=found[0])
    else:
        messages = _question_and_answer(reading)
    messages = _with_system(reading, messages)
    return Conversation(messages, _tools(reading), reading.rest())


def _refuse(reading: _Reading) -> None:
    """Refuse what changes the sample and cannot be honoured."""
    if _CHECKED.isdisjoint(reading.fields):
        return
    refuse_media(reading.fields)
    for name in reading.has(*TEMPLATE_OPTIONS):
        if not empty(reading.fields[name]):
            raise Bad("unsupported_field", f"{name!r} is given, and a record cannot change the template; remove it")
    for name in reading.has(*WEIGHTS):
        reading.used.add(name)
        if not switch(reading.fields[name], repr(name)):
            raise Bad("no_trained_answer", f"{name!r} is {reading.fields[name]!r}: nothing of the record is trained")


def _question_and_answer(reading: _Reading) -> list[Message]:
    question, answer = _names(reading)
    fields = reading.fields
    reading.used |= {question, answer}
    if isinstance(fields[question], list) and question in MESSAGE_LISTS:
        before = _history(reading, beside=question) + reading.turns(question, learned=False)
    else:
        asked = text(fields[question], question)
        addition = reading.one(tuple(name for name in ADDITIONS if name != question))
        if addition is not None:
            about = text(addition[1], addition[0])
            asked = f"{asked}\n\n{about}" if asked.strip() else about
        before = [*_history(reading), Message("user", asked)]
    if isinstance(fields[answer], list) and answer in MESSAGE_LISTS:
        return before + reading.turns(answer)
    reasoning = reading.one(REASONING_FIELDS)
    extra = {"reasoning_content": text(reasoning[1], reasoning[0])} if reasoning is not None else None
    return [*before, Message("assistant", text(fields[answer], answer), extra=extra)]


def _names(reading: _Reading) -> tuple[str, str]:
    """Which field is the question, and which the answer."""
    questions, answers = reading.has(*QUESTIONS) or reading.has("input"), reading.has(*ANSWERS)
    keys = ", ".join(sorted(reading.fields)[:8]) or "nothing"
    if not questions:
        forms = ", or ".join(["messages", "conversations", *(f"{q} and {a}" for q, a in PAIRS)])
        raise Bad("not_a_record", f"needs {forms}; has {keys}")
    if not answers:
        hint = "; of a preference pair, give the chosen answer alone" if "chosen" in reading.fields else ""
        raise Bad("no_response", f"{dict(PAIRS).get(questions[0], 'output')!r} is missing; has {keys}{hint}")
    only(reading.fields, answers, "the record")  # which of two different ones should be trained?
    reading.used.update(answers)
    partners = [question for question, answer in PAIRS if answer in answers and question in questions]
    if len(questions) > 1 and len(partners) != 1:
        only(reading.fields, questions, "the record")
    question = (partners or questions)[0]
    return question, answers[0]


def _history(reading: _Reading, beside: str | None = None) -> list[Message]:
    """Earlier turns, [[question, answer], ...]; their answers are trained, as LlamaFactory trains them.

    `beside` is the list of messages that has earlier turns of its own: both cannot be.
    """
    reading.used.add("history")
    history = reading.fields.get("history", [])
    if empty(history):
        return []
    if beside is not None:
        raise Bad("conflicting_fields", f"'history' and {beside!r} both hold earlier turns; keep one")
    messages = []
    for number, pair in enumerate(listed(history, "history"), 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Bad("wrong_type", f"pair {number} of 'history' must be [question, answer]")
        asked, answered = (text(value, f"history, pair {number}") for value in pair)
        messages += [Message("user", asked), Message("assistant", answered)]
    return messages


def _with_system(reading: _Reading, messages: list[Message]) -> list[Message]:
    system = reading.one(SYSTEMS)
    if system is None:
        return messages
    content = text(system[1], system[0])
    for message in messages:
        if message.role == "system" and message.content != content:
            raise Bad("conflicting_fields", f"{system[0]!r} and a system message differ; keep one")
    if messages and messages[0].role == "system":
        return messages
    return [Message("system", content), *messages]


def _tools(reading: _Reading) -> list[dict[str, Any]] | None:
    tools = reading.one(("tools", "functions"))
    if tools is None or empty(found := objects(tools[1], tools[0])):
        return None
    if tools[0] == "functions":  # OpenAI's older form
        return [{"type": "function", "function": function} for function in found]
    return found
