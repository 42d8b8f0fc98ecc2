"""bench.gpu without a GPU: every case runs, arms are compared, and what a device would record is right."""

import logging

import pytest
import torch

from bench import gpu, records
from bench.gpu_banks import Place
from bench.gpu_cases import Built, Case, pair_of, serving
from bench.gpu_editing import editing
from bench.gpu_timing import Arm, Ceilings, Clock

CPU = torch.device("cpu")


def test_a_dry_run_calls_every_case_and_records_nothing(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    expected = len(list(serving())) + len(list(editing())) + 5
    assert f"{expected} cases called once, 0 left out for lack of time, 0 failed" in capsys.readouterr().out
    assert "no GPU here" in caplog.text and not list(tmp_path.iterdir())


def test_cases_have_names_of_their_own_and_ours_is_compared():
    cases = [*serving(), *editing()]
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    assert {case.op for case in cases} >= {"decode", "prefill", "norms", "route", "masked_update", "ties_merge"}
    assert {case.memories for case in cases if case.op == "norms"} == {1, 4, 16, 64}
    for case in cases:
        built = case.build(Place(CPU, full=False))
        assert {"plain", "ours"} <= set(built.arms) and built.moved > 0
        fused = case.op == "decode" and ", neuron, " in case.name
        assert ("fused" in built.arms) == fused and list(built.arms)[-1] == ("fused" if fused else "ours")
    wrong = {name: Arm(lambda: torch.ones(3)) for name in ("plain", "ours")} | {"fused": Arm(lambda: torch.zeros(3))}
    with pytest.raises(ValueError, match="away from plain"):
        gpu.compare(*pair_of(wrong)(), torch.float32)


@pytest.fixture
def run(tmp_path):
    made = gpu.Run(Place(CPU, full=False), Clock(CPU), tmp_path, ["test"])
    made.ceilings = Ceilings(1e12, {torch.bfloat16: 1e14, torch.float32: 1e13})
    return made


def built(moved=2e6, flops=1e9):
    arms = {name: Arm(lambda: None) for name in ("projection", "plain", "ours")}
    return Built(arms, moved, flops, lambda: (torch.ones(3), torch.ones(3)))


def case(build=None, op="decode"):
    return Case(op, "a case", 8, 1, torch.bfloat16, build or (lambda place: built()), target="<= 1.03x")


def test_figures(run, tmp_path):
    seconds = {"projection": [1e-5] * 3, "plain": [4e-5] * 3, "ours": [1.9e-5, 2e-5, 2.1e-5]}
    figures = run.figures(case(), built(), seconds)
    assert [f.arm for f in figures] == ["projection", "plain", "ours"]
    ours = figures[-1]
    assert ours.us == pytest.approx(20) and ours.ratio == pytest.approx(2) and ours.speedup == pytest.approx(2)
    assert ours.gbs == pytest.approx(100) and ours.tflops == pytest.approx(50)
    assert ours.bound_us == pytest.approx(10) and ours.share == pytest.approx(0.5)  # operations bound it, 1e9 / 1e14
    run.record(figures)
    (rows,) = [records.read(path) for path in tmp_path.iterdir()]
    assert [row["arm"] for row in rows] == ["projection", "plain", "ours"] and rows[-1]["target"] == "<= 1.03x"


def test_a_failed_case_costs_no_other(run):
    def broken(place):
        raise RuntimeError("no such kernel")

    def wrong(place):
        return Built(built().arms, 1.0, 1.0, lambda: (torch.ones(3), torch.zeros(3)))

    ran = []
    work = [(c.name, lambda share, c=c: gpu._measure(run, c, share)) for c in (case(broken), case(wrong))]
    run.each([*work, ("good", lambda share: ran.append(share) or [])], deadline=float("inf"))
    assert (run.failed, run.done) == (2, 1) and ran


def test_what_does_not_fit_is_left_out(run, caplog):
    caplog.set_level(logging.INFO)
    run.clock.flush = torch.zeros(1)  # as on a device
    run.each([("late", lambda share: pytest.fail("ran"))] * 3, deadline=0.0)
    assert run.skipped == 3 and "out of time: 3 cases left out, from late on" in caplog.text


@pytest.mark.parametrize("got", [torch.zeros(3), torch.full((3,), torch.nan), torch.ones(2)])
def test_arms_that_differ_are_an_error(got):
    gpu.compare(torch.ones(3), torch.ones(3) + 1e-4, torch.float32)
    with pytest.raises(ValueError, match="ours"):
        gpu.compare(torch.ones(3), got, torch.float32)
