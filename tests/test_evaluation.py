"""Metrics against hand-computed cases and SQuAD's definitions; questions; intervals; verdicts."""

import json

import pytest
from conftest import rag
from langchain_core.documents import Document

from qlora import evaluation as e
from qlora.citations import check_answer
from qlora.console import UserError

QUESTION = e.Question("How many crowns?", ("nine crowns", "9 crowns"), "fees.md")
HOLDS = Document("It costs nine crowns a day.", metadata={"source": "fees.md", "score": 0.9})
OTHER = Document("Dogs are welcome.", metadata={"source": "dogs.md", "score": 0.8})


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("Nine Crowns.", ["nine crowns"], 1, 1),
        ("the nine  crowns", ["nine crowns"], 1, 1),
        ("nine", ["nine crowns"], 0, 2 / 3),
        ("about nine crowns a day", ["nine crowns"], 0, 2 * 2 / (4 + 2)),
        ("nine nine", ["nine crowns"], 0, 0.5),
        ("ten", ["nine crowns"], 0, 0),
        ("9 crowns", ["nine crowns", "9 crowns"], 1, 1),
        ("", ["nine"], 0, 0),
        ("A.", ["the"], 1, 1),
    ],
)
def test_exact_match_and_f1_are_squads(prediction, answers, em, f1):
    assert e.exact_match(prediction, answers) == em
    assert e.token_f1(prediction, answers) == pytest.approx(f1)


def test_scores_of_one_answer():
    good = e.score_answer(QUESTION, check_answer("nine crowns [1] [2]", [HOLDS, OTHER], "I don't know."))
    assert (good["em"], good["f1"], good["citations"], good["right_citations"]) == (1, 1, 2, 1)
    assert (good["cited_support"], good["faithful"], good["refused"], good["words"]) == (1, 1, False, 2)
    refused = e.score_answer(QUESTION, check_answer("I don't know.", [HOLDS], "I don't know."))
    assert (refused["f1"], refused["refused"], refused["faithful"], refused["cited_support"]) == (0, True, None, None)
    made_up = e.score_answer(QUESTION, check_answer("twelve", [HOLDS], "I don't know."))
    assert (made_up["f1"], made_up["faithful"], made_up["cited_support"]) == (0, 0, 0)
    none = e.score_answer(e.Question("Why?", ()), check_answer("because [1]", [OTHER], "I don't know."))
    assert (none["em"], none["f1"], none["answerable"], none["citations"]) == (None, None, False, None)


def test_a_cell_by_hand():
    def score(f1, refused, citations=0, right=0):
        return {
            "em": None if f1 is None else float(f1 == 1),
            "f1": f1,
            "refused": refused,
            "answerable": f1 is not None,
            "citations": citations,
            "right_citations": right,
            "cited_support": None,
            "faithful": None,
            "words": 2,
            "seconds": 0.5,
        }

    cell = e.summarize(
        [score(1, False, 2, 1), score(0.5, False, 1, 1), score(0, True), score(None, True), score(None, False)]
    )
    assert (cell["em"], cell["f1"]) == (pytest.approx(1 / 3, abs=1e-4), 0.5)
    assert (cell["refusal_precision"], cell["refusal_recall"], cell["refusal_f1"]) == (0.5, 0.5, 0.5)
    assert cell["citation_precision"] == pytest.approx(2 / 3, abs=1e-4) and cell["faithfulness"] is None
    assert cell["seconds_median"] == 0.5


def test_retrieval_by_hand():
    metrics = e.rank_metrics([[True, False, False], [False, False, True], [False] * 3, [False] * 4 + [True]])
    assert metrics["recall@1"] == 0.25 and metrics["recall@3"] == 0.5 and metrics["recall@10"] == 0.75
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 5) / 4, abs=1e-4)
    assert metrics["ndcg@10"] == pytest.approx((1 + 0.5 + 0 + 1 / 2.584963) / 4, abs=1e-4)
    found = e.score_retrieval([QUESTION, e.Question("Why?", ())], [[OTHER, HOLDS], [OTHER]])
    assert found["recall@1"] == 0 and found["recall@3"] == 1 and found["by_source"]["mrr"] == 0.5


def test_support_ignores_yes_and_no_and_needs_whole_words():
    assert e.supports("The hut is closed on Mondays.", e.Question("Open?", ("No, closed on Mondays", "No")))
    assert not e.supports("No idea.", e.Question("Open?", ("No",)))
    assert not e.supports("It costs 19 crowns.", e.Question("How much?", ("9 crowns",)))


def test_bootstrap_on_known_data():
    sure = e.paired_bootstrap([1.0] * 50, [0.5] * 50, seed=0)
    assert sure == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 50}
    left = [float(n % 2) for n in range(100)]
    even = e.paired_bootstrap(left, left[1:] + left[:1], seed=0)
    assert (
        even["mean"] == 0
        and even["low"] == pytest.approx(-0.2, abs=0.03)
        and even["high"] == pytest.approx(0.2, abs=0.03)
    )
    assert even == e.paired_bootstrap(left, left[1:] + left[:1], seed=0)


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.1, 0.3, "tuned answers better"), (-0.1, 0.3, "no evidence"), (-0.3, -0.1, "worse")]
)
def test_verdicts(low, high, words):
    difference = {"what": "tuned - base", "of": "retrieved", "mean": (low + high) / 2, "low": low, "high": high, "n": 9}
    assert words in e.give_verdict([difference]) and "n=9" in e.give_verdict([difference])
    assert "base model alone" in e.give_verdict([])


