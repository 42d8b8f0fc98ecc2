"""Every shipped configuration of every kernel, compiled for the architectures it runs on; needs no device.

    make aot                                # = python -m bench.aot: a summary, and bench/results/aot.csv made anew
    python -m bench.aot --quick             # what the test suite compiles, half of it

Fails on register spills, on more shared memory than the architecture has, and on a promised matrix instruction that is
missing. What a compilation gave is kept in triton's cache, so that only changed kernels are compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench import records

PACKAGE = "wise_kernels.gpu"
# Bytes of shared memory that one program may use.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
INSTRUCTIONS = {
    "wgmma.mma_async": "wgmma",
    "tcgen05.mma": "tcgen05",
    "mma.sync": "mma.sync",
    "v_mfma": "mfma",
}


@dataclass(frozen=True)
class Build:
    """What one configuration became on one architecture.

    Attributes:
        module, case: the file of kernels and the name in its `aot_cases()`.
        target: architecture.
        registers: per thread (vector registers on AMD).
        spills: bytes of spill loads and stores on NVIDIA, spilled vector registers on AMD.
        shared, shared_limit: bytes of shared memory, and what the architecture has.
        instructions: the matrix instructions found, joined by "+".
        warps, stages: as launched.
        problem: what is wrong with it, or "".
    """

    module: str
    case: str
    target: str
    registers: int
    spills: int
    shared: int
    shared_limit: int
    instructions: str
    warps: int
    stages: int
    problem: str


COLUMNS = tuple(f.name for f in fields(Build))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, record; 1 where something is wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("error: TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    builds = build_all(options.module or modules(), options.target, options.jobs, options.quick)
    place = records.environment("", "cpu", ["python", "-m", "bench.aot", *arguments])
    rows = [{**place, **asdict(build)} for build in builds]
    path = options.out / "aot.csv"
    path.unlink(missing_ok=True)
    records.append(path, (*records.ENVIRONMENT_COLUMNS, *COLUMNS), rows)
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
    else:
        show(builds)
    problems = [build for build in builds if build.problem]
    for build in problems:
        sys.stderr.write(f"{build.module} {build.case} on {build.target}: {build.problem}\n")
    return 1 if problems else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description="compile every kernel ahead of time")
    parser.add_argument("--module", action="append", help=f"a module with aot_cases (default: all of {PACKAGE})")
    parser.add_argument("--target", action="append", choices=SHARED, help="architecture, repeatable (default: all)")
    parser.add_argument("--quick", action="store_true", help="only what `in_quick` says")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="directory of aot.csv (bench/results)")
    parser.add_argument("--json", action="store_true", help="print every build as JSON")
    return parser.parse_args(arguments)


def modules() -> list[str]:
    """Names of the modules of `wise_kernels.gpu` that list configurations."""
    package = importlib.import_module(PACKAGE)
    names = [f"{PACKAGE}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "aot_cases")]


def in_quick(case, target: str) -> bool:
    """Whether a quick run compiles it. Kernels without a promised matrix instruction are compiled for sm_90 and gfx942
    alone, products in every table of tiles but not in fp16, which differs from bf16 in the names of instructions."""
    if case.expect is None:
        return target in ("sm_90", "gfx942")
    return "*fp16" not in case.signature.values()


def build_all(names: Iterable[str], targets: Sequence[str] | None, jobs: int, quick: bool = False) -> list[Build]:
    """Every case of these modules on its architectures, in order, compiled by `jobs` processes."""
    work, heavy = [], {}
    for name in names:
        for number, case in enumerate(importlib.import_module(name).aot_cases()):
            for target in case.targets:
                if target in (targets or SHARED) and (not quick or in_quick(case, target)):
                    heavy[name, number, target] = (case.expect is not None, case.num_warps)
                    work.append((name, number, target))
    # What takes long goes first, so that no process ends with it while the others have nothing left.
    order = sorted(work, key=heavy.__getitem__, reverse=True)
    # A fork of a process that has threads (torch) can hang: start afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=max(1, min(jobs, len(work))), mp_context=context) as pool:
        made = dict(zip(order, pool.map(build, *zip(*order)))) if work else {}
    return [made[piece] for piece in work]


def build(module: str, number: int, target: str) -> Build:
    """Compile case `number` of a module, unless triton's cache has what that gave, and judge it."""
    from triton.runtime.cache import get_cache_manager

    case = importlib.import_module(module).aot_cases()[number]
    cache, name = get_cache_manager(_key(case, target)), "resources.json"
    kept = cache.get_file(name)
    if kept:
        found = json.loads(Path(kept).read_text())
    else:
        found = compiled(case, target)
        cache.put(json.dumps(found), name, binary=False)
    resources = {**found, "instructions": "+".join(found["instructions"]), "shared_limit": SHARED[target]}
    resources |= {"warps": case.num_warps, "stages": case.num_stages}
    problem = judge(case.expect, target, found)
    return Build(module.rpartition(".")[2], case.name, target, **resources, problem=problem)


