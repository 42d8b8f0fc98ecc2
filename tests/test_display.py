"""Tables of the command line, and what JSON makes of values."""

import pytest

from wise_fast import display
from wise_fast.data import Edit
from wise_fast.state import EditReport
from wise_fast.terminal import plain


class TestDisplay:
    def test_long_lists_are_abridged_but_keep_failures(self):
        reports = [EditReport(Edit(f"p{i}", "t"), success=i != 90) for i in range(100)]
        table = display.edits_table(reports)
        assert table.row_count == 20 and "20 of 100" in table.caption
        assert "91" in list(table.columns[0].cells)

    def test_plain_values(self, tmp_path):
        value = {"a": float("nan"), "b": (1, True, None), "c": tmp_path, "d": {"e": float("inf")}}
        assert plain(value) == {"a": None, "b": [1, True, None], "c": str(tmp_path), "d": {"e": None}}

    def test_pack_table_shows_changed_settings_only(self):
        rows = [c.plain for c in display.pack_table("x", {"config": {"seed": 0, "lr": 3.0}}).columns[0].cells]
        assert rows == ["config.lr"]

    @pytest.mark.parametrize("value, text", [(None, "–"), (float("nan"), "–"), (0.12345, "0.123"), (12345.6, "12346")])
    def test_numbers(self, value, text):
        (cell,) = display.pairs_table("x", {"a": value}).columns[1].cells
        assert cell.plain == text

    def test_nested_pairs(self):
        table = display.pairs_table("x", {"a": {"b": 1}, "c": [{"d": 2}], "e": [], "f": None, "g": [1, 2]})
        names = [cell.plain for cell in table.columns[0].cells]
        assert names == ["a.b", "c[0].d", "e", "f", "g"]
