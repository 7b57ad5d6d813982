"""Rows: what is loaded, dropped, held out and shaped, and what is said about bad ones."""

import json

import pytest
from conftest import SAMPLE

from qlora.base_model import load_tokenizer
from qlora.console import UserError
from qlora.dataset import Row, add_distractors, answer_span, hold_out, keep_usable, load_rows, tokenize_rows
from qlora.prompt import Prompt, choose_prompt

ROWS = [Row(f"Question {n}?", f"answer{n}", f"Context with answer{n}.", "qa", f"doc{n // 3}.md") for n in range(30)]


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages_of(error) -> str:
    return "\n".join(map(str, error.value.problems))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    import datasets

    table = datasets.Dataset.from_list([{"instruction": "Who?", "response": "Ann", "context": "Ann did."}] * 2)
    path = tmp_path / f"rows{suffix}"
    {".csv": table.to_csv, ".parquet": table.to_parquet}.get(suffix, table.to_json)(str(path))
    assert load_rows(str(path)) == [Row("Who?", "Ann", "Ann did.")] * 2


def test_numbers_in_csv_are_text(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,response\nHow many?,27\nHow long?,3.50\n")
    assert [row.response for row in load_rows(str(tmp_path / "rows.csv"))] == ["27", "3.50"]


def test_columns_are_mapped_and_a_wrong_name_suggests_the_nearest(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Ann"}])
    assert load_rows(path, {"instruction": "question", "response": "answer"}) == [Row("Who?", "Ann")]
    with pytest.raises(UserError) as error:
        load_rows(path, {"instruction": "questoin"})
    assert "no column questoin" in messages_of(error) and "--columns instruction=question" in messages_of(error)
    assert "no column response" in messages_of(error), "both mistakes at once"


def test_bad_lines_are_named(tmp_path):
    good = {"instruction": "Who?", "response": "Ann"}
    path = write(tmp_path / "rows.jsonl", [good, "{oops\n", good, {"instruction": 7, "response": "x"}])
    with pytest.raises(UserError) as error:
        load_rows(path)
    assert "rows.jsonl:2" in messages_of(error) and "rows.jsonl:4" in messages_of(error)
    assert "instruction is no text but int" in messages_of(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "not found"),
        ("rows.xml", "<a/>", "unknown dataset type .xml"),
        ("rows.jsonl", "", "no rows"),
        ("rows.csv", "instruction,response\n", "no rows"),
        ("rows.json", '[{"instruction": 1, "response": "2"}]', "column instruction holds int64, not text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_rows(str(tmp_path / name))
    assert message in messages_of(error)


def test_rows_are_dropped_for_a_reason():
    rows = [*ROWS, ROWS[0], Row("", "x"), Row("x", ""), Row("Q", "A", category="other")]
    kept, dropped = keep_usable(rows, {"category": {"qa", ""}})
    assert kept == ROWS
    assert dropped == {"duplicate": 1, "empty instruction": 1, "empty response": 1, "category not selected": 1}
    with pytest.raises(UserError, match="no row is left"):
        keep_usable(ROWS, {"category": {"poem"}})


def test_no_document_is_on_both_sides():
    training, held_out = hold_out(ROWS, 0.2, seed=1)
    assert sorted(training + held_out, key=ROWS.index) == ROWS
    assert not {row.document for row in training} & {row.document for row in held_out}
    assert 6 <= len(held_out) <= 9
    assert (training, held_out) == hold_out(ROWS, 0.2, seed=1)
    with pytest.raises(UserError, match="one document"):
        hold_out(ROWS[:3], 0.2, seed=1)


def test_distractors_never_hold_the_answer_and_the_citation_is_right():
    shaped = add_distractors(ROWS, 2, 0.8, Prompt(), seed=3)
    assert shaped == add_distractors(ROWS, 2, 0.8, Prompt(), seed=3)
    refused = 0
    for row, made in zip(ROWS, shaped, strict=True):
        assert len(set(made.passages)) == len(made.passages)
        if made.response == Prompt().refusal:
            refused += 1
            assert row.context not in made.passages
            continue
        assert len(made.passages) == 3
        gold = made.passages.index(row.context)
        assert made.response == f"{row.response} [{gold + 1}]"
        assert sum(row.response + "." in passage for passage in made.passages) == 1
    assert 1 <= refused <= 14
    assert len({row.passages.index(o.context) for row, o in zip(shaped, ROWS, strict=True) if "[" in row.response}) == 3


def test_rows_without_context_stay_closed_book():
    assert add_distractors([Row("Say hi", "Hi"), *ROWS], 2, 0.8, Prompt(), 0)[0] == Row("Say hi", "Hi")


def test_too_long_rows_lose_passages_never_question_or_answer(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    choose_prompt(tokenizer)
    rows = add_distractors(load_rows(str(SAMPLE / "train.jsonl"))[:60], 2, 1.0, Prompt(), 0)
    examples, counts = tokenize_rows(tokenizer, Prompt(), rows, 400)
    assert counts["shortened"] > 10 and counts["too long"] == 0 and len(examples) == 60
    for row, example in zip(rows, examples, strict=True):
        text = tokenizer.decode(example.input_ids)
        assert len(example.input_ids) <= 400
        assert row.instruction in text and text.endswith(row.response + "</s>")
        if "[" in row.response:
            context = text.split("### Context:")[1].split("### Instruction:")[0]
            assert answer_span(row.response).lower() in context.lower()
    with pytest.raises(UserError, match="every row is too long"):
        tokenize_rows(tokenizer, Prompt(), rows, 20)


def test_the_gold_passage_is_shortened_last_even_when_the_answer_is_no_span_of_it(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    choose_prompt(tokenizer)
    rows = [Row("Why?", f"made up {n}", f"gold{n} " * 250, "", f"d{n}") for n in range(6)]
    for row in add_distractors(rows, 2, 1.0, Prompt(), 0):
        example = tokenize_rows(tokenizer, Prompt(), [row], 600)[0][0]
        name = row.context.split()[0]
        assert tokenizer.decode(example.input_ids).count(name) > 20
        assert example.input_ids[-1] == tokenizer.eos_token_id


def test_a_csv_of_another_encoding_is_told(tmp_path):
    (tmp_path / "rows.csv").write_bytes("instruction,response\nWo?,Köln\n".encode("cp1252"))
    with pytest.raises(UserError, match="unreadable dataset"):
        load_rows(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("instruction,response\nWhich code?,NA\nAnd then?,null\n")
    assert [row.response for row in load_rows(str(tmp_path / "rows.csv"))] == ["NA", "null"]
