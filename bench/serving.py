"""Serving latency of the whole model, edited against unedited: prefill and decode, alternating call by call.

Arms of one comparison run the same tokens on twins of one model:

    unedited            the model itself, never touched
    unedited, again     a second twin of it: what its ratio differs from 1 by is the noise of the measurement
    ours, out of scope  edits loaded, every sequence answered by the main memory
    ours, in scope      the same memories with thresholds of 0, so that every sequence gets its side memory
    baseline            costs the same in and out of scope, as it always computes everything
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.measure import UNRELATED, Setting, alternate, requests, timed, twin
from bench.records import Row, percentiles, spread
from wise_fast import WiseEditor
from wise_fast.subjects import ANY

_REFERENCE = "unedited"
_NEAR_ZERO, _HUGE = 1e-20, 1e20  # a threshold that every response exceeds, a newness that no token has


@torch.no_grad()
def measure(setting: Setting, log: Callable[[str], None]) -> Iterator[Row]:
    """Rows of the serving section as they are done; ratios are over the unedited model's median."""
    log("serving: editing for it")
    with torch.enable_grad():
        editor = setting.filled()
        baseline = setting.baseline(steps=1)
        baseline.edit(requests(setting.edits[:1]))
    again = twin(setting.model)
    with baseline:
        models = {_REFERENCE: setting.model, "unedited, again": again, "ours": editor.model, "baseline": baseline.model}
        for batch, length in setting.sizes:
            log(f"serving: prefill {batch} x {length}")
            yield from _compare(setting, editor, models, f"prefill {batch} x {length}", (batch, length), 0)
        for batch in setting.decode_batches:
            length, new = setting.decode
            log(f"serving: decode, batch {batch}")
            case = f"decode {new} tokens after {length}, batch {batch}"
            yield from _compare(setting, editor, models, case, (batch, length), new)


def _compare(
    setting: Setting, editor: WiseEditor, models: dict[str, nn.Module], case: str, size: tuple[int, int], new: int
) -> list[Row]:
    """Rows of one comparison: every arm's seconds per call (prefill, `new` = 0) or per decoded token."""
    ids = unrelated_tokens(setting, *size)
    natural, newest, names = (
        editor.projection.thresholds.clone(),
        editor.projection.last_limits,
        editor.projection.names,
    )
    _prefill(editor.model, ids)
    quiet = int((editor.routing.choice < 0).sum())
    out = "ours, nothing in scope" + ("" if quiet == len(ids) else " (thresholds raised)")
    limits = {
        out: natural if quiet == len(ids) else torch.full_like(natural, torch.inf),
        "ours, all in scope": torch.full_like(natural, _NEAR_ZERO),
    }
    arms = {name: _arm(model, ids, new) for name, model in models.items() if name != "ours"}
    for name, thresholds in limits.items():
        arms[name] = _scoped(editor, thresholds, _arm(editor.model, ids, new), inside=name != out)
    try:
        seconds = alternate(arms, setting.rounds)
    finally:
        editor.projection.thresholds.copy_(natural)
        editor.projection.last_limits, editor.projection.names = newest, names
    share = Row("serving", case, "unrelated sequences out of scope by themselves", quiet / len(ids), "share")
    return [*_rows(case, seconds, max(new, 1), "time per token" if new else "time per call"), share]


def _rows(case: str, seconds: dict[str, list[float]], per: int, metric: str) -> list[Row]:
    reference = [s / per for s in seconds[_REFERENCE]]
    middle, rows = percentiles(reference)[1], []
    for name, values in seconds.items():
        values = [s / per for s in values]
        rows.append(spread("serving", f"{case}: {name}", metric, values, "s", middle))
        if name != _REFERENCE:
            pairs = percentiles([v / r for v, r in zip(values, reference, strict=True)])
            ratio = rows[-1].ratio
            rows.append(Row("serving", f"{case}: {name}", "ratio to unedited, by round", ratio, "x", ratio, *pairs))
    return rows


def _arm(model: nn.Module, ids: Tensor, new: int) -> Callable[[], float]:
    """One timed call: the prefill, or decoding `new` tokens after a prefill that is not timed."""

    def decode(cache) -> None:
        for place in range(new):
            model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)

    def run() -> float:
        if not new:
            return timed(lambda: _prefill(model, ids), ids.device)
        cache = _prefill(model, ids).past_key_values
        return timed(lambda: decode(cache), ids.device)

    return run


def _scoped(editor: WiseEditor, thresholds: Tensor, run: Callable[[], float], inside: bool) -> Callable[[], float]:
    """The arm under these thresholds, which checks where its sequences went."""
    limits, names = editor.projection.last_limits, editor.projection.names
    if inside and limits is not None:  # the same work, and nothing is too new
        limits = torch.full_like(limits, _HUGE)
    if inside and names is not None:  # and every prompt names a subject
        names = torch.full_like(names, ANY)

    def scoped() -> float:
        editor.projection.thresholds.copy_(thresholds)
        editor.projection.last_limits, editor.projection.names = limits, names
        seconds = run()
        went = editor.routing.choice >= 0
        if bool((went != inside).any()):
            expected = len(went) if inside else 0
            raise RuntimeError(f"{int(went.sum())} of {len(went)} sequences were in scope, expected {expected}")
        return seconds

    return scoped


def _prefill(model: nn.Module, ids: Tensor):
    """A prefill as `generate` does it: with a cache, and logits at the last position only where the model can."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=True, **last)


def unrelated_tokens(setting: Setting, batch: int, length: int) -> Tensor:
    """[batch, length] tokens of text that no edit is about, another beginning in every row."""
    rows = []
    for first in range(batch):
        shift = first % len(UNRELATED)
        text = " ".join(UNRELATED[shift:] + UNRELATED[:shift])
        tokens = setting.tokenizer(text)["input_ids"]
        rows.append((tokens * (length // len(tokens) + 1))[:length])
    return torch.tensor(rows, device=setting.device)
