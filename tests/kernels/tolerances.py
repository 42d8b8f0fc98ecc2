"""The one table of tolerances. Rule (flash-attention's): the error of an op against its fp32/fp64 reference is at most
twice the error that plain PyTorch makes in the same dtype, plus a small atol. Masks, gates and signs match exactly.
"""

import torch

ATOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(ATOL)
FACTOR = 2.0


def assert_within(got, plain, reference, dtype):
    """max |got - reference| <= 2 max |plain - reference| + atol * max(1, max |reference|); NaN never passes."""
    assert got.shape == reference.shape == plain.shape
    if got.numel() == 0:
        return
    got, plain, reference = (x.detach().double() for x in (got, plain, reference))
    error, allowed = (got - reference).abs().max(), FACTOR * (plain - reference).abs().max()
    allowed = allowed + ATOL[dtype] * max(1.0, float(reference.abs().max()))
    assert error <= allowed, f"error {error:.3g} > allowed {allowed:.3g} in {dtype}"


def assert_fp32(got, reference):
    """As `assert_within` where the op works in fp32 whatever its inputs: twice no error, plus atol."""
    assert_within(got.float(), reference, reference, torch.float32)
