"""The benchmark's machinery on a tiny model: every section yields sound rows. Nothing here asserts a time."""

import json
import math
import mmap
from dataclasses import asdict

import pytest
import torch

from bench import dense, distributed, measure, memory, quality, records, run, serving
from bench.records import ROW_COLUMNS, Row
from tests.tiny import tiny_model, tiny_tokenizer
from wise_fast import WiseConfig, WiseEditor
from wise_fast.data import Edit, demo_edits
from wise_fast.errors import WiseError

QUICK = ["--limit", "3", "--set", "max_steps=2", "--set", "prefixes=1"]
TINY = [*QUICK, "--baseline-steps", "2", "--rounds", "2", "--sizes", "1x4,2x6", "--decode", "4x2"]
PLACE = {name: "here" for name in records.ENVIRONMENT_COLUMNS}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def setting() -> measure.Setting:
    config = WiseConfig(max_steps=2, prefixes=1)
    sizes = dict(rounds=1, sizes=((2, 4),), decode=(3, 2), decode_batches=(2,))
    return measure.Setting(tiny_model("gpt2"), tiny_tokenizer(), demo_edits()[:3], config, **sizes)


def sound(rows: list[dict]) -> None:
    """Rows have every column, finite figures, and positive ones where 0 has no meaning."""
    for row in rows:
        assert set(row) == {*records.ENVIRONMENT_COLUMNS, *ROW_COLUMNS}
        figures = [v for v in row.values() if isinstance(v, (int, float))]
        assert all(math.isfinite(v) for v in figures)
        assert row["value"] >= 0 and (row["value"] > 0 or row["unit"] in ("share", "MB"))
        assert row["p20"] is None or row["p20"] <= row["p50"] <= row["p80"]
        assert row["ratio"] is None or row["ratio"] >= 0


def only(capsys, source, tmp_path, section, *more) -> list[dict]:
    run.main(["--model", source, "--only", section, "--out", str(tmp_path), "--json", *TINY, *more])
    rows = json.loads(capsys.readouterr().out)
    sound(rows)
    assert {row["op"] for row in rows} == {section}
    assert len(records.read(tmp_path / f"{section}.csv")) == len(rows)
    return rows


def value(rows, metric, case="") -> float:
    return next(row["value"] for row in rows if row["metric"].startswith(metric) and case in row["case"])


def test_editing_puts_ours_beside_the_baseline(capsys, source, tmp_path):
    rows = only(capsys, source, tmp_path, "editing")
    baseline = next(r for r in rows if r["metric"] == "time per edit" and "baseline" in r["case"])
    assert "extrapolated" in baseline["case"] and "2 steps run" in baseline["case"]
    assert baseline["value"] == pytest.approx(measure.PAPER_STEPS * value(rows, "time per step", "baseline"))
    for case in ("one at a time", "batches of 3"):
        ours = next(r for r in rows if r["metric"] == "time per edit" and case in r["case"])
        assert ours["ratio"] == pytest.approx(ours["value"] / baseline["value"])
        assert value(rows, "speed-up", case) == pytest.approx(1 / ours["ratio"])


def test_editing_without_the_baseline_has_no_ratios(capsys, source, tmp_path):
    rows = only(capsys, source, tmp_path, "editing", "--baseline-edits", "0")
    assert all(row["ratio"] is None and "baseline" not in row["case"] for row in rows)


def test_serving_compares_every_arm_with_the_unedited_model(capsys, source, tmp_path):
    rows = only(capsys, source, tmp_path, "serving", "--set", "shard_size=2")
    for case in ("prefill 1 x 4", "prefill 2 x 6", "decode 2 tokens after 4, batch 1", "batch 8"):
        times = {r["case"]: r for r in rows if case in r["case"] and r["metric"].startswith("time per")}
        reference = next(r for name, r in times.items() if name.endswith(": unedited"))
        assert len(times) == 5 and reference["ratio"] == 1
        assert all(r["ratio"] == pytest.approx(r["value"] / reference["value"]) for r in times.values())


def test_serving_leaves_the_model_and_the_memories_as_they_were(setting):
    before = setting.model(torch.arange(6)[None]).logits
    editor = setting.filled()
    thresholds = editor.projection.thresholds.clone()
    assert list(serving.measure(setting, lambda _: None))
    assert torch.equal(setting.model(torch.arange(6)[None]).logits, before)
    assert torch.equal(editor.projection.thresholds, thresholds)


def test_what_was_measured_before_an_interrupt_is_recorded(source, tmp_path, monkeypatch):
    def interrupted(_setting, _log):
        yield Row("storage", "c", "m", 1.0, "MB")
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "storage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--model", source, "--only", "storage", "--out", str(tmp_path)])
    assert len(records.read(tmp_path / "storage.csv")) == 1


