"""What people say of answers: kept, listed, made into rows and questions, deleted."""

import json
from dataclasses import replace

import pytest
from conftest import SAMPLE, rag
from langchain_core.documents import Document

from qlora.answering.chat_session import Session
from qlora.answering.citations import check_answer
from qlora.answering.conversation import Turn
from qlora.answering.judging import ask_judgement, judge
from qlora.console import UserError
from qlora.retrieval.database import MIGRATIONS, Database
from qlora.retrieval.feedback import FeedbackLog, Judgement
from qlora.writing import feedback_rows
from qlora.writing.feedback_rows import make_rows

REFUSAL = "I don't know."
FORMS = {"id": "1", "source": "forms.md", "text": "The bosun signs form B7. Form B9 is green."}
FEES = {"id": "2", "source": "fees.md", "text": "A berth costs nine crowns, paid on Friday at 14:30."}


def said(question="Who signs form B7?", answer="The cook [1]", **what) -> Judgement:
    return Judgement(question, answer, passages=(FEES, FORMS), **what)


def make(*judgements, found=()):
    """The rows and questions together, and the reasons of what is for review."""
    documents = [Document(one["text"], metadata={"source": one["source"]}, id=one["id"]) for one in found]
    numbered = [replace(one, id=n) for n, one in enumerate(judgements, 1)]
    made = make_rows(numbered, lambda question, k: documents[:k], REFUSAL)
    rows = [(row["instruction"], row["response"], row["source"]) for row in made.rows]
    asked = [(one["question"], (one["answers"] or [REFUSAL])[0], one["source"]) for one in made.questions]
    return [*rows, *asked], [one["reason"] for one in made.review]


# ------------------------------------------------------------------------------- rows


def test_a_correction_is_about_the_passage_that_holds_it():
    assert make(said(right_answer="the bosun")) == ([("Who signs form B7?", "the bosun", "forms.md")], [])
    elsewhere = {"id": "9", "source": "crew.md", "text": "Form B7 is signed by the purser, Odile Tench."}
    one = said(right_answer="Odile Tench")
    assert make(one, found=[elsewhere])[0] == [("Who signs form B7?", "Odile Tench", "crew.md")]
    assert make(one) == ([], [feedback_rows.NOT_THERE])


def test_not_in_the_documents_is_a_row_that_refuses():
    rows, review = make(said(not_in_documents=True))
    assert rows == [("Who signs form B7?", REFUSAL, "fees.md")] and not review
    assert make(Judgement("Who?", not_in_documents=True)) == ([], [feedback_rows.NO_PASSAGE])


def test_what_was_called_right_is_a_row_only_where_a_passage_supports_it():
    assert make(said(answer="The bosun signs it [2]", rating="good"))[0][0][1:] == ("The bosun signs it", "forms.md")
    assert make(said(rating="good")) == ([], [feedback_rows.UNSUPPORTED])
    clicked = said(answer="the bosun [1]", rating="good", right_passage="2")
    assert make(clicked) == ([], [feedback_rows.NOT_THERE])  # not in the passage that was clicked
    assert make(said(answer=REFUSAL, rating="good"))[0] == [("Who signs form B7?", REFUSAL, "fees.md")]
    assert make(said()) == ([], [feedback_rows.NOBODY_SAID])


def test_the_same_counts_once_and_contradictions_are_listed():
    twice = said(right_answer="The bosun"), said("who signs form b7", right_answer="the bosun.")
    rows, review = make(*twice)
    assert len(rows) == 1 and review == ["says the same as judgement 1"]
    rows, review = make(*twice, said(not_in_documents=True), said("What colour is B9?", right_answer="green"))
    assert [question for question, *_ in rows] == ["What colour is B9?"]
    assert review == ["judgements 1, 2, 3 contradict each other"] * 3


def test_a_question_keeps_its_side_whoever_asks_it_and_however_it_is_written():
    sides = [feedback_rows.is_question(f"What is the number of berth {n}?") for n in range(400)]
    assert 160 < sum(sides) < 240
    assert feedback_rows.is_question("Who signs the form?") == feedback_rows.is_question("  who signs form ")
    made = make_rows([said(right_answer="the bosun")], lambda *given: [], REFUSAL)
    assert len(made.questions if feedback_rows.is_question("Who signs form B7?") else made.rows) == 1


# ------------------------------------------------------------------------------- said at the terminal


def turn(text="The cook signs it [1]") -> Turn:
    about = [{"source": one["source"], "score": 0.5} for one in (FEES, FORMS)]
    texts = FEES["text"], FORMS["text"]
    passages = [Document(text, metadata=one, id=n) for text, one, n in zip(texts, about, "21", strict=True)]
    return Turn("And B7?", check_answer(text, passages, REFUSAL), "Who signs form B7?")


