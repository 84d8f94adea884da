# SPDX-License-Identifier: Apache-2.0
"""The forms a line of training data may have, and the record each becomes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_ROLES = ("system", "user", "assistant", "tool")
# Who speaks in "conversations", by the names that NeMo's and ShareGPT's files have for them.
_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# NeMo's "type" of a chat whose turns may have labels: ahead of their text, or behind it.
_LABELLED = ("VALUE_TO_TEXT", "TEXT_TO_VALUE")


@dataclass(frozen=True)
class Record:
    """One conversation: (role, text) pairs, of which an assistant turn follows another one.

    Attributes:
        turns: The pairs.
        is_pair: A bare prompt and completion, which may be joined without a chat template.
        file: Where it was read.
        line: There, from 1; in a file that is one array of records, the record's number.
        learned: The roles whose turns are learned.
        unit: "line" or "record": what `line` counts.
    """

    turns: tuple[tuple[str, str], ...]
    is_pair: bool
    file: str
    line: int
    learned: tuple[str, ...] = ("assistant",)
    unit: str = "line"

    @classmethod
    def pair(cls, prompt: str, completion: str, file: str, line: int) -> Record:
        """A record of one question and its answer."""
        return cls((("user", prompt), ("assistant", completion)), True, file, line)

    @property
    def place(self) -> str:
        """Where it was read, in words."""
        return f"{self.file} {self.unit} {self.line:,}"

    @property
    def prompt(self) -> str:
        """Everything before the first answer, joined by newlines."""
        roles = [role for role, _ in self.turns]
        return "\n".join(text for _, text in self.turns[: roles.index("assistant")])

    @property
    def answer(self) -> str:
        """All assistant turns, joined by newlines."""
        return "\n".join(text for role, text in self.turns if role == "assistant")


class BadRecord(Exception):
    """A record that cannot be used: where in the line, and why."""

    def __init__(self, column: int, reason: str) -> None:
        super().__init__(reason)
        self.column = column


@dataclass(frozen=True)
class _Line:
    """One object of a file, with what its errors and its record name."""

    value: dict[str, Any]
    text: str
    file: str
    number: int

    def column(self, name: str) -> int:
        """Where the field stands in the line; its start when the field is missing."""
        return self.text.find(f'"{name}"') + 1 or 1

    def string(self, value: dict[str, Any], name: str, where: str) -> str:
        """The text of a field, here or in a part of the object."""
        column = self.column(name)
        if name not in value:
            raise BadRecord(column, f"field '{where}' is missing.")
        content = value[name]
        if not isinstance(content, str):
            raise BadRecord(column, f"field '{where}' must be text, this is {_kind(content)}.")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord(column, f"field '{where}' holds half of a surrogate pair.") from None
        return content

    def optional(self, name: str) -> str:
        """The text of a field that may be missing or null."""
        return self.string(self.value, name, name) if self.value.get(name) is not None else ""

    def objects(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The turns in a field, each with its name."""
        turns, column = self.value.get(name), self.column(name)
        if turns == []:
            raise BadRecord(column, f"field '{name}' is an empty list, it must hold the turns.")
        if not isinstance(turns, list):
            raise BadRecord(
                column, f"field '{name}' must be a list of turns, this is {_kind(turns)}."
            )
        for index, turn in enumerate(turns):
            where = f"{name}[{index}]"
            if not isinstance(turn, dict):
                raise BadRecord(
                    column, f"field '{where}' must be an object, this is {_kind(turn)}."
                )
            yield where, turn

    def has_answer(self, record: Record, name: str) -> Record:
        """The record, if a turn that is learned has text; `name` is the field that holds them."""
        for index, (role, text) in enumerate(record.turns):
            # Nothing comes before the first turn that could be asked.
            if role in record.learned and (index > 0 or role != "assistant") and text.strip():
                return record
        raise BadRecord(
            self.column(name), f"field '{name}' has no answer text, so nothing to learn."
        )

    def talk(self, name: str, turns: list[tuple[str, str]], learned: tuple[str, ...]) -> Record:
        """The record of the turns in a field."""
        if "assistant" not in [role for role, _ in turns][1:]:
            raise BadRecord(
                self.column(name),
                f"field '{name}' has no assistant turn after another turn, so nothing to learn.",
            )
        record = Record(tuple(turns), False, self.file, self.number, learned)
        return self.has_answer(record, name)


def _pair(prompt: str, completion: str) -> Callable[[_Line], Record]:
    def read(line: _Line) -> Record:
        question, answer = (line.string(line.value, name, name) for name in (prompt, completion))
        record = Record.pair(question, answer, line.file, line.number)
        return line.has_answer(record, completion)

    return read


def _messages(line: _Line) -> Record:
    turns = []
    for where, message in line.objects("messages"):
        role = message.get("role")
        if role not in _ROLES:
            raise BadRecord(
                line.column("messages"),
                f"field '{where}.role' is {role!r}; it must be one of {', '.join(_ROLES)}.",
            )
        turns.append((role, line.string(message, "content", f"{where}.content")))
    return line.talk("messages", turns, ("assistant",))


def _alpaca(line: _Line) -> Record:
    """Instruction, a text it is about (often none), answer."""
    instruction, answer = (line.string(line.value, x, x) for x in ("instruction", "output"))
    question = "\n\n".join(text for text in (instruction, line.optional("input")) if text)
    turns = (("user", question), ("assistant", answer))
    return line.has_answer(Record(turns, False, line.file, line.number), "output")


