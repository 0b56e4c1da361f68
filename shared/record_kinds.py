"""What a column of a record may hold, a kind a function: the value as tasks get it, or a `Fault`.

text      str, not empty
label     str, one of the declared ones
labels    tuple of str, declared ones, each once
words     tuple of str, at least one
tags      tuple of str, declared ones, as often as they stand there
answers   {"text": tuple of str, "answer_start": tuple of int}, as many of the one as of the other; both may be empty
image     shared.media.Image: .open() gives a PIL image, RGB
audio     shared.media.Clip: .samples(rate) gives float32 (T,), one channel
messages  tuple of {"role": str, "content": str}, at least one

Lists may be written as JSON where the file has only text (csv).
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shared import media
from shared.errors import Fault

ROLES = ("system", "user", "assistant", "tool")


class Declared(Protocol):
    """What is declared of the values."""

    @property
    def folder(self) -> Path:
        """Where the files that records name lie."""

    def label(self, value: str) -> str:
        """Return the declared label that a file's label stands for, or raise `Fault`."""


def described(value: Any) -> str:
    """Name what a value is, without the value: what an error says of one that should be another."""
    if value is None:
        return "null"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    kinds = {bool: "true or false", str: "text", bytes: "bytes", int: "a whole number", float: "a number"}
    found = next((said for kind, said in kinds.items() if isinstance(value, kind)), None)
    return found or ("a table" if isinstance(value, Mapping) else "a list")


def name(value: Any) -> str:
    """Return an id, or a person's name: text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Fault(f"holds {described(value)}, and neither text nor a whole number")
    return _no_surrogate(str(value)) if str(value).strip() else _empty()


def _text(value: Any, declared: Declared | None = None) -> str:  # noqa: ARG001 - as the others
    if not isinstance(value, str):
        raise Fault(f"holds {described(value)}, and no text")
    return _no_surrogate(value) if value.strip() else _empty()


def _empty() -> str:
    raise Fault("is empty")


def _no_surrogate(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault("holds half of a surrogate pair, which is no text") from None
    return text


def _label(value: Any, declared: Declared) -> str:
    if isinstance(value, bool):
        value = "true" if value else "false"
    return declared.label(name(value))


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Fault(f"holds text, and no list of {what}") from None
    if not isinstance(value, list | tuple):
        raise Fault(f"holds {described(value)}, and no list of {what}")
    return list(value)


def _labels(value: Any, declared: Declared) -> tuple[str, ...]:
    found = tuple(_label(item, declared) for item in _list(value, "labels"))
    if len(set(found)) != len(found):
        raise Fault("names a label twice")
    return found


def _words(value: Any, declared: Declared) -> tuple[str, ...]:  # noqa: ARG001 - as the others
    found = tuple(_text(item) for item in _list(value, "words"))
    return found or _raise("is an empty list of words")


def _tags(value: Any, declared: Declared) -> tuple[str, ...]:
    return tuple(_label(item, declared) for item in _list(value, "tags"))


def _answers(value: Any, declared: Declared) -> dict[str, Any]:  # noqa: ARG001 - as the others
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= value.keys():
        raise Fault('is no table of answers, as in {"text": ["two"], "answer_start": [17]}')
    texts, starts = _list(value["text"], "texts"), _list(value["answer_start"], "places")
    if len(texts) != len(starts):
        raise Fault(f"has {len(texts)} answers and {len(starts)} places where they start")
    if any(isinstance(start, bool) or not isinstance(start, int) or start < 0 for start in starts):
        raise Fault("has an answer_start that is no place in a text")
    return {"text": tuple(_text(text) for text in texts), "answer_start": tuple(starts)}


def _image(value: Any, declared: Declared) -> media.Image:
    return media.image(value, declared.folder)


def _audio(value: Any, declared: Declared) -> media.Clip:
    return media.clip(value, declared.folder)


def _messages(value: Any, declared: Declared) -> tuple[dict[str, str], ...]:  # noqa: ARG001 - as the others
    found = []
    for number, message in enumerate(_list(value, "messages"), 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise Fault(f"holds message {number} without a role and a content")
        if message["role"] not in ROLES:
            raise Fault(f"holds message {number} of the role {message['role']!r}, which is none of {', '.join(ROLES)}")
        try:
            found.append({"role": message["role"], "content": _text(message["content"])})
        except Fault as fault:
            raise Fault(f"holds message {number}, whose content {fault}") from None
    return tuple(found) or _raise("is an empty list of messages")


def _raise(text: str) -> Any:
    raise Fault(text)


KINDS: dict[str, Callable[..., Any]] = {  # (value, declared)
    "text": _text,
    "label": _label,
    "labels": _labels,
    "words": _words,
    "tags": _tags,
    "answers": _answers,
    "image": _image,
    "audio": _audio,
    "messages": _messages,
}
