"""wise_fast: lifelong model editing with WISE (arXiv 2405.14768), fast.

    editor = WiseEditor(model, tokenizer)              # any decoder-only Hugging Face causal LM
    editor.edit([{"prompt": "The Eiffel Tower is in", "target": "Rome"}])
    model.generate(...)                                # answers with the edit; unrelated prompts are untouched
    editor.save_pretrained("pack")                     # safetensors and JSON, compact

`WiseConfig` holds the settings, `Edit` and `load_edits` the data, `evaluate` the metrics; `DualMemoryLinear` and
`DualMemoryFFN` are the drop-in modules underneath.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wise_fast.config import WiseConfig
    from wise_fast.data import Edit, load_edits
    from wise_fast.editor import WiseEditor
    from wise_fast.ffn import DualMemoryFFN, DualMemoryLinear
    from wise_fast.tasks import evaluate

try:
    __version__ = version("wise_fast")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["DualMemoryFFN", "DualMemoryLinear", "Edit", "WiseConfig", "WiseEditor", "evaluate", "load_edits"]

_HOMES = {
    "DualMemoryFFN": "ffn",
    "DualMemoryLinear": "ffn",
    "Edit": "data",
    "WiseConfig": "config",
    "WiseEditor": "editor",
    "evaluate": "tasks",
    "load_edits": "data",
}


def __getattr__(name: str):
    """Import a public name where it is first used, so that `wise-fast --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
