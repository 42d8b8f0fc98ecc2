"""Closing shards: TIES merge of k compact shards into one side memory (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

import wise_kernels as kernels
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory
from wise_fast.state import EditorState


def close_shard(state: EditorState, config: WiseConfig) -> EditorState:
    """The state with its open shard closed; in mode "merge", full groups become one memory."""
    memory = state.shard.memory
    if config.mode == "retrieve":
        return state.replace(merged=(*state.merged, memory), shard=None)
    closed = (*state.closed, memory)
    if len(closed) < config.shards:
        return state.replace(closed=closed, shard=None)
    merged = merge_memories([*state.merged, *closed], config.density)
    return state.replace(merged=(merged,), closed=(), shard=None, merges=state.merges + 1)


def merge_memories(memories: list[SideMemory], density: float) -> SideMemory:
    """TIES-merge memories of one layout; each weighs as many edits as it holds.

    Every entry of the disjoint mean is an average over the memories that agree, weighted by their edits, so a memory
    that was merged before is not diluted by later ones (no fixed 0.4 / 0.6). The threshold is the least of theirs.
    """
    weights = [float(max(len(m.edits), 1)) for m in memories]
    first = memories[0]
    values, index = kernels.ties_merge([_rows(m) for m in memories], [_places(m) for m in memories], density, weights)
    if first.layout == "element":
        mask = torch.zeros(first.shape[0] * first.shape[1], dtype=torch.bool, device=index.device)
        mask[index] = True
        values, index = values[:, 0], kernels.pack_bits(mask.view(first.shape))
    return first.replace(
        values=values,
        index=index,
        threshold=min(m.threshold for m in memories),
        factor=None,
        edits=tuple(e for m in memories for e in m.edits),
    )


def _rows(memory: SideMemory) -> Tensor:
    return memory.values if memory.layout == "neuron" else memory.values[:, None]


def _places(memory: SideMemory) -> Tensor:
    if memory.layout == "neuron":
        return memory.index
    return kernels.unpack_bits(memory.index, memory.shape[1]).flatten().nonzero()[:, 0]
