"""The kernels' tests on the GPU at hand: `make test-gpu`. Uses the Python that runs it, installs and fetches nothing.

With a GPU: tests/kernels and what is marked `gpu`, on real dtypes, then once more the public ops alone under
compute-sanitizer where there is one. Without a GPU: every test is imported and planned, and every kernel configuration
is built for sm_90.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from bench.records import ROOT

TESTS = ("tests/kernels", "tests/test_ffn_on_device.py")
# Small calls of every public op: memory errors show there, and the sanitizer is slow.
SANITIZED = "tests/kernels/test_on_device.py"
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
SANITIZER_SECONDS = 600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; the exit status is that of the first step that failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not torch.cuda.is_available():
        return dry(arguments)
    return pytest(*TESTS, *arguments) or sanitize()


def dry(arguments: Sequence[str]) -> int:
    """What can be done without a device."""
    say("no GPU here: a dry run that collects every test and builds every kernel for sm_90; nothing runs on a device")
    status = pytest(*TESTS, "--collect-only", "-qq", *arguments)
    if status:
        return status
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bench.aot", "--target", "sm_90", "--out", out]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def sanitize() -> int:
    """memcheck over the public ops; not an error where there is no sanitizer, or where it is not done in time."""
    tool = next((found for found in map(shutil.which, SANITIZERS) if found), None)
    if tool is None:
        say("there is no compute-sanitizer here: memory errors were not looked for")
        return 0
    check = (tool, "--tool", "memcheck", "--error-exitcode", "9")
    # PyTorch's caching would hide reads past the end of a tensor in a larger block.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        return pytest(SANITIZED, "-k", "not graph", prefix=check, env=environment, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        say(f"compute-sanitizer was not done after {SANITIZER_SECONDS} s: stopped")
        return 0


def pytest(*arguments: str, prefix: Sequence[str] = (), **options) -> int:
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, **options).returncode


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
