"""Thresholds of a memory, from the activations of its own edits' prompts."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from wise_fast import objective, protection
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory

Keys = Sequence[tuple[int, Tensor]]  # per edit, its index and its prompt's activations [n, K]


def calibrated(
    memory: SideMemory, p: Tensor | None, keys: Keys, holds: Collection[int], config: WiseConfig
) -> tuple[SideMemory, dict[int, float]]:
    """The memory with its thresholds and leverage factor, and the routing score of each edit in `keys`.

    Edits that do not hold do not drag a threshold down. `holds` is empty where nobody knows.
    """
    scores = {index: _loudness(memory, key, config) for index, key in keys}
    counted = [index for index in scores if index in holds] or list(scores)
    memory = memory.replace(threshold=config.act_ratio * min(scores[index] for index in counted))
    # What TIES merges into has no P, and one bank has one kind of score.
    if p is None or config.route_by == "score" or (config.mode, config.merging) == ("merge", "ties"):
        return memory, scores
    memory = memory.replace(factor=protection.untaught_factor(p))
    scores = {index: scores[index] / memory.spread(key) for index, key in keys}
    louder = dict.fromkeys(scores, 1.0)
    if config.last_ratio is not None:
        last = {index: memory.newness(key) for index, key in keys}
        memory = memory.replace(last_limit=config.last_ratio * statistics.median(last[index] for index in counted))
        louder = {index: max(1.0, new / memory.last_limit) for index, new in last.items()}
    # No outlier drags the median, but an edit that holds must be heard.
    heard = (config.act_ratio * scores[index] / louder[index] for index in scores if index in holds)
    threshold = min([config.z_ratio * statistics.median(scores[index] for index in counted), *heard])
    return memory.replace(z_threshold=threshold), scores


def _loudness(memory: SideMemory, key: Tensor, config: WiseConfig) -> float:
    mask = torch.ones(1, key.shape[0], dtype=torch.bool, device=key.device)
    return float(objective.scores(memory.respond(key), mask, config.reduction))
