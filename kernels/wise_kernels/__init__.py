"""Tensor ops of lifelong model editing with WISE (Wang et al., NeurIPS 2024, arXiv 2405.14768): a [N, F] activations,
banks of J compact side memories, routing, editing steps and merging. `reference.py` holds the definition of each op.
"""

from .bits import pack_bits, popcount_table, unpack_bits
from .dual_forward import dual_forward, dual_forward_element
from .gated_add import gated_add_, gated_add_element_
from .leverage import leverage
from .masked_update import masked_update_, masked_update_element_
from .route import route
from .side_forward import side_forward, side_forward_element
from .sketch import sketch_bound, sketch_values, sketched_route
from .ties_merge import ties_merge

__all__ = [
    "dual_forward",
    "dual_forward_element",
    "gated_add_",
    "gated_add_element_",
    "leverage",
    "masked_update_",
    "masked_update_element_",
    "pack_bits",
    "popcount_table",
    "route",
    "side_forward",
    "side_forward_element",
    "sketch_bound",
    "sketch_values",
    "sketched_route",
    "ties_merge",
    "unpack_bits",
]
