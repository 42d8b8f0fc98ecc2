"""Files of named values: JSON, or YAML by its suffix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from wise_fast.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe, and takes 1e-3 for a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """What a YAML document holds. yaml.YAMLError or ValueError where it is none."""
    return yaml.load(text, _Loader)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a JSON object, or of a YAML mapping where the name ends in .yaml or .yml.

    Raises:
        ConfigError: the file cannot be read, is not valid, or holds anything else.
    """
    kind, shape = ("YAML", "'name: value' lines") if is_yaml(path) else ("JSON", "an object of settings")
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_yaml(text) if is_yaml(path) else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid {kind} ({' '.join(str(error).split())}); expected {shape}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, expected {shape}")
    return values


def is_yaml(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in (".yaml", ".yml")
