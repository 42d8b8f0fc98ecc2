"""Settings from the command line: a JSON file, `--set key=value` and options, into one checked `WiseConfig`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from wise_fast.config import WiseConfig
from wise_fast.errors import ConfigError

_PYTHON = {"True": True, "False": False, "None": None}


def build_config(file: Path | None, settings: Sequence[str], **options) -> WiseConfig:
    """The settings of `file`, then those of `settings` ("key=value"), then every option that is not None.

    Raises:
        ConfigError: the file is not a JSON object, a setting is not "key=value", unknown or out of range.
    """
    values = {} if file is None else _read(file)
    values |= dict(parse_setting(text) for text in settings)
    return WiseConfig.from_dict(values | {name: value for name, value in options.items() if value is not None})


def parse_setting(text: str) -> tuple[str, object]:
    """Split "key=value"; the value is JSON, or True, False or None, or else text."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name:
        raise ConfigError(f"--set {text!r}: expected key=value, such as --set max_steps=60")
    if value in _PYTHON:
        return name, _PYTHON[value]
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _read(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise ConfigError(f"--config {file}: not valid JSON ({error}); expected an object of settings") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file}: holds a {type(values).__name__}, expected an object of settings")
    return values
