"""An edited model under lm-evaluation-harness (extra `eval`): any of its tasks, with the edits and without."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wise_fast.errors import ConfigError, WiseError


def find_tasks(tasks: Sequence[str], include: str | os.PathLike | None = None):
    """The harness's task manager, once it knows all these tasks; needs no model.

    Args:
        tasks: names and globs of tasks, groups and tags, or paths of their YAML files.
        include: a directory with more YAML files of tasks.

    Raises:
        WiseError: lm_eval is not installed.
        ConfigError: no tasks, or the harness knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise WiseError("the harness needs lm_eval: pip install 'wise_fast[eval]'") from error
    if include is not None and not Path(include).is_dir():
        raise ConfigError(f"{include} is no directory; expected one with YAML files of tasks")
    named = [task for task in tasks if not (task.endswith(".yaml") and Path(task).is_file())]
    manager = None
    if include is not None or not named:
        manager = TaskManager(include_path=None if include is None else str(include), include_defaults=False)
    if manager is None or not all(manager.match_tasks([task]) for task in named):  # the thousands that it brings along
        manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in named if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise ConfigError(
            f"the harness knows no task {', '.join(map(repr, unknown)) or '(none was named)'}; `lm_eval ls tasks` "
            "lists them, and a directory with your own can be included"
        )
    return manager


def evaluate_tasks(
    editor,
    tasks: Sequence[str],
    *,
    include: str | os.PathLike | None = None,
    before_after: bool = False,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of tasks, as {"after": {"task metric": value}}; with `before_after` also "before", the unedited model's.

    Args:
        editor: a `WiseEditor` (or another `wise_fast.metrics.Method`).
        tasks, include: as in `find_tasks`.
        limit: only so many documents of each task.
        num_fewshot: examples in front of each question; the task's own number when None.

    Raises:
        WiseError, ConfigError: as `find_tasks` does.
    """
    manager = find_tasks(tasks, include)
    settings = dict(limit=limit, num_fewshot=num_fewshot, task_manager=manager)
    found = {}
    if before_after:
        with editor.disabled():
            found["before"] = _figures(editor, tasks, settings)
    return found | {"after": _figures(editor, tasks, settings)}


def _figures(editor, tasks: Sequence[str], settings: dict) -> dict[str, float]:
    from lm_eval.evaluator import simple_evaluate

    from wise_fast.architectures import evaluating
    from wise_fast.harness_lm import EditedLM

    with evaluating(editor.model):
        model = EditedLM(editor, batch_size=8)
        results = simple_evaluate(model, tasks=list(tasks), bootstrap_iters=0, log_samples=False, **settings)["results"]
    return {
        f"{task} {_spoken(name)}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if "," in name and "_stderr," not in name and not isinstance(value, str)
    }


def _spoken(name: str) -> str:
    """The harness's "metric,filter" for people."""
    metric, _, kind = name.partition(",")
    return metric if kind == "none" else f"{metric} ({kind})"
