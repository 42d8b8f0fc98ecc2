"""Settings from the command line: a file, `--set` and options."""

import pytest

from wise_fast.errors import ConfigError
from wise_fast.settings import build_config, parse_setting


class TestSettings:
    @pytest.mark.parametrize(
        "text, value",
        [
            ("max_steps=7", ("max_steps", 7)),
            ("lr = 0.5", ("lr", 0.5)),
            ("layout=element", ("layout", "element")),
            ("protect=False", ("protect", False)),
            ("protect=false", ("protect", False)),
            ("shard_size=None", ("shard_size", None)),
            ("stop=none", ("stop", "none")),
        ],
    )
    def test_value_is_json_or_text(self, text, value):
        assert parse_setting(text) == value

    def test_precedence(self, tmp_path):
        file = tmp_path / "config.json"
        file.write_text('{"max_steps": 5, "seed": 1, "lr": 2.0}')
        config = build_config(file, ["seed=2", "max_steps=6"], seed=3, layer=None)
        assert (config.max_steps, config.seed, config.lr, config.layer) == (6, 3, 2.0, None)

    @pytest.mark.parametrize("text", ["[1]", "{", None])
    def test_bad_file(self, tmp_path, text):
        file = tmp_path / "config.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match="config.json"):
            build_config(file, [])

    def test_a_file_of_a_run_is_not_one_of_settings(self, tmp_path):
        (tmp_path / "run.yaml").write_text("task: qa\nsettings: {lr: 2.0}\n")
        with pytest.raises(ConfigError, match="has 'settings', as files of `wise-fast run` do"):
            build_config(tmp_path / "run.yaml", [])

    def test_not_key_value(self):
        with pytest.raises(ConfigError, match="expected key=value"):
            parse_setting("max_steps")