def test_an_arm_refuses_to_be_timed_in_the_wrong_scope(setting):
    editor = setting.filled()
    ids = serving.unrelated_tokens(setting, 2, 4)
    arm = serving._arm(editor.model, ids, 0)
    everything = torch.full_like(editor.projection.thresholds, 1e-20)
    with torch.no_grad():
        assert serving._scoped(editor, everything, arm, inside=True)() > 0
        with pytest.raises(RuntimeError, match="2 of 2 sequences were in scope, expected 0"):
            serving._scoped(editor, everything, arm, inside=False)()


def test_memory_puts_ours_beside_the_baseline(capsys, source, tmp_path, monkeypatch):
    # Both in this process: another one spends seconds on imports, and the next test starts one.
    monkeypatch.setattr(memory, "_subprocess", probed)
    rows = only(capsys, source, tmp_path, "memory")
    for side in ("ours", "baseline"):
        parts = value(rows, "load: peak", side), value(rows, "one edit", side)
        assert value(rows, "load and one edit: peak", side) == pytest.approx(max(parts))
        assert value(rows, "load and one edit: the process", side) > 0
    weights = sum(p.nbytes for p in tiny_model("llama").parameters()) / 1e6
    assert value(rows, "the loaded model's weights") == pytest.approx(weights)


def probed(side, source, edit, config, *more) -> dict:
    return memory.probe(side, source, edit.to_dict(), config.to_dict(), *more)


def test_a_memory_probe_runs_in_a_process_of_its_own(source):
    ballast = torch.ones(100_000_000)  # 400 MB here must not count there
    config = WiseConfig(max_steps=1, prefixes=1)
    found = memory._subprocess("ours", source, demo_edits()[0], config, 1, "auto")
    assert found["weights"] > 0 and found["above"] >= found["edit_above"] >= 0
    if found["exact"]:
        assert found["above"] < ballast.nbytes


