"""The table of published runs: what is planned anew takes its row's place, the other rows keep their figures."""

from scripts import calibrate
from scripts.calibrate import MARKERS, ROWS, Line, cells, standing, table

ROOT = calibrate.ROOT


def test_rows_that_are_not_planned_keep_their_lines(monkeypatch):
    monkeypatch.setattr(calibrate.metadata, "version", lambda package: "1.2.3")
    old = {
        row: f"| {row} | v5p:2x2x1 | 10.00 | 11.00 | +10% | 9.00 | 1% | 1% | 1.0 | libtpu 0, then |" for row in ROWS[:3]
    }
    text = f"before\n{MARKERS[0]}\n\n{table(old)}\n\n{MARKERS[1]}\nafter"
    assert standing(text) == old
    new = cells(Line(ROWS[1], "v5p:2x2x1", 10.0, 13.0, 9.0, 0.5, 0.4, 2**30, 60.0))
    assert "+30%" in new and "libtpu 1.2.3" in new
    merged = table(standing(text) | {ROWS[1]: new}).splitlines()
    assert merged[2:5] == [old[ROWS[0]], new, old[ROWS[2]]]
    assert merged[-1] == "median error 10.0% of 3 rows, largest 30%."


def test_the_documented_table_is_read_whole():
    text = (ROOT / "docs" / "planning.md").read_text()
    found = standing(text)
    assert len(found) >= 8 and table(found) in text
