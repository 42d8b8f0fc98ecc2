"""Bit masks of the element layout. A mask over D [O, F] is kept as `bits [O, ceil(F/32)] int32`: weight (o, c) is in
the mask when bit c % 32 of word c // 32 of row o is set. The packed values of a memory are its masked weights in
row-major order, so value v belongs to the v-th set bit. Everything here runs without a host sync.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


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


def unpack_dense(values: Tensor, bits: Tensor, width: int) -> Tensor:
    """Dense D [O, width] of one memory from its packed `values [V]` and `bits [O, ceil(width/32)]`."""
    mask = unpack_bits(bits, width)
    # masked_scatter, not dense[mask] = values: indexing by a mask counts it on the host.
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


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
