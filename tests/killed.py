"""Lifelong runs that are really killed: `python -m tests.killed DIRECTORY CASES`.

This process imports everything, then forks a child for every run, so that a killed run costs no new import of torch.
CASES is a JSON list of cases, each a list of faults that befall one run in turn before it is resumed to its end:

    {"after": share}                   SIGKILL from outside, after this share of the time that a whole run takes
    {"call": share, "when": "before"}  SIGKILL at the call to the system at this share of all that a whole run makes to
                                       keep its files: "before" it, "after" it, or "within" it (half of a write is done)
    {"limit": bytes}                   no file may grow beyond this; the system refuses, as a full disk does

The result, a JSON document on stdout, has for every case what each fault left and what the run came to.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.edited import QUICK, wide_model
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor, tasks
from wise_fast.data import Locality
from wise_fast.errors import WiseError
from wise_fast.journal import read_journal
from wise_fast.lifelong import Run, RunSettings, Watcher

NAMES = ("Oslo", "Kyoto", "Lima", "Quito", "Dakar", "Turin", "Perth", "Sofia", "Oslo", "Accra")
EDITS = [
    Edit(f"River of {name}:", target, rephrases=(f"{name}'s river:",), locality=(Locality(f"Bread {name[0]}", "oil"),))
    for name, target in zip(NAMES, "PEDABCFGHI", strict=True)
]
CONFIG = QUICK.replace(max_steps=6, mask_ratio=0.2, batch_size=2, shard_size=4, near=1, rehearsals=2)
SETTINGS = RunSettings(evaluate_at=(1, 5), checkpoint_every=4, generate=False)
_ATTEMPTS = 6
ROUTINE = {os: ("write", "fsync", "rename", "replace", "open"), shutil: ("rmtree",)}


def shallow_model(seed=0):
    """Two layers: these tests are of the run, whatever is learned in it."""
    return wide_model(seed=seed, num_hidden_layers=2)


def one_sentence():
    """Held-out text, instead of the packaged passages."""
    return ["The sun rose over the hills."]


class Acknowledging(Watcher):
    """Tells the parent, through a pipe, how many edits were said to be done."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def edited(self, done, reports):
        os.write(self.pipe, bytes([done]))


def watch_calls(at: int | None = None, when: str = "before") -> list:
    """Count the calls that keep files, and kill this process at number `at` of them."""
    calls, kill = [], lambda: os.kill(os.getpid(), signal.SIGKILL)

    def watched(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) != at or when == "before":
                if len(calls) == at:
                    kill()
                return real(*args, **kwargs)
            if when == "within" and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
                kill()
            real(*args, **kwargs)
            kill()

        return call

    for module, names in ROUTINE.items():
        for name in names:
            setattr(module, name, watched(name, getattr(module, name)))
    return calls


