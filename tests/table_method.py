"""A method without a router or a network: two tables of next-token probabilities, for figures worked out by hand."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.tiny import VOCABULARY, tiny_tokenizer


class TableModel(nn.Module):
    """A causal LM that looks at the current token only: its head's weight is the table of log-probabilities."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.write(table)

    @torch.no_grad()
    def write(self, table: Tensor) -> None:
        self.head.weight.copy_(table.log().T)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.head(nn.functional.one_hot(input_ids, VOCABULARY).float()))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, eos_token_id, pad_token_id):
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            best = self(input_ids[:, -1:]).logits[:, 0].argmax(-1)
            best[ended] = pad_token_id
            ended |= torch.isin(best, torch.tensor(eos_token_id))
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids


class TableMethod:
    """The method protocol over two tables; `asked_before` counts how often the unedited one was wanted."""

    def __init__(self, after: dict, before: dict | None = None, tokenizer=None):
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.device, self.stop, self.edits, self.asked_before = torch.device("cpu"), None, [], 0
        self._after, self._before = self.table(after), self.table(before or {})
        self.model = TableModel(self._after).eval()

    def table(self, given: dict[str, float]) -> Tensor:
        """Rows of probabilities from {"ab": p}: b comes after a with p; what is left over is spread evenly.

        "^" stands for the BOS token as the first of a pair, "$" for EOS as the second.
        """
        # What is given for one token sums to less than 1: no chance is 0, as 0 times its logarithm is not a number.
        chances = torch.full((VOCABULARY, VOCABULARY), float("nan"))
        for (one, other), p in given.items():
            chances[self.id(one, "^", 256), self.id(other, "$", 257)] = p
        open_ = chances.isnan()
        rest = (1 - chances.nansum(1, keepdim=True)) / open_.sum(1, keepdim=True)
        return torch.where(open_, rest, chances)

    def id(self, letter: str, special: str, token: int) -> int:
        return token if letter == special else self.tokenizer(letter, add_special_tokens=False)["input_ids"][0]

    def edit(self, edits, progress=False):
        raise NotImplementedError

    @contextmanager
    def disabled(self):
        self.asked_before += 1
        self.model.write(self._before)
        yield
        self.model.write(self._after)

    def asking(self, prompt_mask):
        return nullcontext()

    @contextmanager
    def head_at(self, positions):
        handle = self.model.head.register_forward_pre_hook(lambda _m, args: args[0].flatten(0, 1)[positions][None])
        yield
        handle.remove()
