"""Memory: peaks of loading and editing, each side in a process of its own, and what edits cost on disk and served.

The kernel's high-water mark of this process (VmHWM) is reset before each phase. `ru_maxrss` cannot be reset and, on
Linux, starts at the size of the process that started this one, so it is used only where there is no /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.measure import Setting, make_baseline, requests
from bench.records import ROOT, Row
from wise_fast import Edit, WiseConfig, WiseEditor
from wise_fast.errors import WiseError
from wise_fast.models import load_model

_MB = 1e6
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FIGURES = {
    "load_above": "load: peak above the loaded model",
    "edit_above": "one edit: peak above the loaded model",
    "above": "load and one edit: peak above the loaded model",
    "whole": "load and one edit: the process's peak less the bytes of the weights",
}


def measure(
    source: str, edits: Sequence[Edit], config: WiseConfig, steps: int, log: Callable[[str], None], dtype: str = "auto"
) -> list[Row]:
    """Rows of the memory section; ratios are over the baseline's figure (None where that is 0).

    Raises:
        WiseError: a probe failed; the message ends with what it wrote.
    """
    found = {}
    for side in ("baseline", "ours"):
        log(f"memory: load and edit one fact, {side}")
        found[side] = _subprocess(side, source, edits[0], config, steps, dtype)
    rows = []
    for side, figures in found.items():
        note = "" if figures["exact"] else " (upper bound: the peak cannot be reset here)"
        for name, metric in _FIGURES.items():
            against = found["baseline"][name] if side == "ours" else 0
            ratio = figures[name] / against if against else None
            rows.append(Row("memory", side + note, metric, figures[name] / _MB, "MB", ratio))
        rows.append(Row("memory", side, "the loaded model's weights", figures["weights"] / _MB, "MB"))
    return rows


def _subprocess(side: str, source: str, edit: Edit, config: WiseConfig, steps: int, dtype: str) -> dict:
    task = {"side": side, "source": source, "edit": edit.to_dict(), "config": config.to_dict()}
    task |= {"steps": steps, "dtype": dtype}
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    made = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(task)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise WiseError(f"the memory probe of {side} failed ({made.returncode}):\n{made.stderr[-2000:]}")
    return json.loads(made.stdout.splitlines()[-1])


def probe(side: str, source: str, edit: dict, config: dict, steps: int, dtype: str = "auto") -> dict[str, float | bool]:
    """Load the model and edit one fact in this process; bytes of each figure. To be run in a fresh process."""
    exact = reset_peak()
    model, tokenizer = load_model(source, dtype=dtype)
    load_peak = peak()
    for tensor in model.parameters():
        tensor.sum()  # weights mapped from the file count once they are read
    gc.collect()
    loaded = rss()
    reset_peak()
    given = Edit.from_dict(edit)
    if side == "ours":
        WiseEditor(model, tokenizer, WiseConfig.from_dict(config)).edit(given)
    else:
        make_baseline(model, tokenizer, config["layer"], steps).edit(requests([given]))
    edit_peak = peak()
    weights = sum(tensor.nbytes for tensor in model.parameters())
    figures = {"load_above": load_peak - loaded, "edit_above": edit_peak - loaded}
    figures |= {"above": max(load_peak, edit_peak) - loaded, "whole": max(load_peak, edit_peak) - weights}
    return {"exact": exact, "weights": weights, "loaded": loaded} | {k: max(v, 0) for k, v in figures.items()}


def reset_peak() -> bool:
    """Set the process's high-water mark to its present size; False where that is not permitted."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The process's high-water mark in bytes."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _maxrss_unit()


def rss() -> int:
    """The process's size in memory in bytes; without /proc, its peak."""
    return _status("VmRSS") or peak()


def _maxrss_unit() -> int:
    return 1 if sys.platform == "darwin" else 1024


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def storage(setting: Setting, log: Callable[[str], None]) -> list[Row]:
    """Rows of the storage section; ratios are over one dense copy of the edited matrix in the model's dtype."""
    log(f"storage: {len(setting.edits)} edits")
    editor = setting.filled()
    dense = editor.projection.weight.nbytes
    with tempfile.TemporaryDirectory() as directory:
        editor.save_pretrained(Path(directory) / "pack")
        saved = sum(path.stat().st_size for path in (Path(directory) / "pack").rglob("*") if path.is_file())
    served = sum(tensor.nbytes for tensor in editor.projection.buffers(recurse=False))
    count, case = editor.projection.memories, f"{len(editor.edits)} edits"
    return [
        Row("storage", case, "one dense copy of the edited matrix", dense / _MB, "MB", 1.0),
        Row("storage", case, "saved directory", saved / _MB, "MB", saved / dense),
        Row("storage", case, "memories served", count, "memories"),
        Row("storage", case, "served bytes per memory", served / count / _MB, "MB", served / count / dense),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The probe's process: one JSON object of a task in, one of figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="memory probe; bench.run starts it")
    parser.add_argument("task", help="JSON: side, source, edit, config, steps")
    sys.stdout.write(json.dumps(probe(**json.loads(parser.parse_args(arguments).task))) + "\n")


if __name__ == "__main__":
    main()