def test_a_failed_probe_says_why(source, monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(WiseError, match="memory probe of baseline failed"):
        memory.measure(source, [Edit("a", "b")], WiseConfig(), 1, lambda _: None)


def test_the_high_water_mark_follows_an_allocation_and_is_reset():
    exact = memory.reset_peak()
    before = memory.peak()
    if not exact:
        assert before > 0  # the mark of a whole life: nothing that this test allocates need reach it
        return
    size = 64_000_000
    with mmap.mmap(-1, size) as pages:  # new pages: malloc may hand out a freed block that is resident already
        pages.write(b"1" * size)
        assert memory.peak() >= before + 0.9 * size
    memory.reset_peak()
    assert memory.peak() < before + 0.5 * size


def test_storage_is_measured_against_one_dense_copy(capsys, source, tmp_path):
    rows = only(capsys, source, tmp_path, "storage", "--set", "shard_size=2")
    dense = value(rows, "one dense copy")
    assert dense == pytest.approx(32 * 64 * 4 / 1e6)
    assert value(rows, "memories served") == 2
    assert all(row["ratio"] in (None, pytest.approx(row["value"] / dense)) for row in rows)


def test_quality_scores_and_restores(capsys, source, tmp_path):
    arguments = ["--model", source, *QUICK, "--offset", "1", "--shard-size", "2", "--seeds", "0,1", "--no-generate"]
    quality.main([*arguments, "--out", str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in rows] == ["0", "1", "mean of 0,1"]
    assert all(set(row) == set(quality.COLUMNS) for row in rows)
    for row in rows:
        assert all(0 <= row[name] <= 1 for name in ("reliability", "generalization", "locality"))
        assert row["exact"] is None and row["memories"] == 2 and row["count"] == 3 and row["seconds_per_edit"] > 0
        assert json.loads(row["settings"]) == {"max_steps": 2, "prefixes": 1, "shard_size": 2}
    read = records.read(tmp_path / "quality.csv")
    assert [row["seed"] for row in read] == ["0", "1", "mean of 0,1"]
    assert rows[2]["reliability"] == pytest.approx((rows[0]["reliability"] + rows[1]["reliability"]) / 2)


def test_folded_edits_beside_routed_ones(capsys, source, tmp_path, little_to_read):
    arguments = ["--model", source, *QUICK, "--set", "shard_size=2", "--out", str(tmp_path), "--json"]
    dense.main(arguments)
    rows = json.loads(capsys.readouterr().out)
    sound(rows)
    assert {row["case"] for row in rows} == {f"3 edits, 2 memories, {way}" for way in ("routed", "ties", "sum")}
    assert all(row["ratio"] in (None, 1.0) for row in rows if "routed" in row["case"])
    assert value(rows, "perplexity_after", "ties") != value(rows, "perplexity_after", "sum")
    assert len(records.read(tmp_path / "dense.csv")) == len(rows)


def test_processes_take_turns_and_must_agree(capsys, tmp_path, monkeypatch):
    def timed(options, count, edits, out):
        digest = "same" if options.limit > 1 else str(count)
        return {"wall_seconds": 8 / count, "digest": digest, "shards": 2}, 10.0

    monkeypatch.setattr(distributed, "timed", timed)
    distributed.main(["--rounds", "2", "--out", str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["value"] for row in rows] == [8, 10, 1, 4, 10, 2] and rows[3]["ratio"] == 0.5
    assert len(records.read(tmp_path / "distributed.csv")) == len(rows)
    with pytest.raises(SystemExit, match="changes what comes out"):
        distributed.main(["--limit", "1", "--out", str(tmp_path)])


def test_a_quality_run_with_generation_has_exact_matches(setting):
    editor = WiseEditor(setting.model, setting.tokenizer, setting.config)
    found = quality.score(editor, setting.edits[:1])
    assert 0 <= found["exact"] <= 1 and 0 <= found["exact_rephrased"] <= 1


def test_twins_share_weights_and_nothing_else(setting):
    copied = measure.twin(setting.model)
    same = zip(copied.parameters(), setting.model.parameters(), strict=True)
    assert all(a is b for a, b in same)
    modules = zip(copied.modules(), setting.model.modules(), strict=True)
    assert all(a is not b for a, b in modules)


def test_arms_alternate_and_warm_up_is_dropped():
    calls = []
    arms = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    seconds = measure.alternate(arms, rounds=3, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and {r[0] for r in rounds} == {"a", "b", "c"}


def test_records_survive_a_round_trip(tmp_path):
    rows = [
        records.spread("editing", "a, b", 'quoted "x"', [3.0, 1.0, 2.0], "s", 4.0),
        Row("serving", "c", "d", 1, "x"),
    ]
    made = records.record(rows, PLACE, tmp_path)
    records.record(rows[:1], PLACE, tmp_path)
    assert records.read(tmp_path / "editing.csv") == [made[0], made[0]]
    assert records.read(tmp_path / "serving.csv") == [made[1]]
    assert (rows[0].value, rows[0].ratio, rows[0].p20, rows[0].p80) == pytest.approx((2, 0.5, 1.4, 2.6))


def test_a_commit_that_looks_like_a_number_stays_text(tmp_path):
    records.record([Row("editing", "c", "m", 1.0, "s")], PLACE | {"commit": "6e12345"}, tmp_path)
    assert records.read(tmp_path / "editing.csv")[0]["commit"] == "6e12345"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_are_not_recorded(tmp_path, bad):
    with pytest.raises(ValueError, match="not finite"):
        records.record([Row("editing", "c", "m", bad, "s")], PLACE, tmp_path)
    assert not (tmp_path / "editing.csv").exists()


def test_files_of_other_columns_are_left_alone(tmp_path):
    (tmp_path / "editing.csv").write_text("date,figure\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        records.record([Row("editing", "c", "m", 1.0, "s")], PLACE, tmp_path)
    assert (tmp_path / "editing.csv").read_text() == "date,figure\n1,2\n"


def test_the_environment_is_complete():
    found = records.environment("demo", "cpu", ["python", "-m", "bench.run", "--set", "a=b c"])
    assert set(found) == set(records.ENVIRONMENT_COLUMNS)
    assert found["torch"] and found["commit"] and found["command"].endswith("'a=b c'")


def test_the_latest_run_of_a_file_is_shown(capsys, tmp_path):
    for date, case in (("1 May", "old one"), ("2 May", "new one")):
        records.record([Row("editing", case, "m", 1.0, "s")], PLACE | {"date": date, "threads": 2}, tmp_path)
    records.main([str(tmp_path / "editing.csv")])
    shown = capsys.readouterr().out
    assert "new one" in shown and "old one" not in shown and "| case" in shown
    assert all(line == line.rstrip() and line for line in shown.splitlines())


def test_tables_hold_long_and_bracketed_text(capsys):
    row = asdict(Row("serving", "[1 x 2] " + "long " * 60, "m", 0.123456, "s"))
    records.show([row], ["case", "value"])
    assert row["case"].strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--only", "speed"], ["--sizes", "1x"], ["--sizes", "0x4"], ["--limit", "0"], ["--baseline-edits", "-1"]],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_bad_settings_end_with_one_line(source):
    with pytest.raises(SystemExit, match="^error: unknown setting 'max_step'"):
        run.main(["--model", source, "--set", "max_step=3"])


def test_a_copied_tree_says_its_commit(monkeypatch):
    monkeypatch.setenv("WISE_FAST_COMMIT", "abc1234")
    assert records.commit() == "abc1234"
