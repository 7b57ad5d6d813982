"""Rows: what is dropped, held out and shaped, and what is said about it."""

import json

import pytest
from conftest import SAMPLE, train

import instruct_train_qlora
from qlora.cli.training_flags import resolve_arguments
from qlora.console import Problems, UserError
from qlora.model.base_model import load_tokenizer
from qlora.prompt import Prompt, choose_prompt
from qlora.training.distractors import add_distractors
from qlora.training.examples import batch_groups, tokenize_rows
from qlora.training.held_out import name_documents, split_again
from qlora.training.row_filters import (
    TEMPLATE,
    Selection,
    drop_leaked,
    hold_out,
    is_extractive,
    keep_usable,
    read_selection,
    sample_rows,
)
from qlora.training.rows import Row, load_rows
from qlora.words import answer_span

ROWS = [Row(f"Question {n}?", f"answer{n}", f"Context with answer{n}.", "qa", f"doc{n // 3}.md") for n in range(30)]


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages_of(error) -> str:
    return "\n".join(map(str, error.value.problems))


# ------------------------------------------------------------------------------- select


def kept_by(rows, **selection) -> list[Row]:
    return keep_usable(rows, Selection(**selection))[0]


def reasons_of(rows, **selection) -> dict[str, int]:
    """Why rows are dropped; a row that is always kept is added, since none left is an error."""
    always = Row("Who?", "by Ann", "It is by Ann.", "kept", "kept.md")
    return dict(keep_usable([always, *rows], Selection(**selection))[1])


def test_rows_are_dropped_for_a_reason():
    rows = [*ROWS, ROWS[0], Row("", "x"), Row("x", ""), Row("Q", "A", category="other")]
    kept, dropped = keep_usable(rows, Selection(equal={"category": {"qa", ""}}))
    assert kept == ROWS
    assert dropped == {"duplicate": 1, "empty instruction": 1, "empty response": 1, "category not selected": 1}
    assert dropped.examples["category not selected"] == [{"instruction": "Q", "response": "A"}]
    with pytest.raises(UserError, match="no row is left"):
        keep_usable(ROWS, Selection(equal={"category": {"poem"}}))


def test_three_examples_of_a_reason_are_short_and_harmless():
    rows = [Row(f"Q{n}\n\x1b[31m " + "long " * 50, "A", category="other") for n in range(5)]
    _, dropped = keep_usable([*ROWS, *rows], Selection(unequal={"category": {"other"}}))
    assert dropped == {"category not selected": 5}
    shown = dropped.examples["category not selected"]
    assert [row["instruction"][:2] for row in shown] == ["Q0", "Q1", "Q2"]
    assert all(len(row["instruction"]) == 80 and row["instruction"].isprintable() for row in shown)


def test_values_and_numbers_of_words():
    rows = [Row("One?", "yes", "", "a"), Row("Two words?", "in the shed", "", "b"), Row("Three?", "in it", "", "c")]
    assert kept_by(rows, equal={"category": {"a", "c"}}) == [rows[0], rows[2]]
    assert kept_by(rows, unequal={"category": {"a", "c"}}) == [rows[1]]
    assert kept_by(rows, equal={"category": {"a", "b"}}, unequal={"category": {"b"}}) == [rows[0]]
    assert kept_by(rows, min_words={"response": 2}) == rows[1:]
    assert kept_by(rows, max_words={"response": 2}) == [rows[0], rows[2]]
    assert kept_by(rows, min_words={"response": 2, "instruction": 2}) == [rows[1]]
    assert reasons_of(rows, min_words={"response": 2}) == {"response shorter than 2 words": 1}
    assert reasons_of(rows, max_words={"response": 2}) == {"response longer than 2 words": 1}


