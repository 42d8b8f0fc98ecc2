"""Bit masks of the element layout. A mask over D [O, F] is kept as `bits [O, ceil(F/32)] int32`: weight (o, c) is in
the mask when bit c % 32 of word c // 32 of row o is set. The packed values of a memory are its masked weights in
row-major order, so value v belongs to the v-th set bit. Everything here runs without a host sync on a device.

On the CPU the places of the set bits are kept while a mask lives (`positions`, `sparse_rows`): 4 bytes a weight, and
finding them takes longer than a product of a few rows.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

WORD = 32
_KEPT = WeakTensorKeyDictionary()


def words(width: int) -> int:
    """Number of 32-bit words that hold a row of `width` bits."""
    return (width + WORD - 1) // WORD


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask [..., F] into int32 words [..., ceil(F/32)]; bits past F are zero.

    Raises ValueError if `mask` is not boolean or has no dimension.
    """
    if mask.dtype != torch.bool or mask.dim() < 1:
        raise ValueError(f"mask must be a bool tensor [..., F], got {mask.dtype} {tuple(mask.shape)}")
    padded = F.pad(mask, (0, words(mask.shape[-1]) * WORD - mask.shape[-1])).to(torch.uint8)
    weights = torch.ones(8, dtype=torch.uint8, device=mask.device) << _shifts(mask.device)
    octets = (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def unpack_bits(bits: Tensor, width: int) -> Tensor:
    """Unpack int32 words [..., ceil(width/32)] into a boolean mask [..., width]; the inverse of `pack_bits`.

    Raises ValueError if `bits` is not int32 or its last dimension is not ceil(width/32).
    """
    if bits.dtype != torch.int32 or bits.dim() < 1 or bits.shape[-1] != words(width):
        expected = f"int32 [..., {words(width)}] for width {width}"
        raise ValueError(f"bits must be {expected}, got {bits.dtype} {tuple(bits.shape)}")
    # A byte of bits looks up the eight bytes it stands for (little-endian hosts and devices): one pass over the mask.
    shifts = _shifts(bits.device)
    table = ((torch.arange(256, dtype=torch.uint8, device=bits.device).unsqueeze(-1) >> shifts) & 1).view(torch.int64)
    octets = bits.contiguous().view(torch.uint8).flatten()
    mask = table.flatten().index_select(0, octets.int()).view(torch.bool)
    return mask.view(*bits.shape[:-1], WORD * bits.shape[-1])[..., :width]


def popcount_table(bits: Tensor) -> Tensor:
    """[J, O, ceil(F/64)] int32 from bits [J, O, ceil(F/32)]: set bits of memory j before each block of two words.

    It tells a device where the values of a block begin, follows from `bits` alone and is worth keeping with a bank.

    Raises ValueError if `bits` is not int32 [J, O, words].
    """
    if bits.dtype != torch.int32 or bits.dim() != 3:
        raise ValueError(f"bits must be int32 [J, O, words], got {bits.dtype} {tuple(bits.shape)}")
    if bits.is_cuda:
        from .gpu.element_tile import popcount_table as launch

        return launch(bits)
    # A byte of bits looks up how many it has: an eighth of the work of unpacking them.
    each = unpack_bits(torch.arange(256, dtype=torch.int32, device=bits.device)[:, None], WORD).sum(
        1, dtype=torch.int32
    )
    octets = each.index_select(0, bits.contiguous().view(torch.uint8).flatten().int())
    octets = F.pad(octets.view(*bits.shape[:2], 4 * bits.shape[2]), (0, bits.shape[2] % 2 * WORD // 8))
    counts = octets.unflatten(2, (-1, 2 * WORD // 8)).sum(3, dtype=torch.int32)
    before = counts.flatten(1).cumsum(1, dtype=torch.int32).view_as(counts)
    return before - counts


def unpack_dense(values: Tensor, bits: Tensor, width: int, start: Tensor | None = None) -> Tensor:
    """Dense D [O, width] of one memory from its packed `values [V]` and `bits [O, ceil(width/32)]`.

    With `start`, a 0-d int64 tensor, its values begin there and others may follow: no size is read on the host.
    """
    mask = unpack_bits(bits, width)
    if values.shape[0] == 0:
        return values.new_zeros(mask.shape)
    if start is not None:
        at = mask.flatten().cumsum(0).add_(start - 1).clamp_(0, values.shape[0] - 1)
        return torch.where(mask, values.index_select(0, at).view(mask.shape), 0)
    if bits.device.type == "cpu":
        at = torch.from_numpy(np.flatnonzero(mask.numpy()))
        check_count(len(at), values.shape[0])
        # Faster than masked_scatter by four times, the search included.
        return values.new_zeros(mask.numel()).scatter_(0, at, values).view(mask.shape)
    # masked_scatter, not dense[mask] = values: indexing by a mask counts it on the host.
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def check_count(found: int, given: int) -> None:
    """Raise ValueError unless as many bits were found as values are given."""
    if found != given:
        raise ValueError(f"bits have {found} weights in the mask, values has {given}")


def positions(bits: Tensor, width: int) -> Tensor:
    """Flat positions of the set bits of `bits [O, ceil(width/32)]` in a mask [O, width], ascending; CPU."""
    # numpy's nonzero is three times as fast as torch's.
    kind = torch.int32 if bits.shape[0] * width < 2**31 else torch.int64

    def make() -> Tensor:
        return torch.from_numpy(np.flatnonzero(unpack_bits(bits, width).numpy())).to(kind)

    return _kept(bits, width, "flat", make)


def sparse_rows(bits: Tensor, width: int, j: int) -> tuple[Tensor, Tensor]:
    """Memory j of `bits [J, O, ceil(width/32)]` as compressed rows: bits before each row [O + 1], and columns; CPU."""

    def make() -> tuple[Tensor, Tensor]:
        mask = unpack_bits(bits[j], width)
        before = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        return before, torch.from_numpy(np.flatnonzero(mask.numpy()) % max(width, 1)).int()

    return _kept(bits, width, j, make)


def _kept(bits: Tensor, width: int, kind: object, make: Callable):
    """make(), or what it gave for this mask before."""
    if bits.is_inference():  # nobody counts their changes
        return make()
    # A view of a mask, such as one memory's as a bank, lives for a call only.
    owner = bits if bits._base is None else bits._base
    stamp, key = (owner._version, owner.data_ptr()), (kind, width, bits.data_ptr(), bits.shape, bits.stride())
    entry = _KEPT.get(owner)
    if entry is None or entry[0] != stamp:
        _KEPT[owner] = entry = (stamp, {})
    if key not in entry[1]:
        entry[1][key] = make()
    return entry[1][key]


def scatter_packed(packed: Tensor, dense: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Write the masked entries of `dense [o, F]` to `packed[start:]`, in row-major order; return the new start.

    `packed` is [V + 1]: its last slot takes the entries outside the mask. `start` is a 0-d int64 tensor, so that a
    caller can walk over blocks of rows. Unlike `dense[mask]` this needs no host sync.
    """
    count = mask.flatten().cumsum(0) + start
    spill = packed.shape[0] - 1
    packed.scatter_(0, torch.where(mask.flatten(), count - 1, spill), dense.flatten())
    return count[-1] if count.numel() else start


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
