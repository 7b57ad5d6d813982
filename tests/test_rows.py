"""Files of rows, in every type and shape that people have: what is read, and what is said about bad ones."""

import csv
import gzip
import io
import json

import pytest
from conftest import train

from qlora.console import UserError
from qlora.model.base_model import load_tokenizer
from qlora.prompt import choose_prompt
from qlora.training.examples import tokenize_rows
from qlora.training.row_files import read_records
from qlora.training.row_shapes import Row
from qlora.training.rows import load_rows

REFUSAL = "I don't know."
ASKED = {"instruction": "Who?", "response": "Ann", "context": "Ann did."}


def write(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def write_lines(path, *rows: dict) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def mistakes(path, **options) -> str:
    with pytest.raises(UserError) as error:
        load_rows(str(path), **options)
    return "\n".join(map(str, error.value.problems))


# ------------------------------------------------------------------------------- files


def as_csv(delimiter: str) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([ASKED.keys(), *([ASKED.values()] * 2)])
    return text.getvalue()


LINES = f"{json.dumps(ASKED)}\n" * 2
FILES = {
    "rows.jsonl": LINES,
    "ROWS.JSONL": LINES,
    "rows.ndjson": LINES,
    "windows.jsonl": LINES.replace("\n", "\r\n"),
    "blank lines.jsonl": LINES.replace("\n", "\n\n"),
    "list.json": json.dumps([ASKED] * 2, indent=2),
    "wrapped.json": json.dumps({"version": "1", "data": [ASKED] * 2}),
    "columns.json": json.dumps({name: [cell] * 2 for name, cell in ASKED.items()}),
    "lines.json": LINES,
    "rows.csv": as_csv(","),
    "semicolon.csv": as_csv(";"),
    "bar.csv": as_csv("|"),
    "tab.csv": as_csv("\t"),
    "rows.tsv": as_csv("\t"),
    "old macs.csv": as_csv(",").replace("\r\n", "\r"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FILES)
def test_every_file_type_gives_the_same_rows(tmp_path, name, encoding):
    path = write(tmp_path / name, FILES[name], encoding)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert load_rows(path) == load_rows(str(packed)) == [Row("Who?", "Ann", "Ann did.")] * 2


def test_parquet_saved_datasets_folders_and_globs_give_the_same_rows(tmp_path):
    import datasets

    table = datasets.Dataset.from_list([ASKED] * 2)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "other": table}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    for n in range(2):
        write_lines(tmp_path / "folder" / f"{n}.jsonl", ASKED)
    (tmp_path / "folder" / "notes.md").write_text("no rows")
    write_lines(tmp_path / "one.jsonl", ASKED)
    wanted = [Row("Who?", "Ann", "Ann did.")] * 2
    for source in ("rows.parquet", "saved", "splits", "folder", "folder/*.jsonl"):
        assert load_rows(str(tmp_path / source)) == wanted, source
    assert load_rows([str(tmp_path / "one.jsonl"), str(tmp_path / "folder" / "0.jsonl")]) == wanted
    assert load_rows(str(tmp_path / "splits"), split="other") == wanted
    assert "no split test" in mistakes(tmp_path / "splits", split="test")


def test_cells_are_read_as_they_are_written(tmp_path):
    separator = "one\u2028two"
    path = write(
        tmp_path / "rows.jsonl",
        '{"instruction": "When?", "response": "2024-01-05", "source": 7, "category": ["a", "b"]}\n'
        '{"instruction": "How much?", "response": 3.50, "source": null}\n'
        '{"instruction": "Is it?", "response": true, "context": "NA"}\n'
        f'{{"instruction": "{separator}", "response": 12345678901234567890}}\n',
    )
    assert load_rows(path) == [
        Row("When?", "2024-01-05", source="7", category="a, b"),
        Row("How much?", "3.50"),
        Row("Is it?", "true", "NA"),
        Row(separator, "12345678901234567890"),
    ]
    path = write(tmp_path / "rows.csv", "instruction,response,source\nHow long?,3.50,NA\nWhen?,2024-01-05,null\n")
    assert [(row.response, row.source) for row in load_rows(path)] == [("3.50", "NA"), ("2024-01-05", "null")]


def test_a_column_may_appear_late(tmp_path):
    rows = [{"instruction": f"Who {n}?", "response": "Ann" * 50} for n in range(80_000)]
    path = write_lines(tmp_path / "rows.jsonl", *rows, {**ASKED, "source": "late.md"})
    assert (tmp_path / "rows.jsonl").stat().st_size > 11e6 and load_rows(path)[-1].source == "late.md"


def test_white_space_around_a_response_goes_but_not_the_indent_of_code(tmp_path):
    for written, read in (
        ("    return 0\n", "    return 0"),
        ("\n\n\tx\n", "\tx"),
        (" 27 ", "27"),
        ("\u200b\ufeff \u2060", ""),
        ("a\u200bb", "a\u200bb"),
    ):
        path = write_lines(tmp_path / "rows.jsonl", {"instruction": " Q ", "response": written})
        assert load_rows(path) == [Row("Q", read)], repr(written)


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    import os

    for answer in ("Ann", "Bob"):
        path = write_lines(tmp_path / "rows.jsonl", {"instruction": "Who?", "response": answer})
        os.utime(path, (1e9, 1e9))
        assert load_rows(path) == [Row("Who?", answer)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.jsonl", None, "dataset file not found"),
        ("gone/*.jsonl", None, "dataset file not found"),
        ("rows.xml", b"<a/>", "unknown dataset type .xml"),
        ("rows.jsonl", b"", "the dataset has no rows"),
        ("rows.csv", b"instruction,response\n", "the dataset has no rows"),
        ("rows.csv", b"\ninstruction,response\nWho?,Ann\n", "the first line is empty - {path}:1"),
        ("rows.csv", b"instruction,response\nHello, who?,Ann\nWho?,Ann\n", "3 cells below 2 names - {path}:2"),
        ("rows.csv", b'instruction,response\n"a\nb",x\nWho?\n', "1 cells below 2 names - {path}:4"),
        ("rows.csv", b"instruction,response,response\nWho?,Ann,Bob\n", "the header names response twice - {path}:1"),
        ("rows.csv", b'instruction,response\nWho?,"Ann\n', "unreadable dataset (unexpected end of data) - {path}:2"),
        (
            "rows.csv",
            "instruction,response\nWo?,Köln\n".encode("cp1252"),
            "the file is not UTF-8 (byte 0xf6) - {path}:2",
        ),
        ("rows.jsonl", b'{"instruction": "Q", "response": "\\ud83d"}\n', "half a surrogate pair (\\ud83d) - {path}:1"),
        ("rows.jsonl", b'"text"\nnull\n', "not a JSON object - {path}:2"),
        ("rows.json", b'[{"instruction": "Q", "response": {"a": 1}}]', "response is not text but dict - {path}, row 1"),
        ("rows.json", b"[" * 100_000, "not JSON"),
        ("rows.jsonl", b'{"instruction": ' + b"[" * 900 + b"]" * 900 + b', "response": "x"}', "nested too deeply"),
        ("rows.parquet", b"PAR1 and more", "unreadable dataset"),
        ("rows.jsonl.gz", b"{}", "damaged gzip file"),
        ("rows.jsonl", b'{"text": "Once"}\n', "rows of plain text have no question"),
    ],
)
def test_bad_files_are_told_with_the_line(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert told.format(path=path) in mistakes(path)


def test_every_bad_line_is_named_up_to_five(tmp_path):
    path = write(tmp_path / "rows.jsonl", f"{json.dumps(ASKED)}\n" + "{oops\n" * 9)
    said = mistakes(path)
    assert said.count("not JSON") == 5 and f"{path}:2 " in said and f"{path}:6 " in said


def test_a_folder_without_rows_is_no_missing_file(tmp_path):
    assert "no file of rows in the folder" in mistakes(tmp_path)


# ------------------------------------------------------------------------------- shapes


def turns(*texts, keys=("role", "content"), roles=("user", "assistant")) -> list[dict]:
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}
SQUAD = {
    "title": "Harbour",
    "paragraphs": [
        {
            "context": "Ann did.",
            "qas": [
                {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann did"}]},
                {"question": "When?", "answers": [], "is_impossible": True},
            ],
        }
    ],
}
WITH_TURN = Row("And then?", "Bob", turns=(("Who?", "Ann"),))
SHAPES = {
    "Alpaca": ({"instruction": "Who?", "input": "Ann did.", "output": "Ann"}, Row("Who?", "Ann", "Ann did.")),
    "Alpaca without input": ({"instruction": "Who?", "input": "", "output": "Ann"}, Row("Who?", "Ann")),
    "question, answer": ({"Question": "Who?", "Answer": 7, "id": 3}, Row("Who?", "7")),
    "columns of lists": ({"question": ["Who?"], "answer": ["Ann", "Bob"]}, Row("Who?", "Ann")),
    "question, answers": (
        {"question": "Who?", "answers": ["Ann", "Ann did"], "context": "Ann did.", "title": "H"},
        Row("Who?", "Ann", "Ann did.", source="H"),
    ),
    "SQuAD of the hub": (
        {"question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}, "context": "Ann did."},
        Row("Who?", "Ann", "Ann did."),
    ),
    "no answer": ({"question": "Who?", "answers": {"text": []}}, Row("Who?", REFUSAL)),
    "prompt, completion": ({"prompt": "Who?", "completion": " Ann"}, Row("Who?", "Ann")),
    "prompt and completion of messages": (
        {"prompt": [SYSTEM, *turns("Who?")], "completion": turns("Ann", roles=("assistant",))},
        Row("Who?", "Ann"),
    ),
    "messages": ({"messages": [SYSTEM, *turns("Who?", "Ann", "And then?", "Bob")]}, WITH_TURN),
    "messages in parts": (
        {"messages": turns([{"type": "text", "text": "Who?"}], [{"type": "text", "text": "Ann"}])},
        Row("Who?", "Ann"),
    ),
    "messages with a passage": (
        {"messages": turns("Who?", "Ann"), "context": ["Ann did.", "Bob too."], "source": 4},
        Row("Who?", "Ann", "Ann did.\n\nBob too.", source="4"),
    ),
    "ShareGPT": (
        {"id": "x", "conversations": turns("Who?", "Ann", keys=("from", "value"), roles=("human", "gpt"))},
        Row("Who?", "Ann"),
    ),
}


KINDS = ("jsonl", "json", "csv", "parquet", "saved")


def write_kind(path, kind: str, cells: dict) -> str | None:
    """A dataset of the row, twice; None where the kind cannot hold it: lists in CSV."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    if kind == "csv" and any(isinstance(cell, list | dict) for cell in cells.values()):
        return None
    if kind == "saved":
        datasets.Dataset.from_list([cells] * 2).save_to_disk(str(path))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([cells] * 2), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([cells.keys(), *([cells.values()] * 2)])
    else:
        write(path, f"{json.dumps(cells)}\n" * 2 if kind == "jsonl" else json.dumps([cells] * 2))
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_that_people_have_are_recognised(tmp_path, name, kind, capsys):
    cells, row = SHAPES[name]
    path = write_kind(tmp_path / f"rows.{kind}", kind, cells)
    if path:
        assert load_rows(path) == [row] * 2
        assert "rows in the shape of" in capsys.readouterr().err


def test_the_table_of_shapes_and_files_is_that_of_the_tests(tmp_path, check_table):
    names = ["`.jsonl`", "`.json`", "`.csv`", "`.parquet`", "`save_to_disk`"]
    table = [["Shape", "Columns", *names, "Row"]]
    for name, (cells, row) in SHAPES.items():
        written = [write_kind(tmp_path / f"{len(table)}.{kind}", kind, cells) for kind in KINDS]
        read = ["" if not path else "yes" if load_rows(path) == [row] * 2 else "no" for path in written]
        parts = [f"{row.instruction} {row.response}", *(["context"] if row.context else [])]
        parts += [f"source {row.source}"] * bool(row.source) + ["an earlier turn"] * bool(row.turns)
        table.append([name, ", ".join(f"`{column}`" for column in cells), *read, ", ".join(parts)])
    check_table("shapes", table)


def test_squad_s_own_file_is_read(tmp_path):
    path = write(tmp_path / "train-v2.0.json", json.dumps({"version": "v2.0", "data": [SQUAD]}))
    found = [
        Row("Who?", "Ann", "Ann did.", source="Harbour"),
        Row("When?", "I don't know.", "Ann did.", source="Harbour"),
    ]
    assert load_rows(path) == found
    broken = {"data": [{"paragraphs": [{"qas": 1}]}]}
    assert "not an article of SQuAD" in mistakes(write(tmp_path / "rows.json", json.dumps(broken)))


def test_what_is_left_out_is_said(tmp_path, capsys):
    alpaca = write_lines(tmp_path / "alpaca.jsonl", *[SHAPES["Alpaca"][0] | {"id": 1}] * 2)
    assert load_rows(alpaca, {"response": "output"}) == [Row("Who?", "Ann")] * 2
    assert "columns not used: input, id" in capsys.readouterr().err
    chat = write_lines(tmp_path / "chat.jsonl", SHAPES["messages"][0], {"messages": turns("Who?", "Ann")})
    load_rows(chat)
    assert "1 system messages are left out" in capsys.readouterr().err
    load_rows(write_lines(tmp_path / "rows.jsonl", ASKED))
    assert not capsys.readouterr().err


def test_each_answer_of_a_conversation_may_be_a_row(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", SHAPES["messages"][0])
    assert load_rows(path, train_on="all") == [Row("Who?", "Ann"), WITH_TURN]
    assert len({row.document for row in load_rows(path, train_on="all")}) == 1  # held out together


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (turns("Who?"), "the conversation ends with the user"),
        (turns("Who?", "Ann", "And?"), "the conversation ends with the user"),
        (turns("Ann", "Who?", roles=("assistant", "user")), "roles out of order (assistant, user)"),
        (turns("Who?", "And?", roles=("user", "user")), "roles out of order (user, user)"),
        (turns("Who?", " \u200b"), "an empty turn"),
        ([], "roles out of order (nobody)"),
        ([{"role": "tool", "content": "x"}], "unknown role tool"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts that are not text"),
        ([{"role": "user", "content": {"a": 1}}], "a turn is not text"),
        (["Who?"], "a turn is not an object but str"),
        ([{"role": ["user"], "content": "Who?"}], "unknown role"),
        ("Who?", "a row of another shape"),
    ],
)
def test_a_bad_conversation_is_told_with_its_row(tmp_path, messages, told):
    path = write_lines(tmp_path / "rows.jsonl", {"messages": turns("Who?", "Ann")}, {"messages": messages})
    said = mistakes(path)
    assert told in said and f"{path}:2" in said


def test_two_shapes_in_one_dataset_are_told(tmp_path):
    for other in (SHAPES["Alpaca"][0], SHAPES["messages"][0]):
        path = write_lines(tmp_path / "rows.jsonl", ASKED, other)
        said = mistakes(path)
        assert "a row of another shape" in said and f"{path}:2" in said
    assert load_rows(write_lines(tmp_path / "rows.jsonl", ASKED, {"instruction": "Who?"}))[1].response == ""


def test_columns_are_mapped_and_a_wrong_name_suggests_the_nearest(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"query": "Who?", "reply": "Ann"})
    assert load_rows(path, {"instruction": "query", "response": "reply"}) == [Row("Who?", "Ann")]
    said = mistakes(path, columns={"instruction": "qurey"})
    assert "no column qurey" in said and "--columns instruction=query" in said
    assert "no column response" in said, "both mistakes at once"


# ------------------------------------------------------------------------------- from the file to tokens


def test_earlier_turns_stand_before_the_passages_and_are_shortened_first(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    prompt = choose_prompt(tokenizer)
    long = tuple((f"old question {n} " * 9, f"old answer {n} " * 9) for n in range(4))
    row = Row("Who?", "Ann", "Ann did. " * 40, passages=("Ann did. " * 40,), turns=long)
    [whole], _ = tokenize_rows(tokenizer, prompt, [row], 4000)
    text = tokenizer.decode(whole.input_ids)
    assert text.index("old question 0") < text.index("old answer 3") < text.index("### Context") < text.index("Who?")
    assert tokenizer.decode(whole.response_ids, skip_special_tokens=True) == "Ann"
    [cut], counts = tokenize_rows(tokenizer, prompt, [row], len(whole.input_ids) - 20)
    shorter = tokenizer.decode(cut.input_ids)
    assert "old question 0" not in shorter and "old answer 3" in shorter and counts["shortened"] == 1
    assert shorter.count("Ann did.") == text.count("Ann did.")
    [least], _ = tokenize_rows(tokenizer, prompt, [row], 150)
    shortest = tokenizer.decode(least.input_ids)
    assert "old question" not in shortest and 0 < shortest.count("Ann did.") < 40


def test_a_conversation_is_trained_end_to_end(tiny_base, tmp_path, capsys):
    rows = [{"messages": [SYSTEM, *turns(f"Who {n}?", "Ann", f"And {n}?", f"Bob {n}")]} for n in range(12)]
    path = write_lines(tmp_path / "chat.jsonl", *rows)
    words = "--base-model", tiny_base, "--dataset", path, "--distractors", 0, "--train-on", "all", "--dry-run"
    assert train(*words, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "24 rows read, 24 usable" in said and "rows in the shape of conversations" in said
    assert train(*words, "--output", tmp_path / "out", "--train-on", "some") == 2
    assert "--train-on" in capsys.readouterr().err


def test_records_know_where_they_are(tmp_path):
    path = write(tmp_path / "rows.csv", 'instruction,response\n"two\nlines",x\n\nWho?,Ann\n')
    assert [record.where for record in read_records(path)] == [f"{path}:2", f"{path}:5"]
    assert load_rows(path)[0].instruction == "two\nlines"
