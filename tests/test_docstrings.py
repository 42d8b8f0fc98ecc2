"""What is public says what it takes: `help(wise_fast)` and `help(wise_kernels)` are a reference by themselves."""

import inspect
import pydoc
import re

import pytest
from torch import nn

import wise_fast
import wise_kernels

PUBLIC = [(package, name) for package in (wise_fast, wise_kernels) for name in package.__all__]


def described(function, text):
    """Asserts that the text names every parameter."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    missing = [p.name for p in parameters if not re.search(rf"\b{p.name}\b", text)]
    assert not missing, (function, missing)


def methods(kind):
    """Public functions and properties of a class that torch does not define."""
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        own = not name.startswith("_") and not hasattr(nn.Module, name) and not hasattr(object, name)
        if own and isinstance(member, (classmethod, staticmethod)):
            yield member.__func__
        elif own and (inspect.isfunction(member) or isinstance(member, property)):
            yield member


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: value if isinstance(value, str) else "")
def test_public_names_say_what_they_take(package, name):
    thing = getattr(package, name)
    assert inspect.getdoc(thing)
    described(thing, thing.__doc__)
    if inspect.isclass(thing):
        for member in methods(thing):
            assert member.__doc__, (thing, member)
            if inspect.isfunction(member):
                described(member, member.__doc__)


@pytest.mark.parametrize("package", [wise_fast, wise_kernels])
def test_help_shows_every_public_name(package):
    shown = pydoc.plain(pydoc.render_doc(package))
    names = {re.sub(r"_element(_?)$", r"\1", name) for name in package.__all__}  # that of the other layout does both
    assert [name for name in names if not re.search(rf"\b{name}\b", package.__doc__)] == []
    assert all(f"class {name}" in shown or f"{name}(" in shown for name in package.__all__)
