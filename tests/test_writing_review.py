"""Written rows that a person looks at: at the terminal, or in a spreadsheet."""

import pytest
from test_writing import PASSAGE

from qlora.console import UserError
from qlora.writing import review, selection
from qlora.writing.report import Files


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path / "rows.jsonl")


ROWS = [selection.as_row(f"Who steers ferry {n}?", "Ida Marsh", PASSAGE, "a.md") for n in range(4)]


def test_a_person_accepts_edits_drops_and_comes_back(files, monkeypatch, capsys):
    keys = iter(["a", "e", "Who is Wren's skipper?", "", "b", "x", "e", "", "Ida", "d", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(keys))
    review.review_rows(ROWS, files, "terminal")
    shown = capsys.readouterr().out
    assert "Her skipper, Ida Marsh, closes the gate" in shown and "4 of 4" in shown
    kept = review.apply(ROWS, review.read_decisions(files))
    assert [(row["instruction"], row["response"]) for row in kept] == [
        ("Who steers ferry 0?", "Ida Marsh"),
        ("Who steers ferry 1?", "Ida"),
        ("Who steers ferry 3?", "Ida Marsh"),
    ]
    keys = iter(["d"])
    review.review_rows(ROWS, files, "terminal")
    assert len(review.apply(ROWS, review.read_decisions(files))) == 2


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_table_goes_to_a_spreadsheet_and_back(files, tmp_path, delimiter):
    import csv

    table = tmp_path / "rows.csv"
    rows = [*ROWS, selection.as_row("=HYPERLINK(1)?", "Ida", PASSAGE, "a.md")]
    review.review_rows(rows, files, str(table))
    cells = list(csv.reader(table.read_text(encoding="utf-8-sig").splitlines()))
    assert cells[5][2].startswith("'=")
    cells[1][1], cells[2][3] = "drop", "the skipper"
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(cells)
    review.review_rows(rows, files, str(table))
    kept = review.apply(rows, review.read_decisions(files))
    assert [row["response"] for row in kept] == ["the skipper", "Ida Marsh", "Ida Marsh", "Ida"]
    assert kept[-1]["instruction"] == "=HYPERLINK(1)?"


def test_mistakes_in_a_table_are_reported_together(files, tmp_path):
    table = tmp_path / "rows.csv"
    known = review.row_id(ROWS[0])
    table.write_text(f"id,decision,question,answer\n{known},maybe,Who?,Ida\nnone,keep,Who?,Ida\n{known},keep,,Ida\n")
    with pytest.raises(UserError) as caught:
        review.review_rows(ROWS, files, str(table))
    assert [problem.where.rpartition(":")[2] for problem in caught.value.problems] == ["2", "3", "4"]
    assert not files.review.exists()
