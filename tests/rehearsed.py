"""What tests of rehearsals share."""

import pytest

from tests.edited import FACTS
from wise_fast import rehearsal

PROMPTS = [fact.prompt for fact in FACTS]
TARGETS = [fact.target for fact in FACTS]


@pytest.fixture(autouse=True)
def few_together(monkeypatch):
    """The four edits of these tests take two steps a pass, and no more passes than they ask for."""
    monkeypatch.setattr(rehearsal, "_TOGETHER", 2)
    monkeypatch.setattr(rehearsal, "_ROUNDS", 1)
