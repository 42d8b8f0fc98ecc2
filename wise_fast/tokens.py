"""From edits to token ids: prompts, targets with a stop token, right-padded batches and their masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wise_fast.errors import ConfigError, EditDataError


@dataclass(frozen=True)
class Example:
    """One training row: prompt ids, and the target's ids behind them (stop token last, when there is one).

    The first `context` ids of the prompt are a text put in front of it. It is not scored: it cannot know of the edit.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    context: int = 0


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    Attributes:
        input_ids, attention_mask: [B, T].
        prompt_mask: [B, T] bool, the tokens that routing scores: the prompt, less what was put in front of it.
        positions: [M] int64 into [B*T], the tokens whose next token is a label.
        labels: [M] int64.
        row: [M] int64, each label's row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_mask: Tensor
    positions: Tensor
    labels: Tensor
    row: Tensor


def encode(tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a prompt, with the special tokens that the tokenizer puts in front of any text."""
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        ids = ids[:-1]
    return tuple(ids)


def encode_target(tokenizer, prompt: str, target: str) -> Example:
    """Ids of prompt and target, split where the prompt ends, so that training and generating see the same prompt.

    Raises:
        EditDataError: the prompt or the target tokenizes to nothing.
    """
    joint = " " if not prompt[-1:].isspace() and not target[:1].isspace() else ""
    start, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + joint + target)
    if not start:
        raise EditDataError(f"the prompt {prompt!r} tokenizes to nothing; give it some text")
    if whole[: len(start)] == start:
        tail = whole[len(start) :]
    else:  # the boundary falls inside a token
        tail = tuple(tokenizer(joint + target, add_special_tokens=False)["input_ids"])
    # The joining space may be all that is left of a target that the tokenizer drops.
    if not tail or (len(tail) == 1 and not tokenizer(target, add_special_tokens=False)["input_ids"]):
        raise EditDataError(f"the target {target!r} of prompt {prompt!r} tokenizes to nothing; give it some text")
    return Example(start, tail)


def stop_token(tokenizer, kind: str) -> int | None:
    """Id that ends an answer: "eos", "newline", "none", or "auto" (EOS when there is one, else newline)."""
    if kind == "none":
        return None
    eos = tokenizer.eos_token_id
    if kind in ("auto", "eos") and eos is not None:
        return eos
    if kind == "eos":
        raise ConfigError("stop is 'eos' but the tokenizer has no EOS token; use 'newline' or 'none'")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(newline) != 1 and kind == "newline":
        raise ConfigError(f"stop is 'newline' but a newline is {len(newline)} tokens here; use 'eos' or 'none'")
    return newline[0] if len(newline) == 1 else None


def pad_token(tokenizer) -> int:
    """Id to pad with. Masks hide it, so any id serves when the tokenizer has none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def collate(rows: Sequence[Example], pad: int, device: torch.device | str) -> Batch:
    """Rows to one right-padded batch. The last label needs no input position, so it is left out of the input."""
    lengths = [len(r.prompt) + max(len(r.target) - 1, 0) for r in rows]
    size = (len(rows), max(lengths))
    ids, seen, prompt = torch.full(size, pad), torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
    positions, labels, row = [], [], []
    for i, (example, length) in enumerate(zip(rows, lengths, strict=True)):
        n = len(example.prompt)
        ids[i, :length] = torch.tensor((*example.prompt, *example.target[:-1]))
        seen[i, :length] = 1
        prompt[i, example.context : n] = True
        positions += [i * size[1] + n - 1 + t for t in range(len(example.target))]
        labels += example.target
        row += [i] * len(example.target)
    lists = (torch.tensor(t, dtype=torch.long) for t in (positions, labels, row))
    return Batch(*(t.to(device) for t in (ids, seen, prompt, *lists)))


def to_left(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Move each row's padding from the right to the left, where `generate` wants it. Both [B, T]."""
    length = values.shape[1]
    shift = length - attention_mask.sum(1, keepdim=True)
    place = (torch.arange(length, device=values.device)[None] - shift) % length
    return values.gather(1, place)