def test_the_response_must_stand_in_the_context():
    context = "The ferry leaves at 19:30 from  the\nOld Pier. Dogs may come."
    for response in (
        "19:30",
        "the old pier.",
        "the old",
        "Yes, dogs may come.",
        "Yes",
        "I don't know.",
        "i don\u2019t know",
    ):
        assert is_extractive(response, context), response
    for response in ("9", "30", "at ten", "No, dogs stay", "pie"):
        assert not is_extractive(response, context), response
    assert is_extractive("anything", "")
    rows = [Row("When?", "at ten", context), Row("When?", "19:30", context)]
    assert kept_by(rows, extractive=True) == rows[1:] and kept_by(rows) == rows
    assert reasons_of(rows, extractive=True) == {"response not in context": 1}


def test_a_sample_depends_on_content_and_seed_and_keeps_the_order():
    sample = sample_rows(ROWS, 7, seed=4)
    assert len(sample) == 7 and sample == sorted(sample, key=ROWS.index)
    assert set(sample_rows(ROWS[::-1], 7, seed=4)) == set(sample) != set(sample_rows(ROWS, 7, seed=5))
    assert set(sample_rows(ROWS, 6, seed=4)) < set(sample)
    assert sample_rows(ROWS, 30, seed=4) == ROWS == sample_rows(ROWS, None, seed=4)
    kept, dropped = keep_usable([*ROWS, *ROWS], Selection(max_rows=7), seed=4)
    assert kept == sample and dropped == {"duplicate": 30, "over --max-rows": 23}
    assert len(dropped.examples["over --max-rows"]) == 3


def test_a_share_of_the_rows_may_refuse():
    refusing = [Row(f"What of {n}?", "I don't know.", f"Nothing of {n}.") for n in range(30)]
    kept, dropped = keep_usable([*ROWS, *refusing], Selection(refusal_share=0.25))
    assert [row for row in kept if row in ROWS] == ROWS and len(kept) == 40
    assert dropped == {"over --refusal-share": 20}
    assert keep_usable([*ROWS, *refusing], Selection(refusal_share=0.0))[0] == ROWS
    assert len(keep_usable([*ROWS, *refusing], Selection(refusal_share=1.0))[0]) == 60


def test_the_words_of_a_selection():
    problems = Problems()
    words = ["category=a, b", "category=c", "source!=x=y.md"]
    selection = read_selection(words, ["response=2"], ["response=9"], problems)
    assert not problems.found
    assert selection == Selection(
        {"category": {"a", "b", "c"}}, {"source": {"x=y.md"}}, {"response": 2}, {"response": 9}
    )
    read_selection(
        ["category", "subject=x", "a!b"], ["response=x", "title=3", "context=9"], ["context=3", "context"], problems
    )
    text = "\n".join(map(str, problems.found))
    for what in (
        "--filter category is not a filter",
        "--filter a!b is not a filter",
        "unknown column subject - --filter",
        "unknown column title - --min-words",
        "--min-words response=x is not valid - command line - write COLUMN=N, N a whole number of at least 1",
        "--max-words context is not valid",
        "--min-words context=9 is above --max-words context=3",
    ):
        assert what in text
    assert len(problems.found) == 7


# ------------------------------------------------------------------------------- hold out


def test_no_document_is_on_both_sides():
    training, held_out = hold_out(ROWS, 0.2, seed=1)
    assert sorted(training + held_out, key=ROWS.index) == ROWS
    assert not {row.document for row in training} & {row.document for row in held_out}
    assert 6 <= len(held_out) <= 9
    assert (training, held_out) == hold_out(ROWS, 0.2, seed=1)
    with pytest.raises(UserError, match="one document"):
        hold_out(ROWS[:3], 0.2, seed=1)


@pytest.mark.parametrize(
    ("sizes", "fewest", "most"),
    [([1000, *[1] * 20], 20, 20), ([22, 1, 1], 2, 2), ([12, 12], 12, 12), ([30, 20], 20, 20), ([9] * 11, 10, 18)],
)
def test_one_large_document_does_not_take_the_training_rows(sizes, fewest, most):
    rows = [Row(f"{d} {n}", "x", source=f"{d}.md") for d, size in enumerate(sizes) for n in range(size)]
    for seed in range(10):
        training, held_out = hold_out(rows, 0.1, seed)
        assert fewest <= len(held_out) <= most and len(training) + len(held_out) == len(rows)


