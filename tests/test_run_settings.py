"""What a run is told: the plan of its batches, and files of options."""

import pytest

from wise_fast import run_settings
from wise_fast.errors import ConfigError
from wise_fast.lifelong import RunSettings
from wise_fast.run_settings import batches, parse_points, read_run_file
from wise_fast.tasks import TASKS


class TestPlan:
    def test_usual_points(self):
        assert RunSettings().points(1000) == (1, 10, 100, 300, 1000)
        assert RunSettings().points(40) == (1, 10, 40) and RunSettings().points(1) == (1,)
        assert RunSettings().points(20_000)[-4:] == (1000, 3000, 10_000, 20_000)
        assert RunSettings(evaluate_at=(7, 3, 99)).points(9) == (3, 7, 9)

    def test_batches_end_where_evaluations_are_due(self):
        assert list(batches(12, 4, (1, 10, 12))) == [(0, 1), (1, 5), (5, 9), (9, 10), (10, 12)]
        assert list(batches(3, 8, (3,))) == [(0, 3)]

    def test_parsing_points(self):
        assert parse_points("1, 10,100") == parse_points([1, 10, 100]) == (1, 10, 100) and parse_points(5) == (5,)
        for wrong in ("1;2", "", "0", [None], "ten"):
            with pytest.raises(ConfigError, match="evaluate_at"):
                parse_points(wrong)

    def test_tasks_are_those_that_can_be_scored(self):
        assert set(run_settings.TASKS) == set(TASKS)


class TestRunFile:
    def test_yaml_and_json_say_the_same(self, tmp_path):
        yaml, json_ = tmp_path / "run.yaml", tmp_path / "run.json"
        yaml.write_text("task: qa\nT: 300\nevaluate-at: [1, 10]\nout:\nsettings:\n  lr: 2.5\n")
        json_.write_text('{"task": "qa", "T": 300, "evaluate_at": [1, 10], "settings": {"lr": 2.5}}')
        assert read_run_file(yaml) == read_run_file(json_)

    def test_numbers_with_an_exponent(self, tmp_path):
        (tmp_path / "run.yaml").write_text("settings: {lr: 1e-3, weight_decay: .5e-2, layout: e3, stop: 1e}")
        found = read_run_file(tmp_path / "run.yaml")["settings"]
        assert found == {"lr": 0.001, "weight_decay": 0.005, "layout": "e3", "stop": "1e"}

    @pytest.mark.parametrize(
        "text, words",
        [
            ("tasks: qa", "did you mean 'task'"),
            ("lr: 3", "under 'settings'"),
            ("- qa", "named options"),
            ("task: [", "neither YAML nor JSON"),
            ("settings: fast", "settings by name"),
            ("out: 2026", "out is 2026, expected text"),
            ("", "named options"),
        ],
    )
    def test_errors(self, tmp_path, text, words):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_run_file(tmp_path / "run.yaml")

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_run_file(tmp_path / "none.yaml")
