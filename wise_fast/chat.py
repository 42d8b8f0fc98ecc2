"""Edits given as chat messages, as text: what the tokenizer's chat template makes of them is what is routed and taught.

A server renders the messages it gets with the same template, so an edit is in scope there just as it was when taught.
The text that was routed is what reports and saved directories hold, with the messages beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from wise_fast import tokens
from wise_fast.data import Edit
from wise_fast.errors import EditDataError
from wise_fast.messages import Messages, to_json


def rendered(tokenizer, edits: Iterable[Edit]) -> list[Edit]:
    """The edits with text for every prompt; those that are text already are given back as they are.

    Raises:
        EditDataError: the tokenizer's chat template cannot render the messages, or the tokenizer reads the text
            otherwise than the template meant it.
    """
    return [_rendered(tokenizer, edit) for edit in edits]


def _rendered(tokenizer, edit: Edit) -> Edit:
    changes = {}
    if not isinstance(edit.prompt, str):
        changes = {"prompt": render(tokenizer, edit.prompt), "messages": edit.prompt}
    if not all(isinstance(text, str) for text in edit.rephrases):
        changes["rephrases"] = tuple(_text(tokenizer, prompt) for prompt in edit.rephrases)
    if not all(isinstance(place.prompt, str) for place in edit.locality):
        changes["locality"] = tuple(replace(p, prompt=_text(tokenizer, p.prompt)) for p in edit.locality)
    return replace(edit, **changes) if changes else edit


def _text(tokenizer, prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else render(tokenizer, prompt)


def render(tokenizer, messages: Messages) -> str:
    """The messages as the template writes them, up to where the assistant answers.

    A BOS token in front is left out where the tokenizer puts it there itself. EditDataError as `rendered` raises it.
    """
    chat, name = to_json(messages), type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise EditDataError(
            f"the prompt is chat messages, but the {name} has no chat template; set tokenizer.chat_template, or give "
            "the prompt as text"
        )
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program: jinja2's errors, or whatever it runs into
        raise EditDataError(f"the chat template cannot render {chat}: {error}; correct the messages") from error
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokens.encode(tokenizer, text) != tuple(ids):
        text = text[len(bos) :]
    if tokens.encode(tokenizer, text) != tuple(ids):
        raise EditDataError(
            f"the {name} reads {text[:60]!r} otherwise than its chat template meant it, so that an edit of it would "
            "not be found when chatting; let the template begin with {{ bos_token }} if the tokenizer adds one"
        )
    return text


def reworded(edit: Edit, change: Callable[[str], list[str]]) -> list[str]:
    """What `change` makes of an edit's prompt; of a chat's, it is given the last message alone, not the template."""
    if not edit.messages:
        return change(edit.prompt)
    said = edit.messages[-1].content.strip()  # templates trim
    head, found, tail = edit.prompt.rpartition(said)
    return [head + text + tail if found else edit.prompt for text in change(said)]