def _conversations(line: _Line) -> Record:
    """NeMo's chats, and ShareGPT's, which have turns alone."""
    kind = line.value.get("type")
    if kind not in (None, *_LABELLED):
        raise BadRecord(
            line.column("type"),
            f"field 'type' is {kind!r}; it must be null or one of {', '.join(_LABELLED)}.",
        )
    turns = [("system", system)] if (system := line.optional("system")) else []
    for where, turn in line.objects("conversations"):
        role = _speaker(turn.get("from"), line.column("conversations"), f"{where}.from")
        turns.append((role, line.string(turn, "value", f"{where}.value")))
        # NeMo puts a label's text beside the turn's; where it is null a turn is as without a type.
        if kind is not None and (label := turn.get("label")) is not None:
            raise BadRecord(
                line.column("conversations"),
                f"field '{where}.label' is {label!r} under type {kind!r}; turns with a label are not read.",
            )
    if line.value.get("mask") is None:
        return line.talk("conversations", turns, ("assistant",))
    return line.talk("conversations", turns, _unmasked(line, {role for role, _ in turns}))


def _unmasked(line: _Line, roles: set[str]) -> tuple[str, ...]:
    """The roles, other than the system's, whose turns NeMo's mask leaves to be learned."""
    mask, column = line.value["mask"], line.column("mask")
    names = mask if isinstance(mask, list) else [mask]
    masked = {_speaker(name, column, "mask") for name in names}
    learned = tuple(role for role in _ROLES[1:] if role in roles - masked)
    if not learned:
        raise BadRecord(column, f"field 'mask' is {mask!r}, which leaves no turn to learn.")
    return learned


def _speaker(name: object, column: int, where: str) -> str:
    role = _SPEAKERS.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_SPEAKERS)
        raise BadRecord(column, f"field '{where}' is {name!r}; it must be one of {known}.")
    return role


_ARRAY = "a file that is one array of records is read where its name ends in .json"

# name: (fields that make it whole, reader)
_FORMS: dict[str, tuple[tuple[str, ...], Callable[[_Line], Record]]] = {
    "prompt/completion": (("prompt", "completion"), _pair("prompt", "completion")),
    "instruction/output": (("instruction", "output"), _alpaca),
    "input/output": (("input", "output"), _pair("input", "output")),
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _conversations),
}
# Fields of which one is enough to take a record for a form, in this order.
_MARKS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction",),
    "input/output": ("input", "output"),
}


def parse(raw: bytes, form: str | None, file: str, number: int) -> tuple[str, Record]:
    """Form and record of one line.

    Args:
        raw: The line.
        form: That of the lines before; None to find it.
        file: For the record.
        number: For the record.

    Raises:
        BadRecord: It cannot be used.
    """
    text, value = _load(raw)
    whole = [
        name
        for name, (fields, _) in _FORMS.items()
        if all(value.get(f) is not None for f in fields)
    ]
    if "instruction/output" in whole and "input/output" in whole:
        whole.remove("input/output")  # "input" is a field of Alpaca's own
    if len(whole) > 1:
        raise BadRecord(1, f"the record holds {' and '.join(whole)}; one form is read.")
    if form is not None and form not in whole:
        other = whole[0] if whole else _form(value, form)
        if other != form:
            raise BadRecord(
                1,
                f"the file's first record has the form {form}, this one looks like {other}; "
                "a file has one form, and several files are read with --data '[a.jsonl, b.jsonl]'.",
            )
    form = form or _form(value)
    return form, _FORMS[form][1](_Line(value, text, file, number))


def _load(raw: bytes) -> tuple[str, dict[str, Any]]:
    """A line as text, and the object it holds."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        raise BadRecord(column, f"byte 0x{raw[error.start]:02x} is not UTF-8.") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        array = f" ({_ARRAY})" if text.lstrip().startswith("[") else ""
        raise BadRecord(
            error.pos + 1, f"invalid JSON ({error.msg}): ...{near!r}...{array}"
        ) from None
    except ValueError:  # Python reads an integer of at most so many digits
        limit = sys.get_int_max_str_digits()
        found = re.search(rf"\d{{{limit + 1},}}", text)
        column = found.start() + 1 if found else 1
        raise BadRecord(column, f"an integer has more than {limit:,} digits.") from None
    except RecursionError:
        raise BadRecord(1, "JSON is nested too deeply.") from None
    if not isinstance(value, dict):
        array = f"; {_ARRAY}" if isinstance(value, list) else ""
        raise BadRecord(1, f"a record must be a JSON object, this is {_kind(value)}{array}.")
    return text, value


def _form(value: dict[str, Any], expected: str | None = None) -> str:
    """The form that the fields show, `expected` where they show it too or show none."""
    marked = [form for form, names in _MARKS.items() if any(name in value for name in names)]
    if expected in marked or (expected and not marked):
        return expected
    if marked:
        return marked[0]
    raise BadRecord(
        1,
        f"fields {sorted(value)} are none of prompt/completion, input/output, instruction/output, "
        "messages or conversations.",
    )


def _kind(value: object) -> str:
    kinds = {
        bool: "true or false",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return kinds.get(type(value), "a number")
