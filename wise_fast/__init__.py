"""wise_fast: lifelong model editing with WISE (arXiv 2405.14768), fast."""

from importlib.metadata import PackageNotFoundError, version

from wise_fast.config import WiseConfig
from wise_fast.data import Edit, load_edits
from wise_fast.editor import WiseEditor
from wise_fast.ffn import DualMemoryFFN, DualMemoryLinear
from wise_fast.metrics import evaluate

try:
    __version__ = version("wise_fast")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["DualMemoryFFN", "DualMemoryLinear", "Edit", "WiseConfig", "WiseEditor", "evaluate", "load_edits"]
