"""A stand-in for hypothesis where it is not installed, as on a machine with a GPU: what uses it is skipped, the rest of
the same file runs.
"""

import sys
import types

import pytest


class Anything:
    """Strategies, and whatever is made of them."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __or__(self, other):
        return self

    def __iter__(self):
        return iter(())


class Settings:
    """`@settings(...)`, which leaves the test as it is."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, test):
        return test

    @staticmethod
    def register_profile(*args, **kwargs):
        pass

    load_profile = register_profile


def given(*args, **kwargs):
    return pytest.mark.skip(reason="needs hypothesis")


def install():
    """Put the stand-in where `import hypothesis` finds it."""
    module = types.ModuleType("hypothesis")
    module.given, module.settings, module.example = given, Settings, Settings
    module.strategies = module.HealthCheck = module.assume = module.note = Anything()
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = module.strategies
