"""What a run weighs: the memory of its process, and what serving its edits reads."""

from __future__ import annotations

import sys

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None


def peak_bytes() -> int | None:
    """The most memory that this process has held, in bytes; None where the system does not say."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def served(method) -> dict[str, int]:
    """`served`, bytes of what is kept beside the model to serve the edits, and `memories`, how many side memories.

    A method that is no editor may say the first as `served_bytes`.
    """
    if not hasattr(method, "state"):
        return {"served": getattr(method, "served_bytes", 0), "memories": 0}
    buffers = method.projection.named_buffers(recurse=False)
    return {"served": sum(tensor.nbytes for _, tensor in buffers), "memories": method.projection.memories}
