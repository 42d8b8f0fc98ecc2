"""Settings from the command line: a file, `--set key=value` and options, into one checked `WiseConfig`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from wise_fast.config import WiseConfig
from wise_fast.easyedit import config_from_hparams
from wise_fast.errors import ConfigError
from wise_fast.value_files import read_values

logger = logging.getLogger(__name__)

_PYTHON = {"True": True, "False": False, "None": None}


def build_config(file: Path | None, settings: Sequence[str], **options) -> WiseConfig:
    """The settings of `file`, then those of `settings` ("key=value"), then every option that is not None.

    The file is JSON, YAML, or EasyEdit's hyper-parameters of WISE; of these, what has no counterpart is logged.

    Raises:
        ConfigError: the file is no JSON object or YAML mapping, a setting is not "key=value", unknown or out of range.
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
    """The settings of a JSON or YAML file; EasyEdit's hyper-parameters, told by `alg_name`, as ours."""
    try:
        values = read_values(file)
        if "settings" in values:
            raise ConfigError(f"{file}: has 'settings', as files of `wise-fast run` do; give what is under it alone")
        if "alg_name" not in values:
            return values
        config, notes = config_from_hparams(values, str(file))
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None
    for note in notes:
        logger.warning("%s: %s", file, note)
    return config.to_dict()
