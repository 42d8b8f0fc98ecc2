"""Prompts as chat messages, lists of {"role", "content"}, checked and kept as values; see `wise_fast.chat`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wise_fast.errors import EditDataError
from wise_fast.formats import check_text, shown


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


Messages = tuple[Message, ...]


def check_prompt(value: object, field: str) -> str | Messages:
    """A prompt: text as it is, messages as a tuple of Message; else EditDataError naming `field`."""
    return check_messages(value, field) if isinstance(value, (list, tuple)) else check_text(value, field)


def check_messages(value: object, field: str) -> Messages:
    """Messages of which the last is the user's, so that the model's answer comes next; else EditDataError."""
    if not isinstance(value, (list, tuple)) or not value:
        raise EditDataError(f"field '{field}': expected messages, got {shown(value)}; give a list of them")
    made = tuple(_message(message, f"{field}[{i}]") for i, message in enumerate(value))
    if made[-1].role != "user":
        raise EditDataError(
            f"field '{field}': the last message is the {made[-1].role}'s, expected the user's, which is then answered "
            "by the target; end with it"
        )
    return made


def to_json(prompt: str | Messages) -> str | list[dict[str, str]]:
    """A checked prompt as JSON has it."""
    return prompt if isinstance(prompt, str) else [message.to_dict() for message in prompt]


def _message(value: object, field: str) -> Message:
    if isinstance(value, Message):
        value = value.to_dict()
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        raise EditDataError(
            f"field '{field}': expected an object with 'role' and 'content', got {shown(value)}; tools, images and "
            "the like cannot be taught"
        )
    return Message(*(check_text(value[key], f"{field}.{key}") for key in ("role", "content")))
