"""Small models of four families that know a world's facts (`bench.world`), trained on the CPU once and cached."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from bench.world import World, make_tokenizer
from wise_fast.architectures import evaluating
from wise_fast.atomic import write_directory
from wise_fast.errors import WiseError
from wise_fast.models import cache_root, load_model
from wise_fast.tokens import Example, collate, encode_target

FAMILIES = ("gpt2", "gptj", "llama", "mistral")
_FORMAT = 1  # raise it when the same settings train another model
_CONTEXT = 128
_IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Size of a model; the same for every family."""

    width: int = 128
    d_ff: int = 1024
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        steps, batch: of AdamW, in texts; the rate rises for `warmup` steps to `lr` and falls to 0 as a cosine.
        again: rounds of a third of the steps and half the rate that follow while the model knows too little.
        lead: share of batches whose texts stand behind the beginning of another one, as edits' prefixes are.
        filler: share of texts that state no fact.
        rest: weight of the tokens of a question beside those of its answer.
        half: matrix products in bfloat16; weights stay in fp32.
        knows: least share of held-out questions that a trained model answers; 0 asks for nothing.
    """

    steps: int = 600
    again: int = 4
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    lead: float = 0.3
    filler: float = 0.1
    rest: float = 0.3
    half: bool = True
    knows: float = 0.99
    seed: int = 0


def family_config(family: str, shape: Shape, tokenizer) -> transformers.PretrainedConfig:
    """The configuration of a small model of one of `FAMILIES`."""
    ids = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    gpt = dict(n_embd=shape.width, n_inner=shape.d_ff, n_layer=shape.layers, n_head=shape.heads, n_positions=_CONTEXT)
    gpt |= dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    llama = dict(
        hidden_size=shape.width,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=_CONTEXT,
    )
    if family == "gpt2":
        return transformers.GPT2Config(**ids, **gpt)
    if family == "gptj":
        return transformers.GPTJConfig(**ids, **gpt, rotary_dim=shape.width // shape.heads // 2)
    if family == "llama":
        return transformers.LlamaConfig(**ids, **llama, num_key_value_heads=shape.heads)
    if family == "mistral":
        return transformers.MistralConfig(**ids, **llama, num_key_value_heads=shape.heads // 2, sliding_window=16)
    raise WiseError(f"family {family!r} was given; expected one of {', '.join(FAMILIES)}")


def prepared(family: str, world: World, shape: Shape, training: Training) -> tuple[nn.Module, object, Path]:
    """(model, tokenizer, their directory): of the cache, or trained now and put there.

    Raises:
        WiseError: the trained model answers fewer of its held-out questions than `training.knows`.
        StorageError: the cache cannot be written.
    """
    content = json.dumps([_FORMAT, family, world.digest(), asdict(shape), asdict(training)])
    directory = cache_root() / "worlds" / f"{family}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not (directory / "config.json").is_file():  # written whole or not at all
        tokenizer = make_tokenizer(world)
        model = train(family, world, shape, training, tokenizer)
        share = known(model, tokenizer, world.questions(held_out=True))[1]
        if share < training.knows:
            raise WiseError(
                f"{family} answers {share:.4f} of its held-out questions after its training, expected "
                f"{training.knows}; train longer (--train steps=...)"
            )
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
        write_directory(directory, files, owned=files)
    return *load_model(directory), directory


def train(family: str, world: World, shape: Shape, training: Training, tokenizer) -> nn.Module:
    """A model of `family` trained on the world's questions and answers, less those held out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        config = family_config(family, shape, tokenizer)
        # fused attention is slow in half precision, backwards and on so few tokens
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=training.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    batches = _batches(world, training, tokenizer)
    for number in range(1 + training.again):
        steps, lr = (training.steps, training.lr) if number == 0 else (training.steps // 3, training.lr / 2)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step, steps, training.warmup)
            answers = _step(model, optimizer, *next(batches), training.half)
            if step % 50 == 49:
                _log(f"{family}: round {number + 1}, step {step + 1} of {steps}, NLL of answers {answers:.4f}")
        share = known(model, tokenizer, world.questions(held_out=True))[1]
        _log(f"{family}: {share:.4f} of the held-out questions answered")
        if share >= training.knows:
            break
    return model.eval().requires_grad_(False)


def _rate(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate: up in a line, down as a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _step(model: nn.Module, optimizer, ids: Tensor, weights: Tensor, half: bool) -> float:
    """One step on a batch of `_batches`; the mean NLL of its answers' tokens."""
    pad = weights < 0
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(input_ids=ids, attention_mask=(~pad).long(), use_cache=False).logits[:, :-1]
    labels = ids.masked_fill(pad, _IGNORED)[:, 1:]
    nll = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    weight = weights[:, 1:].flatten().clamp_min(0)
    optimizer.zero_grad()
    ((nll * weight).sum() / weight.sum()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(nll.detach()[weight == 1].mean())


def _batches(world: World, training: Training, tokenizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, weights), both [batch, T]: a token's weight is 1 in an answer, `rest` elsewhere, 0 for BOS, -1 for padding.

    A lead is the first few tokens of another text, then a full stop: its tokens weigh as those of a question.
    """
    eos, stop = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(".")
    rows = [encode_target(tokenizer, *question) for question in world.questions(held_out=False)]
    facts = [(row.prompt[1:], (*row.target, eos)) for row in rows]
    fillers = [(tuple(tokenizer(text)["input_ids"][1:]) + (eos,), ()) for text in world.fillers]
    generator = torch.Generator().manual_seed(training.seed)

    def drawn(count: int) -> list[int]:
        return torch.randint(2**31, (count,), generator=generator).tolist()

    while True:
        made = []
        plain = torch.rand(training.batch, generator=generator).lt(training.filler).tolist()
        is_led = bool(torch.rand((), generator=generator) < training.lead)
        for is_plain, which, other, length in zip(plain, *(drawn(training.batch) for _ in range(3))):
            pool = fillers if is_plain else facts
            question, answer = pool[which % len(pool)]
            if is_led:
                before = sum(facts[other % len(facts)], ()) if other % 4 else fillers[other % len(fillers)][0]
                question = (*before[:-1][: 1 + length % 8], stop, *question)
            made.append((question, answer))
        yield _padded(made, tokenizer, training.rest)


def _padded(rows: Sequence[tuple[tuple, tuple]], tokenizer, rest: float) -> tuple[Tensor, Tensor]:
    size = (len(rows), 1 + max(len(question) + len(answer) for question, answer in rows))
    ids, weights = torch.full(size, tokenizer.pad_token_id), torch.full(size, -1.0)
    for i, (question, answer) in enumerate(rows):
        length = 1 + len(question) + len(answer)
        ids[i, :length] = torch.tensor((tokenizer.bos_token_id, *question, *answer))
        weights[i, :length] = torch.tensor([0.0] + [rest] * len(question) + [1.0] * len(answer))
    return ids, weights


@torch.no_grad()
def known(model: nn.Module, tokenizer, questions: Iterable[tuple[str, str]]) -> tuple[set[str], float]:
    """The prompts whose greedy answer is right, up to and with its EOS, and their share."""
    questions = list(questions)
    eos = (tokenizer.eos_token_id,)
    rows = [encode_target(tokenizer, prompt, answer) for prompt, answer in questions]
    rows = [Example(row.prompt, row.target + eos) for row in rows]
    right: set[str] = set()
    for first in range(0, len(rows), 256):
        part = rows[first : first + 256]
        batch = collate(part, tokenizer.pad_token_id, "cpu")
        with evaluating(model):
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        wrong = output.logits.flatten(0, 1)[batch.positions].argmax(-1) != batch.labels
        failed = set(batch.row[wrong].tolist())
        right |= {questions[first + i][0] for i in range(len(part)) if i not in failed}
    return right, len(right) / len(questions)


def _log(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
