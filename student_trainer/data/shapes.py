"""What the rows of public datasets look like, and the conversation in each: alpaca, ShareGPT, chat messages, prompts.

A row is a dict from anywhere; what it may not be ends in a UserError that names its place. Other keys are ignored.
Adding a shape: a function here, its name in SHAPES and in data.format, and its keys in `shape_of`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protos.scores import Message
from student_trainer.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Names that speakers have in ShareGPT's `from`, and whose turn it is."""
PROMPTS = ("prompt", "question", "problem", "query", "text")
ANSWERS = ("expected_answer", "answer", "response", "solution", "completion", "output")
SYSTEMS = ("system", "system_prompt")
SHAPE = "a row has instruction, input and output, or messages, conversations or a prompt (data.format, docs/data.md)"
PROMPT_KEYS = ("messages", "instruction", "input", "conversations", "conversation", *PROMPTS)
KEYS = (*PROMPT_KEYS, "output", *SYSTEMS, *ANSWERS)
"""Every key that some shape reads."""


@dataclass(frozen=True)
class Conversation:
    """A row's prompt, and what is expected after it; nobody speaks in an empty one."""

    messages: tuple[Message, ...]
    expected: str | None = None

    @property
    def blank(self) -> bool:
        """Whether there is nothing to answer."""
        return not any(m.content.strip() for m in self.messages if m.role != "system")


@dataclass(frozen=True)
class Format:
    """How rows are read: a name of SHAPES or auto, and keys of one's own for prompts."""

    name: str = "auto"
    prompt: str | None = None
    answer: str | None = None

    def columns(self, names: Sequence[str], others: Collection[str]) -> list[str]:
        """Those of a table's columns that may be read, with `others`; all of them where none has a prompt."""
        own = {key for key in (self.prompt, self.answer) if key}
        if not own.union(PROMPT_KEYS).intersection(names):
            return list(names)
        return [name for name in names if name in own or name in KEYS or name in others]


def conversation(where: str, row: Any, form: Format) -> Conversation:
    """The conversation of a row; UserError at `where` for one that has none."""
    if not isinstance(row, dict):
        raise UserError(f"{type(row).__name__}, not an object", where, SHAPE)
    return SHAPES[shape_of(where, row, form)](where, row, form)


def shape_of(where: str, row: Mapping[str, Any], form: Format) -> str:
    """The name of the row's shape."""
    if form.name != "auto":
        return form.name
    if form.prompt:
        return "prompts"
    if row.get("messages") is not None:
        return "messages"
    if row.get("instruction") is not None or row.get("input") is not None:
        return "alpaca"
    if _first(row, ("conversations", "conversation")):
        return "sharegpt"
    if _first(row, PROMPTS):
        return "prompts"
    what = f"no instruction, messages, conversations or prompt among its keys {sorted(map(str, row))}"
    raise UserError(what, where, "name the right key in data.prompt_column, or see docs/data.md for the shapes of rows")


def alpaca(where: str, row: Mapping[str, Any], form: Format) -> Conversation:
    """`instruction` and `input` as one turn of the user; `output` is expected."""
    if row.get("instruction") is None and row.get("input") is None:
        raise _lacks(where, row, "alpaca", ("instruction", "input"))
    instruction, extra, expected = (text(where, row, key) for key in ("instruction", "input", "output"))
    content = "\n".join(part for part in (instruction, extra) if part)
    return Conversation((Message("user", content),), expected)


def chat(where: str, row: Mapping[str, Any], form: Format) -> Conversation:
    """`messages` of role and content; all before the last turn is the prompt where that is the assistant's."""
    if row.get("messages") is None:
        raise _lacks(where, row, "messages", ("messages",))
    turns = _turns(where, "messages", row["messages"])
    expected = turns.pop().content if turns[-1].role == "assistant" else None
    if not turns:
        raise UserError("messages has an answer and no question", where, "put a user turn before it")
    return Conversation(tuple(turns), expected)