def test_questions_of_all_formats(tmp_path):
    lines = [
        {"question": "Q1?", "answers": ["a"], "source": "x.md", "context": "a b"},
        {"question": "Q2?", "answers": []},
        {"instruction": "Q3?", "response": "c", "context": "c d", "category": "closed_qa"},
        {"instruction": "Q4?", "response": "I don't know.", "context": "e"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = e.load_questions(tmp_path / "q.jsonl")
    assert [q.answers for q in found] == [("a",), (), ("c",), ()] and found[0].source == "x.md"
    assert e.load_questions(tmp_path / "q.jsonl", limit=2) == [found[0], found[2]]
    entry = {"question": " Q? ", "answers": [{"text": "a"}, {"text": "a"}, {"text": "b"}], "id": "1"}
    squad = {"data": [{"title": "Force", "paragraphs": [{"context": "a b", "qas": [entry]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    assert e.load_questions(tmp_path / "squad.json") == [e.Question("Q?", ("a", "b"), "Force.md", "a b")]


def test_bad_question_files_name_the_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "ok", "answers": []}\n{oops\n{"question": "x"}\n{"question": "x", "answers": "y"}\n')
    with pytest.raises(UserError) as error:
        e.load_questions(path)
    assert all(f"q.jsonl:{n}" in str(error.value) for n in (2, 3, 4)) and "q.jsonl:1" not in str(error.value)
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (("gone.jsonl", "not found"), ("bad.json", "no SQuAD file")):
        with pytest.raises(UserError, match=message):
            e.load_questions(tmp_path / name)


# ------------------------------------------------------------------------------- the command

CELL = {
    *("model", "context", "em", "f1", "f1_low", "f1_high", "refusal_precision", "refusal_recall", "refusal_f1"),
    *("citation_precision", "citation_recall", "faithfulness", "words_mean", "seconds_median"),
}


def test_the_whole_table_and_resuming(collection, tiny_adapter, tmp_path, capsys, monkeypatch):
    from qlora.generator import Generator

    words = ["evaluate", "--adapter", tiny_adapter, "--limit", 12, "--max-new-tokens", 4, "--output", tmp_path / "out"]
    assert rag(*words) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (report["questions"], report["answerable"]) == (12, sum(bool(q.answers) for q in sample_questions(12)))
    cells = [(cell["model"], cell["context"]) for cell in report["cells"]]
    assert cells == [(model, context) for model in e.MODELS for context in e.CONTEXTS]
    assert all(set(cell) == CELL for cell in report["cells"])
    assert report["retrieval"]["recall@3"] > 0.5 and set(report["retrieval"]) >= {
        "recall@1",
        "recall@10",
        "mrr",
        "ndcg@10",
    }
    assert len(report["differences"]) == 5 and report["verdict"] and report["verdict"][1:] in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("evaluation.json", "evaluation.md", "evaluation.png", "answers.jsonl"),
    }
    assert "| tuned | retrieved |" in (tmp_path / "out" / "evaluation.md").read_text()
    answers = (tmp_path / "out" / "answers.jsonl").read_text()
    assert len(answers.splitlines()) == 72

    # Killed after 30 answers, in the middle of a line: only the rest is made again.
    lines = answers.splitlines()
    (tmp_path / "out" / "answers.jsonl").write_text("\n".join(lines[:30]) + "\n" + lines[30][:50])
    made, complete = [], Generator.complete
    monkeypatch.setattr(Generator, "complete", lambda self, asked: made.extend(asked) or complete(self, asked))
    assert rag(*words) == 0
    assert len(made) == 42
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for report_ in (report, again):
        for cell in report_["cells"]:
            del cell["seconds_median"]
    assert again == report


def sample_questions(limit):
    from conftest import SAMPLE

    return e.load_questions(SAMPLE / "questions.jsonl", limit)


def test_base_alone_and_mistakes(collection, tiny_base, tmp_path, capsys):
    words = [
        "evaluate",
        "--adapter",
        "none",
        "--base-model",
        tiny_base,
        "--max-new-tokens",
        2,
        "--output",
        tmp_path / "out",
    ]
    assert rag(*words, "--limit", 4) == 0
    captured = capsys.readouterr()
    assert (
        "the base model alone is evaluated" in captured.err and "Base model alone: nothing to compare" in captured.out
    )
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert rag(*words, "--questions", tmp_path / "bad.jsonl") == 2
    assert "bad.jsonl:1" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"question": "Why?", "answers": []}\n')
    assert rag(*words, "--questions", tmp_path / "q.jsonl", "--collection", "nothing-here") == 2
    assert "collection nothing-here is empty" in capsys.readouterr().err
    assert rag(*words, "--questions", tmp_path / "q.jsonl") == 0