def _key(case, target: str) -> str:
    import triton

    parts = (triton.__version__, target, case.kernel.cache_key, case.signature, case.constexprs, case.divisible)
    text = repr((*parts, case.num_warps, case.num_stages, case.maxnreg, Path(__file__).read_text()))
    return hashlib.sha256(text.encode()).hexdigest()


def compiled(case, target: str) -> dict:
    """Registers, spills, shared memory and matrix instructions of a case on an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wise_kernels.gpu.launch import PDL_TARGETS

    # ptxas reports while it compiles: have it compile, and keep what it says.
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    amd = target.startswith("gfx")
    chip = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    dependent = "PDL" in names and target in PDL_TARGETS
    constexprs = dict(case.constexprs) | ({"PDL": dependent} if "PDL" in names else {})
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, signature, constexprs, attributes)
    log = io.StringIO()
    with redirect_stdout(log):
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        options |= {} if case.maxnreg is None else {"maxnreg": case.maxnreg}
        options |= {"launch_pdl": True} if dependent else {}
        made = triton.compile(source, chip, options)
    assembly = made.asm["amdgcn" if amd else "ptx"]
    found = amd_resources(assembly) if amd else nvidia_resources(log.getvalue())
    instructions = sorted({short for word, short in INSTRUCTIONS.items() if word in assembly})
    return {**found, "shared": made.metadata.shared, "instructions": instructions}


def nvidia_resources(log: str) -> dict[str, int]:
    """Registers and spilled bytes from what `ptxas -v` writes."""
    registers = re.findall(r"Used (\d+) registers", log)
    if not registers:
        raise ValueError(f"ptxas reported no registers: {log!r}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return {"registers": max(map(int, registers)), "spills": sum(map(int, spills))}


def amd_resources(assembly: str) -> dict[str, int]:
    """Vector registers and how many of them are spilled, from the metadata in the assembly. Scalar registers are
    "spilled" to lanes of vector registers, which costs no memory."""
    found = {name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
    return {"registers": found["vgpr_count"], "spills": found["vgpr_spill_count"]}


def judge(expect: str | None, target: str, found: dict) -> str:
    """What is wrong with a build, or ""."""
    problems = []
    if found["spills"]:
        problems.append(f"spills {found['spills']}")
    if found["shared"] > SHARED[target]:
        problems.append(f"uses {found['shared']} bytes of shared memory, {target} has {SHARED[target]}")
    if expect and not found["instructions"]:
        problems.append("has no matrix instruction")
    elif expect == "wgmma" and target == "sm_90" and "wgmma" not in found["instructions"]:
        problems.append("has no wgmma")
    return "; ".join(problems)


def show(builds: Sequence[Build]) -> None:
    """One line for each file of kernels and architecture."""
    groups: dict[tuple[str, str], list[Build]] = {}
    for made in builds:
        groups.setdefault((made.module, made.target), []).append(made)
    rows = [
        {
            "module": module,
            "target": target,
            "cases": len(group),
            "registers": max(b.registers for b in group),
            "spills": sum(b.spills for b in group),
            "shared": f"{max(b.shared for b in group) / 1024:.0f} of {SHARED[target] >> 10} KiB",
            "instructions": ", ".join(sorted({b.instructions or "none" for b in group})),
            "problems": sum(bool(b.problem) for b in group),
        }
        for (module, target), group in groups.items()
    ]
    columns = ("module", "target", "cases", "registers", "spills", "shared", "instructions", "problems")
    sys.stdout.write(records.markdown(rows, columns))


if __name__ == "__main__":
    sys.exit(main())