def sharegpt(where: str, row: Mapping[str, Any], form: Format) -> Conversation:
    """`conversations` of from and value (or role and content), with `system` beside it; without any question, as they
    are found in scraped data, the row is blank.
    """
    key = _first(row, ("conversations", "conversation"))
    if key is None:
        raise _lacks(where, row, "sharegpt", ("conversations",))
    if row[key] == []:
        return Conversation(())
    if not isinstance(row[key], list):
        raise UserError(f"{key} is {kind(row[key])}, not a list of turns", where, "give from and value of each turn")
    turns = [_speech(where, key, number, turn) for number, turn in enumerate(row[key], start=1)]
    expected = turns.pop().content if turns[-1].role == "assistant" else None
    return Conversation((*_system(where, row, turns), *turns), expected)


def prompts(where: str, row: Mapping[str, Any], form: Format) -> Conversation:
    """A prompt as text or as messages, with an expected answer (text, a number or an assistant's turn) where there is
    one.
    """
    key = form.prompt or _first(row, PROMPTS)
    if key is None or row.get(key) is None:
        raise _lacks(where, row, "prompts", (form.prompt,) if form.prompt else PROMPTS)
    answer_key = form.answer or _first(row, tuple(a for a in ANSWERS if a != key))
    expected = None if answer_key is None else _answer(where, answer_key, row.get(answer_key))
    if isinstance(row[key], list):
        turns = _turns(where, key, row[key])
        if turns[-1].role == "assistant":
            raise UserError(f"{key} ends with the assistant's turn", where, "put the answer beside it, or use messages")
    else:
        turns = [Message("user", text(where, row, key) or "")]
    return Conversation((*_system(where, row, turns), *turns), expected)


SHAPES = {"alpaca": alpaca, "sharegpt": sharegpt, "messages": chat, "prompts": prompts}


def text(where: str, row: Mapping[str, Any], key: str) -> str | None:
    """A key's text, None where it is null or not there."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} is {kind(value)}, not text", where, "write it between quotes")
    return value


def kind(value: Any) -> str:
    """What to call a JSON value."""
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "empty" if value == [] else names.get(type(value), type(value).__name__)


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if row.get(key) is not None), None)


def _lacks(where: str, row: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> UserError:
    what = f"a row of format {name} has {' or '.join(keys)}, this one has the keys {sorted(map(str, row))}"
    return UserError(what, where, "set data.format, or for prompts data.prompt_column")


def _system(where: str, row: Mapping[str, Any], turns: list[Message]) -> tuple[Message, ...]:
    key = _first(row, SYSTEMS)
    content = text(where, row, key) if key else None
    own = content and content.strip() and not (turns and turns[0].role == "system")
    return (Message("system", content),) if content and own else ()


def _turns(where: str, key: str, turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{key} is {kind(turns)}, not a list of turns", where, "give role and content of each turn")
    found = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            what = f"turn {number} of {key} has no text content with a role of {', '.join(ROLES)}"
            raise UserError(what, where, 'write each turn as {"role": ..., "content": ...}')
        found.append(Message(turn["role"], turn["content"]))
    return found


def _speech(where: str, key: str, number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"turn {number} of {key} is {kind(turn)}, not an object", where, "give from and value")
    speaker, content = (turn.get(a) if turn.get(a) is not None else turn.get(b) for a, b in (_FROM, _VALUE))
    if not isinstance(content, str) or speaker not in SHAREGPT_ROLES:
        what = f"turn {number} of {key} has no text value with a from of {', '.join(SHAREGPT_ROLES)}"
        raise UserError(what, where, 'write each turn as {"from": ..., "value": ...}')
    return Message(SHAREGPT_ROLES[speaker], content)


_FROM, _VALUE = ("from", "role"), ("value", "content")


def _answer(where: str, key: str, value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        turns = _turns(where, key, value)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise UserError(f"{key} has {len(turns)} turns, not one of the assistant", where, "give its one answer")
        return turns[0].content
    return text(where, {key: value}, key)
