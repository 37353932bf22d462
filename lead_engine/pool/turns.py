"""One turn of a conversation, in the spellings that public data has, as a `Message`. docs/POOLS.md lists them."""

from __future__ import annotations

from typing import Any

from lead_engine.pool.fields import Bad, empty, identifier, json_object, objects, only, present, text, type_name
from lead_engine.pool.message import Message

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bard", "bing"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
}
"""Each role that a `Message` has, and the names that it goes by, in any case."""
_ROLE = {name: role for role, names in ROLES.items() for name in names}
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT turns whose content is the call itself, as JSON text: an assistant's turn with tool calls."""
ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value", "text")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
LEARNED_FIELDS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
MASKED = "masked"
"""The opposite of the fields before it."""
CALL_FIELDS = ("tool_calls", "function_call")
NAME_FIELDS = ("name", "tool_call_id")
KNOWN_FIELDS = frozenset(
    (*ROLE_FIELDS, *CONTENT_FIELDS, *REASONING_FIELDS, *LEARNED_FIELDS, MASKED, *CALL_FIELDS, *NAME_FIELDS)
)
_SWITCH = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def read_turn(value: Any, where: str, unread: list[str], *, learned: bool = True) -> Message:
    """One turn. `learned` is whether an answer is that does not say so itself.

    `where` names the turn in errors. Adds to `unread` the names of fields that are not known. Raises Bad.
    """
    fields = present(value) if isinstance(value, dict) else {}
    role_field, content_field = only(fields, ROLE_FIELDS, where), only(fields, CONTENT_FIELDS, where)
    calls = only(fields, CALL_FIELDS, where)
    if role_field is None or (content_field is None and calls is None):
        raise Bad("wrong_type", f"{where} must be an object with 'role' and 'content'")
    role = _role(role_field[1], where)
    refuse_media(fields, f" of {where}")
    content_name, content = content_field or ("content", "")
    if role in CALLS:  # ShareGPT: the content is the call
        role, calls, content = "assistant", ("tool_calls", content), ""
    extra = _answer_fields(fields, calls, where)
    if extra and role != "assistant":
        raise Bad("unsupported_field", f"{where} has {', '.join(extra)} and the role {role!r}; only an assistant's can")
    for key in NAME_FIELDS:
        if not empty(fields.get(key, "")):
            extra[key] = identifier(fields[key], f"{key} of {where}")
    unread += [key for key in fields if key not in KNOWN_FIELDS and not empty(fields[key])]
    asked = _learned(fields, where)
    if asked and role != "assistant":
        raise Bad("unsupported_field", f"{where} asks for a loss and has the role {role!r}; only answers have one")
    if role != "assistant":
        train = True  # of no effect: other turns never are learned
    else:
        train = learned if asked is None else asked
    return Message(role, content_text(content, f"{content_name} of {where}", unread), train, extra or None)


def _answer_fields(fields: dict[str, Any], calls: tuple[str, Any] | None, where: str) -> dict[str, Any]:
    """What only an assistant's turn may have: tool_calls and reasoning_content, where they are not empty."""
    found: dict[str, Any] = {}
    if calls is not None and not empty(calls[1]):
        name, value = calls
        is_single = name == "function_call" or not str(value).lstrip().startswith("[")
        found["tool_calls"] = tool_calls([value] if is_single else value, f"{name} of {where}")
    reasoning = only(fields, REASONING_FIELDS, where)
    if reasoning is not None and not empty(reasoning[1]):
        found["reasoning_content"] = text(reasoning[1], f"{reasoning[0]} of {where}")
    return found


def refuse_media(fields: dict[str, Any], of: str = "") -> None:
    """Refuse a field that holds pictures or sound."""
    for name in MEDIA:
        if name in fields and not empty(fields[name]):
            raise Bad("not_text", f"{name!r}{of} is given, and only text can be trained; remove it to train on that")


def _role(value: Any, where: str) -> str:
    name = value.strip().casefold() if isinstance(value, str) else None
    if name in CALLS:
        return name
    if name not in _ROLE:
        raise Bad("unknown_role", f"{where} has the role {value!r}; known are {', '.join([*_ROLE, *CALLS])}")
    return _ROLE[name]


def are_turns(value: Any) -> bool:
    """Whether the value is a list of objects with a role."""
    return isinstance(value, list) and all(isinstance(v, dict) and any(f in v for f in ROLE_FIELDS) for v in value)


def content_text(value: Any, field: str, unread: list[str]) -> str:
    """The content's text: itself, or its parts of the type `text`, one behind the other."""
    if not isinstance(value, list):
        return text(value, field)
    return "".join(_part_text(part, f"part {number} of {field}", unread) for number, part in enumerate(value, 1))


def _part_text(part: Any, field: str, unread: list[str]) -> str:
    if isinstance(part, str):
        return text(part, field)
    fields = present(part) if isinstance(part, dict) else {}
    if fields.get("type", "text") != "text":
        raise Bad("not_text", f"{field} is of the type {fields['type']!r}; only parts of the type 'text' can be used")
    if "text" not in fields:
        raise Bad("wrong_type", f"{field} must be text or an object with 'text', found {type_name(part)}")
    unread += [f"content.{key}" for key in fields if key not in ("type", "text") and not empty(fields[key])]
    return text(fields["text"], field)


def tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls as chat templates take them: {"type": "function", "function": {"name", "arguments"}}, arguments an object.

    OpenAI spells the arguments as JSON text; ShareGPT leaves the wrapping out.
    """
    calls = []
    for call in objects(value, field):
        wrapped = "function" in call
        function = call["function"] if wrapped else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Bad("wrong_type", f"{field!r} has a call without the name of a function")
        if isinstance(function.get("arguments"), str) and not function["arguments"].strip():
            function = {**function, "arguments": {}}
        if function.get("arguments") is not None:
            function = {**function, "arguments": json_object(function["arguments"], f"arguments in {field}")}
        calls.append({"type": "function", **(call if wrapped else {}), "function": function})
    return calls


def _learned(fields: dict[str, Any], where: str) -> bool | None:
    """Whether the turn says that it is learned; None if it says nothing."""
    said = {name: switch(fields[name], f"{name!r} of {where}") for name in LEARNED_FIELDS if name in fields}
    if MASKED in fields:
        said[MASKED] = not switch(fields[MASKED], f"{MASKED!r} of {where}")
    if len(set(said.values())) > 1:
        raise Bad("conflicting_fields", f"{where}: {' and '.join(map(repr, said))} contradict each other; keep one")
    return next(iter(said.values()), None)


def switch(value: Any, field: str) -> bool:
    """1 and true, 0 and false; CSV has them as text. A weight between, or another, cannot be honoured."""
    known = _SWITCH.get(str(value).strip().casefold()) if isinstance(value, (str, int, float)) else None
    if known is None:
        raise Bad("bad_weight", f"{field} is {value!r}; only 0 or false (no loss) and 1 or true (loss) can be honoured")
    return known