def child(work) -> int:
    """Fork; the child does `work` and exits with 0, or with 7 and its message on an error of ours."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except WiseError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = 7
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


class Server:
    """Runs in forked children; `model` is loaded once, before the first fork."""

    def __init__(self, directory: Path):
        self.directory, self.model, self.tokenizer = directory, shallow_model(), tiny_tokenizer()
        self.seconds, self.calls = 0.0, 0

    def run(self, out: Path, pipe: int, fault: dict, settings: RunSettings) -> None:
        """The child's part. Writes `<out>.result` when the run has come to its end."""
        if "limit" in fault:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
        at = max(1, round(fault["call"] * self.calls)) if "call" in fault else None
        watcher, calls = Acknowledging(pipe), watch_calls(at, fault.get("when", "before"))
        editor = WiseEditor(self.model, self.tokenizer, CONFIG)
        summary = Run(editor, EDITS, out, settings, resume=True).run(watcher)
        result = {"digest": summary.digest, "failed": summary.failed, "calls": len(calls)}
        result["reports"] = [[r.edit.prompt, r.steps, r.loss.hex(), r.note] for r in editor.edits]
        out.with_suffix(".result").write_text(json.dumps(result))

    def once(self, out: Path, fault: dict, settings: RunSettings = SETTINGS) -> dict:
        """One child, with this fault; says how it ended and what it had acknowledged."""
        reading, writing = os.pipe()
        start = time.perf_counter()
        pid = child(lambda: self.run(out, writing, fault, settings))
        os.close(writing)
        if "after" in fault:
            time.sleep(fault["after"] * self.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        acknowledged = b"".join(iter(lambda: os.read(reading, 4096), b""))
        os.close(reading)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        code = None if killed else os.waitstatus_to_exitcode(status)
        return {
            "killed": killed,
            "code": code,
            "acknowledged": max(acknowledged, default=0),
            "journalled": journalled(out),
            "seconds": time.perf_counter() - start,
        }

    def whole(self, out: Path, settings: RunSettings = SETTINGS) -> dict:
        """A run that nothing befalls."""
        ended = self.once(out, {}, settings)
        return outcome(out) | {"ended": ended}

    def case(self, number: int, faults: list[dict]) -> dict:
        """A run with these faults in turn, then resumed to its end."""
        late = RunSettings(evaluate_at=(10,), checkpoint_every=1000, generate=False)
        settings = late if any("limit" in fault for fault in faults) else SETTINGS
        for attempt in range(_ATTEMPTS):
            out = self.directory / f"case{number}-{attempt}"
            left = [self.once(out, fault, settings) for fault in faults]
            if left[0]["code"] != 0:
                break
            faults = [fault | {"after": fault["after"] / 2} for fault in faults]  # it was done before the kill came
        return {"faults": faults, "left": left} | self.whole(out, settings)


def in_two_processes(server: Server, cases: list[list[dict]]) -> list[dict]:
    """What all cases come to. Two at once: a run does not keep a second core busy."""

    def work(first: int) -> None:
        made = {number: server.case(number, cases[number]) for number in range(first, len(cases), 2)}
        (server.directory / f"cases{first}.json").write_text(json.dumps(made))

    pids = [child(lambda first=first: work(first)) for first in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise SystemExit(f"the processes of cases ended with {codes}")
    found = [json.loads((server.directory / f"cases{first}.json").read_text()) for first in (0, 1)]
    return [found[number % 2][str(number)] for number in range(len(cases))]


def journalled(out: Path) -> int:
    """Edits that the journal holds."""
    path = out / "journal.jsonl"
    return sum(len(line["reports"]) for line in read_journal(path)) if path.exists() else 0


def outcome(out: Path) -> dict:
    """What a run came to, less what a clock or a memory meter says."""
    journal = [dict(line) for line in read_journal(out / "journal.jsonl")]
    for line in journal:
        del line["seconds"], line["rss"]
        for report in (*line["reports"], *line.get("again", {}).values()):
            del report["seconds"]
    evaluations = [dict(line) for line in read_journal(out / "evaluations.jsonl")]
    for line in evaluations:
        del line["seconds"]
    result = json.loads(out.with_suffix(".result").read_text())
    calls = result.pop("calls")
    return {"result": result, "journal": journal, "evaluations": evaluations, "calls": calls}


def main(directory: Path, cases: list[list[dict]]) -> dict:
    torch.set_num_threads(1)
    tasks.held_out_texts = one_sentence  # the passages take half the time of a run
    server = Server(directory)
    server.whole(directory / "warm")
    plain, late = server.whole(directory / "plain"), None
    server.seconds, server.calls = plain["ended"]["seconds"], plain["calls"]
    if any("limit" in fault for faults in cases for fault in faults):
        late = server.whole(directory / "late", RunSettings(evaluate_at=(10,), checkpoint_every=1000, generate=False))
    return {"plain": plain, "late": late, "cases": in_two_processes(server, cases)}


if __name__ == "__main__":
    document = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(document))