def test_commands_of_a_chat_make_judgements(capsys):
    kept = []
    session = Session([turn()], keep=kept.append)
    for line in ("/good", "/bad", "/right the bosun", "/none", "/passage 2"):
        assert session.obey(line)
    assert [one.rating for one in kept] == ["good", "bad", "bad", "bad", "good"]
    assert kept[2].right_answer == "the bosun" and kept[3].not_in_documents and kept[4].right_passage == "1"
    assert kept[0].question == "Who signs form B7?" and kept[0].passages == (FEES, FORMS)
    for line in ("/right", "/passage", "/passage 3", "/passage x"):
        assert session.obey(line)
    assert len(kept) == 5 and "a number from 1 to 2" in capsys.readouterr().err
    assert Session(keep=kept.append).obey("/good") and Session([turn()]).obey("/good") and len(kept) == 5
    said = capsys.readouterr().err
    assert "no answer yet" in said and "keeps no feedback" in said
    with pytest.raises(UserError, match="/right ANSWER"):
        judge("nonsense", turn())


def test_ask_asks_until_it_understands(monkeypatch, capsys):
    lines, kept = iter(["right", "/right the bosun"]), []
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    ask_judgement(turn(), kept.append)
    assert kept[0].right_answer == "the bosun" and "not a judgement" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda: "")
    ask_judgement(turn(), kept.append)
    monkeypatch.setattr("builtins.input", input_of_the_end)
    ask_judgement(turn(), kept.append)  # Ctrl-D
    assert len(kept) == 1


def input_of_the_end() -> str:
    raise EOFError


# ------------------------------------------------------------------------------- the command


def test_feedback_is_listed_made_into_rows_and_deleted(tiny_adapter, collection, tmp_path, capsys, monkeypatch):
    assert rag("ingest", SAMPLE / "documents" / "canteen") == 0
    rows = tmp_path / "rows.jsonl"
    assert rag("feedback", "--export", rows) == 2 and not rows.exists()
    assert "nobody has judged an answer" in capsys.readouterr().err
    lines = iter(["/right \x1b[31m190 litres", "/none", "/bad", ""])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    asked = "How many litres does the copper pot Old Agnes hold?", "Who is the mayor of Oslo?", "Who cooks?"
    assert rag("ask", *asked, "--adapter", tiny_adapter, "--max-new-tokens", 4, "--feedback") == 0
    capsys.readouterr()
    assert rag("ask", "Who?", "--adapter", tiny_adapter, "--max-new-tokens", 2, "--feedback", "--json") == 0
    assert json.loads(capsys.readouterr().out)["question"] == "Who?"  # nothing else on stdout
    assert rag("feedback", "--json") == 0
    first, second, third = json.loads(capsys.readouterr().out)
    assert len(first["adapter"]) == len(first["prompt"]) == 64 and first["given"] and first["passages"][0]["text"]
    assert second["not_in_documents"] and third["rating"] == "bad"
    assert rag("feedback") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "not in the documents" in shown and asked[2] in shown
    assert rag("feedback", "--export", rows) == 0
    assert "Judgements: 3. Adapters that answered: 1. Prompts: 1." in capsys.readouterr().out
    beside = [rows, rows.with_suffix(".questions.jsonl"), rows.with_suffix(".review.jsonl")]
    made = [[json.loads(line) for line in path.read_text().splitlines()] for path in beside]
    assert len(made[0]) + len(made[1]) >= 1 and feedback_rows.NOBODY_SAID in {one["reason"] for one in made[2]}
    assert rag("feedback", "--forget", "99") == 2 and "no such judgement" in capsys.readouterr().err
    assert rag("feedback", "--forget", str(first["id"])) == 0
    assert rag("feedback", "--forget", "all") == 0 and "2 judgements deleted" in capsys.readouterr().err
    assert rag("feedback") == 0 and "no feedback yet" in capsys.readouterr().out


def test_judgements_of_an_older_database_are_still_there(database):
    import psycopg2

    admin = psycopg2.connect(database)
    admin.autocommit = True
    admin.cursor().execute("CREATE DATABASE judged")
    url = database.replace("/postgres?", "/judged?")
    old = {"question": "Who?", "answer": "he", "model": "m", "rating": "bad", "right_answer": "she"}
    old |= {"not_in_documents": False, "right_passage": None, "passages": ["id"]}
    with Database(url).transaction() as cursor:
        for statements in (*MIGRATIONS[:4], "UPDATE rag.schema SET version = 4"):
            cursor.execute(statements)
        cursor.execute("INSERT INTO rag.collections (name, embedding_model, dimension) VALUES ('mine', 'fake', 4)")
        cursor.execute("INSERT INTO rag.feedback (collection, judgement) VALUES (1, %s)", (json.dumps(old),))
    log = open_log(url)
    (kept,) = log.all()
    assert (kept.question, kept.right_answer, kept.adapter, kept.passages) == ("Who?", "she", "", ({"id": "id"},))
    assert make_rows(log.all(), lambda *given: [], REFUSAL).review[0]["reason"] == feedback_rows.NO_PASSAGE


def open_log(url: str) -> FeedbackLog:
    from test_store import open_store

    return open_store(url, "mine", model="fake", size=4).feedback()