def test_a_share_that_cannot_be_kept_is_told(tmp_path, tiny_base, capsys):
    rows = [{"instruction": f"{d} {n}?", "response": "yes", "source": f"{d}.md"} for d in "ab" for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--base-model", tiny_base, "--dataset", tmp_path / "rows.jsonl", "--output", tmp_path / "x"
    assert train(*words, "--dry-run") == 0
    assert "12 of 24 rows are held out (50%), not 10%" in capsys.readouterr().err


def test_leaked_rows_leave_training():
    held_out = [Row("Who signs form B7?", "Ann", "Ann signs B7. ", "", "a.md"), Row("Why?", "so", "", "", "b.md")]
    training = [
        Row("who signs the form, B7", "Bo", "Bo signs it.", "", "c.md"),
        Row("When is it signed?", "at ten", "ann   signs b7!", "", "d.md"),
        Row("Who signs form B8?", "Ann", "Ann signs B8.", "", "e.md"),
        Row("?", "no words", "", "", "f.md"),
    ]
    kept, dropped = drop_leaked(training, [*held_out, Row("!", "none", "", "", "g.md")])
    assert kept == training[2:]
    assert dropped == {"question also held out": 1, "context also held out": 1}
    assert dropped.examples["context also held out"] == [{"instruction": "When is it signed?", "response": "at ten"}]
    with pytest.raises(UserError, match="no training row is left"):
        drop_leaked(training[:2], held_out)


def test_a_task_for_any_text_is_no_leaked_question():
    rows = [Row("Summarise this.", f"s{n}", f"Text {n}.", "", f"{n}.md") for n in range(TEMPLATE)]
    assert drop_leaked(rows[1:], rows[:1]) == (rows[1:], {})
    assert len(drop_leaked([*rows[1:], rows[0]], rows[:1])[0]) == TEMPLATE - 1, "its context still leaks"
    with pytest.raises(UserError, match=f"{TEMPLATE - 2} question also held out"):
        drop_leaked(rows[2:], rows[:1])


def test_added_rows_are_all_trained_on_and_questions_of_an_evaluation_never(tmp_path):
    """Whatever the filters say of added rows, and wherever an excluded question stands."""
    known = [make_row(f"What is in drawer {n}?", "string", f"{n}.md") for n in range(8)]
    added = [make_row("What is in the blue box?", "rope", "3.md", "other"), make_row("Who keeps it?", "Ada", "9.md")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    (tmp_path / "added.jsonl").write_text("".join(json.dumps(row) + "\n" for row in added))
    asked = [{"question": "what is in drawer 5", "answers": ["string"]}, {"question": "Who keeps it?", "answers": []}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    words = ["--dataset", tmp_path / "rows.jsonl", "--added-rows", tmp_path / "added.jsonl"]
    words += ["--exclude", tmp_path / "asked.jsonl", "--filter", "category=closed_qa", "--preset", "laptop"]
    words += ["--eval-share", 0.5, "--output", tmp_path / "adapter"]
    args = resolve_arguments(list(map(str, words)), "", instruct_train_qlora.STEPS)
    rows, counts = instruct_train_qlora.load_and_filter(args)
    training, held_out = instruct_train_qlora.split_rows(args, rows, counts["added documents"])
    assert counts["dropped"]["question of --exclude"] == 1
    questions = [[row.instruction for row in part] for part in (training, held_out)]
    assert "What is in the blue box?" in questions[0] and not {"3.md", "9.md"} & {row.document for row in held_out}
    assert not {"What is in drawer 5?", "Who keeps it?"} & {*questions[0], *questions[1]} and len(rows) == 8
    run = {
        "arguments": instruct_train_qlora.jsonable(vars(args)),
        "dataset": {"held_out_documents": name_documents(held_out)},
    }
    assert {row.instruction for part in split_again(run, "x") for row in part} == {*questions[0], *questions[1]}
    (tmp_path / "asked.jsonl").unlink()
    with pytest.raises(UserError, match="question file not found"):
        resolve_arguments(list(map(str, words)), "", instruct_train_qlora.STEPS)


def make_row(question: str, answer: str, source: str, category: str = "closed_qa") -> dict:
    context = f"{question} It is {answer}."
    return {"instruction": question, "response": answer, "context": context, "category": category, "source": source}


# ------------------------------------------------------------------------------- shape


def shape(rows, count=2, gold_probability=1.0, seed=0) -> list[Row]:
    return add_distractors(rows, count, gold_probability, Prompt(), seed)


def test_distractors_never_hold_the_answer_and_the_citation_is_right():
    shaped = add_distractors(ROWS, 2, 0.8, Prompt(), seed=3)
    assert shaped == add_distractors(ROWS, 2, 0.8, Prompt(), seed=3)
    refused = 0
    for row, made in zip(ROWS, shaped, strict=True):
        assert 1 <= len(set(made.passages)) == len(made.passages) <= 3
        if made.response == Prompt().refusal:
            refused += 1
            assert row.context not in made.passages
            continue
        gold = made.passages.index(row.context)
        assert made.response == f"{row.response} [{gold + 1}]"
        assert sum(row.response + "." in passage for passage in made.passages) == 1
    assert 1 <= refused <= 14


def test_the_right_passage_mostly_comes_first_and_sometimes_elsewhere():
    places = [0, 0, 0]
    for seed in range(20):
        for row, made in zip(ROWS, shape(ROWS, seed=seed), strict=True):
            if len(made.passages) == 3:
                places[made.passages.index(row.context)] += 1
    assert 0.7 < places[0] / sum(places) < 0.95 and min(places) > 10


def others_of(rows: list[Row]) -> list[set[str]]:
    """What stood beside the context of the first row, for twenty seeds."""
    return [set(shape(rows, seed=seed)[0].passages) - {rows[0].context} for seed in range(20)]


def is_mostly(values) -> bool:
    values = list(values)
    return sum(values) > 0.75 * len(values)


def test_distractors_are_neighbours_and_questions_about_a_context_share_their_passages():
    """Three questions a context, nine contexts a document, three documents a folder."""
    names = [f"{folder}/{number}.md" for folder in ("ferry", "pay") for number in range(3)]
    rows = [
        Row(f"{name} {n} {m}?", f"{m}{n} of {name}", " ".join(f"{m}{n} of {name}" for m in "abc"), "", name)
        for name in names
        for n in range(9)
        for m in "abc"
    ]
    made = shape(rows)
    by_context = {row.context: {other.passages for other in made if other.context == row.context} for row in made}
    assert len(by_context) == 54 and all(len(shared) == 1 for shared in by_context.values())
    source_of = {row.context: row.source for row in rows}
    assert is_mostly(len({source_of[text] for text in row.passages}) == 1 for row in made)
    folders = [{source_of[text].partition("/")[0] for text in row.passages} for row in shape(rows, count=8)]
    assert is_mostly(len(found) == 1 for found in folders)
    assert {row.passages for row in made} != {row.passages for row in shape(rows, seed=1)}


def test_a_question_without_its_context_is_asked_with_passages_of_other_questions():
    rows = [Row(f"{n} {m}?", f"x{n}{m}", f"Text x{n}a x{n}b.", "", "a.md") for n in range(30) for m in "ab"]
    made = shape(rows, gold_probability=0.7)
    full = {row.passages for row in made if row.response != Prompt().refusal}
    refused = [row.passages in full for row in made if row.response == Prompt().refusal]
    assert 8 <= len(refused) <= 28 and is_mostly(refused)


def test_without_a_folder_the_subject_is_the_category():
    rows = [Row(f"{n}?", f"x{n}", f"Text x{n}.", "ab"[n % 2]) for n in range(42)]
    category_of = {row.context: row.category for row in rows}
    assert is_mostly(len({category_of[text] for text in row.passages}) == 1 for row in shape(rows))


def test_batches_keep_together_what_shares_passages():
    groups = [n // 5 for n in range(40)] + [9] * 20
    batches = batch_groups(groups, 8, seed=0)
    assert sorted(n for batch in batches for n in batch) == list(range(60))
    assert max(map(len, batches)) <= 8 and batches == batch_groups(groups, 8, seed=0) != batch_groups(groups, 8, seed=1)
    for group in range(8):
        assert sum(any(groups[n] == group for n in batch) for batch in batches) == 1
    assert [len(batch) for batch in batch_groups([0] * 16, 8, seed=0)] == [8, 8]


@pytest.mark.parametrize(
    ("answer", "holding", "harmless"),
    [
        ("9", "It leaves at 9.", "It leaves at 19, or 9.10, in 1890."),
        ("Yes, at the pier.", "They meet at  a PIER!", "They meet at piers."),
        ("No, 4,915", "It pays 4915.", "It pays 915 or 4."),
        ("red, or blue", "Red or blue.", "Blue, or red."),
        ("ab cd", "x ab\ncd y", "cab cde"),
        ("東京", "駅は東京にある。", "京東"),
    ],
)
def test_whole_words_decide_whether_a_distractor_holds_the_answer(answer, holding, harmless):
    rows = [
        Row("Which?", answer, f"Gold: {answer}", "", "a.md"),
        Row("Other?", "zebra", holding, "", "a.md"),
        Row("More?", "zebra", harmless, "", "a.md"),
    ]
    assert {harmless} in others_of(rows) and all(found <= {harmless} for found in others_of(rows))


def test_a_bare_yes_has_distractors():
    rows = [Row("May they?", "Yes.", "They may.", "", "a.md"), Row("Who?", "Ann", "Ann says yes.", "", "a.md")]
    assert {"Ann says yes."} in others_of(rows)


def test_a_refused_row_has_its_context_once_however_it_is_spaced():
    rows = [Row("Why?", "I don't know.", "Ann signs B7.", "", "a.md"), Row("How?", "so", "ann signs  B7", "", "a.md")]
    assert not any(others_of(rows))


def test_what_answers_a_refused_question_elsewhere_is_no_distractor():
    refused = Row("Who signs?", "I don't know", "Nobody is named here.", "", "a.md")
    rows = [refused, Row("who signs", "Ann", "Ann signs.", "", "a.md"), Row("When?", "noon", "At noon.", "", "a.md")]
    assert {"At noon."} in others_of(rows) and all(found <= {"At noon."} for found in others_of(rows))
    made = shape(rows, gold_probability=0.0)[0]
    assert refused.context in made.passages and made.response == Prompt().refusal


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    assert shape(ROWS[::-1], gold_probability=0.5)[::-1] == shape(ROWS, gold_probability=0.5)
    assert shape(ROWS, seed=1) != shape(ROWS, seed=2)


def test_an_old_citation_gives_way_to_the_right_one():
    rows = [Row("Who?", "Ann [7]", "Ann did."), Row("What is first?", "a[0]", "a[0] is first.")]
    assert [row.response for row in shape(rows, count=0)] == ["Ann [1]", "a[0] [1]"]
    assert answer_span("No, not here. [12]") == "not here" and answer_span("No [1]") == ""


def test_fifteen_thousand_rows_of_one_document_take_seconds():
    import time

    rows = [Row(f"Q{n}?", f"x{n}", f"Text of x{n}. " + "word " * 20, "", "one.md") for n in range(15_000)]
    started = time.process_time()
    assert {len(row.passages) for row in shape(rows)} == {1, 2, 3}
    assert time.process_time() - started < 15


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
