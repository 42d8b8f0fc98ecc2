"""A model cut over two ranks (`tp_plan`, gloo) answers with its edits as it does on one, and can be taught there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.edited import FACTS, QUICK, logits, wide_model
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor
from wise_fast.fingerprint import describe

ROOT = Path(__file__).resolve().parents[1]
available = distributed.is_available() and distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not available, reason="needs torch.distributed with gloo")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """On one rank: a saved model, a pack of two edits, and what it answers."""
    directory, model, tokenizer = tmp_path_factory.mktemp("ranks"), wide_model("llama"), tiny_tokenizer()
    model.save_pretrained(directory / "model")
    before = logits(model)
    editor = WiseEditor(model, tokenizer, QUICK)
    editor.edit(FACTS[:2])
    editor.save_pretrained(directory / "pack")
    batch = tokenizer([fact.prompt for fact in FACTS], return_tensors="pt", padding=True)
    made = model.generate(**batch, do_sample=False, max_new_tokens=6)
    found = dict(edited=logits(model), before=before, choice=editor.routing.choice, made=made)
    return directory, found | dict(values=editor.projection.values, base=describe(model, editor.architecture))


@pytest.mark.parametrize("task", ["serve", "teach"])
def test_two_ranks_are_one(alone, task):
    directory, expected = alone
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(port)]  # torchrun's own looks the host's name up
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *place, "-m", "tests.two_ranks"]
    done = subprocess.run(
        [sys.executable, *command, str(directory), task],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(directory / f"{task}{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["values"], two["values"]) and torch.equal(one["choice"], two["choice"])
    assert all(torch.equal(a, b) for a, b in zip(one["edited"], two["edited"], strict=True))
    assert torch.equal(one["made"], expected["made"]) and torch.equal(one["choice"], expected["choice"])
    assert one["base"] == two["base"] == expected["base"]
    close = dict(rtol=1e-4, atol=1e-4) if task == "serve" else dict(rtol=1e-2, atol=1e-2)
    for name in ("before", "edited"):
        for got, want in zip(one[name], expected[name], strict=True):
            torch.testing.assert_close(got, want, **close)
    if task == "serve":
        assert torch.equal(one["values"], expected["values"])
