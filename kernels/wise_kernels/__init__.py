"""Tensor ops of lifelong model editing with WISE (Wang et al., NeurIPS 2024, arXiv 2405.14768): a [N, F] activations,
banks of J compact side memories, routing, editing steps and merging. `reference.py` holds the definition of each op.

    dual_forward, side_forward      main output, side responses a D_j^T and their norms (eq. 3); ..._element likewise
    keeps_response                  whether to ask for responses of which one will be added
    leverage                        how much of each token a memory was not taught
    route, sketched_route           scores of sequences, thresholds, top-1 (eq. 6); the latter for many memories
    gated_add_                      adds the chosen side response to the main output, in place
    gated_linear                    main projection and the chosen response, for a decode step
    masked_update_                  one optimiser step on a memory, in place, without a dense gradient
    ties_merge                      shards into one memory (Yadav et al. 2023)
    pack_bits, unpack_bits, popcount_table      the bit masks of the element layout
    sketch_values, sketch_bound                 what sketched_route reads

The neuron layout keeps columns of D, the element layout (..._element) a bit for each weight. Every op runs on CPU
(PyTorch) and on a device (Triton), takes only tensors, and raises ValueError for arguments that do not fit.
"""

from .bits import pack_bits, popcount_table, unpack_bits
from .dual_forward import dual_forward, dual_forward_element, keeps_response
from .gated_add import gated_add_, gated_add_element_
from .gated_linear import gated_linear
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
    "gated_linear",
    "keeps_response",
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
