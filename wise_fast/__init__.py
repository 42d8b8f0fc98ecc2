"""wise_fast: lifelong model editing with WISE (arXiv 2405.14768), fast.

    editor = WiseEditor(model, tokenizer)              # any decoder-only Hugging Face causal LM
    editor.edit([{"prompt": "The Eiffel Tower is in", "target": "Rome"}])
    model.generate(...)                                # answers with the edit; unrelated prompts are untouched
    with editor.disabled(): ...                        # the unedited model
    editor.rollback()                                  # bit for bit what was there before
    editor.save_pretrained("pack")                     # safetensors and JSON, compact
    editor = WiseEditor.from_pretrained(model, tokenizer, "pack")

    WiseEditor          teaches, undoes, saves and loads edits; the model is used as before
    WiseConfig          its settings: calibrated to the model by default, `WiseConfig.paper()` for the paper's
    Edit, load_edits    one fact, and a file of them in any format of the field
    evaluate            reliability, generalization, locality and exact free answers
    DualMemoryLinear    the projection with a bank of side memories, as a module of its own
    DualMemoryFFN       a whole FFN with that projection

What lies beneath, by module: `models` loads a model, `data` and `formats` read edits, `tasks` and `metrics` score,
`lifelong` streams thousands of edits, `storage` and `hub` keep packs, `dense` folds them into a checkpoint, `serving`
speaks the OpenAI API, `harness` runs lm-evaluation-harness. wise_fast/README.md names every file.

Terms are the paper's: activations `a` [tokens, d_ff] enter the value projection W [d_out, d_ff] of one FFN, the main
memory; a side memory is a delta D_j of it, zero outside a mask; a prompt's score is the mean norm of its tokens'
a D_j^T (eq. 3), and the memory with the largest score over its threshold answers, if any is over it (eq. 6).

Errors are subclasses of `wise_fast.errors.WiseError`; each says what was given, what was expected and what to do, and
leaves the model as it was.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wise_fast.config import WiseConfig
    from wise_fast.data import Edit, load_edits
    from wise_fast.editor import WiseEditor
    from wise_fast.ffn import DualMemoryLinear
    from wise_fast.mlp import DualMemoryFFN
    from wise_fast.tasks import evaluate

try:
    __version__ = version("wise_fast")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["DualMemoryFFN", "DualMemoryLinear", "Edit", "WiseConfig", "WiseEditor", "evaluate", "load_edits"]

_HOMES = {
    "DualMemoryFFN": "mlp",
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
