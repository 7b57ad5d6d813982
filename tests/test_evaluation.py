"""Metrics against hand-computed cases and SQuAD's definitions; questions; intervals; verdicts."""

import contextlib
import json
import shutil

import pytest
from conftest import SAMPLE, rag
from langchain_core.documents import Document

from qlora import metrics, refusal
from qlora.answering.citations import check_answer
from qlora.console import UserError
from qlora.evaluation import comparison as c
from qlora.evaluation import evaluation as e
from qlora.evaluation.questions import Question, load_questions
from qlora.evaluation.report import AnswerLog, compare_files, describe_answers
from qlora.markdown import put_section
from qlora.presets import EMBEDDED_EMBEDDER

QUESTION = Question("How many crowns?", ("nine crowns", "9 crowns"), "fees.md")
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
    assert metrics.exact_match(prediction, answers) == em
    assert metrics.token_f1(prediction, answers) == pytest.approx(f1)


def test_scores_of_one_answer():
    good = e.score_answer(QUESTION, check_answer("nine crowns [1] [2]", [HOLDS, OTHER], "I don't know."))
    assert (good["em"], good["f1"], good["citations"], good["right_citations"]) == (1, 1, 2, 1)
    assert (good["cited_support"], good["faithful"], good["refused"], good["words"]) == (1, 1, False, 2)
    refused = e.score_answer(QUESTION, check_answer("I don't know.", [HOLDS], "I don't know."))
    assert (refused["f1"], refused["refused"], refused["faithful"], refused["cited_support"]) == (0, True, None, None)
    made_up = e.score_answer(QUESTION, check_answer("twelve", [HOLDS], "I don't know."))
    assert (made_up["f1"], made_up["faithful"], made_up["cited_support"]) == (0, 0, 0)
    none = e.score_answer(Question("Why?", ()), check_answer("because [1]", [OTHER], "I don't know."))
    assert (none["em"], none["f1"], none["answerable"], none["citations"]) == (None, None, False, None)


def test_a_cell_by_hand():
    def score(f1, refused, citations=0, right=0):
        return {
            "em": None if f1 is None else float(f1 == 1),
            "f1": f1,
            "overall_f1": float(refused) if f1 is None else f1,
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
    assert (cell["em"], cell["f1"], cell["overall_f1"]) == (pytest.approx(1 / 3, abs=1e-4), 0.5, 2.5 / 5)
    assert (cell["refusal_precision"], cell["refusal_recall"], cell["refusal_f1"]) == (0.5, 0.5, 0.5)
    assert cell["citation_precision"] == pytest.approx(2 / 3, abs=1e-4) and cell["faithfulness"] is None
    assert cell["seconds_median"] == 0.5


def test_retrieval_by_hand():
    found = metrics.rank_metrics([[True, False, False], [False, False, True], [False] * 3, [False] * 4 + [True]])
    assert found["recall@1"] == 0.25 and found["recall@3"] == 0.5 and found["recall@10"] == 0.75
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 5) / 4, abs=1e-4)
    assert found["ndcg@10"] == pytest.approx((1 + 0.5 + 0 + 1 / 2.584963) / 4, abs=1e-4)
    found = e.score_retrieval([QUESTION, Question("Why?", ())], [[OTHER, HOLDS], [OTHER]])
    assert found["recall@1"] == 0 and found["recall@3"] == 1 and found["by_source"]["mrr"] == 0.5


def test_support_ignores_yes_and_no_and_needs_whole_words():
    assert e.supports("The hut is closed on Mondays.", Question("Open?", ("No, closed on Mondays", "No")))
    assert not e.supports("No idea.", Question("Open?", ("No",)))
    assert not e.supports("It costs 19 crowns.", Question("How much?", ("9 crowns",)))


def score_of(answerable, f1=0.0, refused=False):
    return {"answerable": answerable, "overall_f1": f1 if answerable else float(refused)}


def test_threshold_is_the_best_cut_of_the_fitting_half():
    confidences = [0.1, 0.2, 0.3, 0.4, 0.5]
    scores = [score_of(False), score_of(True, 0.25), score_of(False), score_of(True, 1.0), score_of(False)]
    assert refusal.fit_threshold(confidences, scores) == pytest.approx(0.35)  # +1, -0.25, +1 before, -1, +1 after
    assert refusal.fit_threshold(confidences, scores, noise=0.1) == pytest.approx(0.35)  # 0.35 better on average
    assert refusal.fit_threshold(confidences, scores, noise=0.2) == pytest.approx(0.15)  # 0.2 better than none
    assert refusal.fit_threshold(confidences, scores, noise=0.4) is None
    assert refusal.fit_threshold(confidences, [score_of(True, 1.0)] * 5) is None
    assert refusal.fit_threshold(confidences, [score_of(False)] * 5) > 0.5
    assert refusal.fit_threshold([0.3, 0.3], [score_of(False), score_of(True, 1.0)]) is None  # no cut between equals
    halves = c.split_halves([score_of(n % 4 > 0) for n in range(20)])
    assert sorted(halves[0] + halves[1]) == list(range(20))
    assert [sum(n % 4 == 0 for n in half) for half in halves] == [3, 2]


def test_refusal_bias_is_the_best_cut_of_the_rows():
    refused = [True] * 10 + [False] * 2 + [True] * 3 + [False] * 60
    odds = [5.0 - n / 10 for n in range(75)]
    bias, f1 = refusal.fit_refusal_bias(odds, refused, [True] * 75)
    assert bias == pytest.approx(-3.55) and f1 == pytest.approx(26 / 28, abs=1e-3)  # two answers for three
    flipped = (values[::-1] for values in (odds, refused, [True] * 75))
    assert refusal.fit_refusal_bias(*flipped) == (bias, f1)
    shifted, _ = refusal.fit_refusal_bias([odd - 6 for odd in odds], refused, [True] * 75)
    assert shifted == pytest.approx(2.45)  # one that never refuses is made to
    few, none = (odds[25:], refused[25:], refused[25:]), (odds[:11], refused[:11], refused[:11])
    assert refusal.fit_refusal_bias(*few) == refusal.fit_refusal_bias(*none) == (0.0, None)


def test_refusal_bias_spares_answers_that_are_right():
    """An answer that would be wrong is no loss; rows that refuse count as one in five at most."""
    odds, refused = [-n / 10 for n in range(60)], [True] * 5 + [False] * 10 + [True] * 5 + [False] * 40
    right = [not flag for flag in refused]
    assert refusal.fit_refusal_bias(odds, refused, right)[0] == pytest.approx(0.45)
    wrong_first = [n >= 15 and flag for n, flag in enumerate(right)]
    assert refusal.fit_refusal_bias(odds, refused, wrong_first)[0] == pytest.approx(1.95)
    hopeless = [not flag for flag in refused]
    assert refusal.fit_refusal_bias(odds, hopeless, refused) == (-0.5, 0.0)  # 5 answers, then refusals
    assert refusal.fit_refusal_bias([1.0] * 40, [True] * 20 + [False] * 20, [False] * 40)[0] == pytest.approx(-0.5)


def test_calibration_reports_on_questions_it_was_not_fitted_on():
    """Unanswerable questions score low and are answered by the model: a threshold turns them into refusals."""
    questions, found, scores = [], [], []
    for n in range(40):
        answers = () if n % 4 == 0 else ("nine crowns",)
        document = Document("It costs nine crowns.", metadata={"source": "a.md", "score": 0.6 if answers else 0.2})
        questions.append(Question(f"{n}?", answers))
        found.append([document])
        answer = check_answer("nine crowns [1]", [document], "I don't know.")
        scores.append({**e.score_answer(questions[-1], answer), "seconds": 1.0})
    result = e.calibrate(questions, found, scores, seed=0)
    assert result["threshold"] == pytest.approx(0.4) and (result["fitted_on"], result["reported_on"]) == (20, 20)
    assert (result["without"]["refusal_f1"], result["with"]["refusal_f1"]) == (0, 1)
    assert result["difference"]["mean"] == 0.25 and result["difference"]["low"] > 0


def test_bootstrap_on_known_data():
    sure = c.paired_bootstrap([1.0] * 50, [0.5] * 50, seed=0)
    assert sure == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 50}
    left = [float(n % 2) for n in range(100)]
    even = c.paired_bootstrap(left, left[1:] + left[:1], seed=0)
    assert (
        even["mean"] == 0
        and even["low"] == pytest.approx(-0.2, abs=0.03)
        and even["high"] == pytest.approx(0.2, abs=0.03)
    )
    assert even == c.paired_bootstrap(left, left[1:] + left[:1], seed=0)


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.1, 0.3, "tuned answers better"), (-0.1, 0.3, "no evidence"), (-0.3, -0.1, "worse")]
)
def test_verdicts(low, high, words):
    spread = {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}
    difference = {"what": "tuned - base", "of": "retrieved", "metric": "f1", **spread}
    assert words in c.give_verdict([difference]) and "n=9" in c.give_verdict([difference])
    assert "only one model" in c.give_verdict([])


def test_questions_of_all_formats(tmp_path):
    lines = [
        {"question": "Q1?", "answers": ["a"], "source": "x.md", "context": "a b"},
        {"question": "Q2?", "answers": []},
        {"instruction": "Q3?", "response": "c", "context": "c d", "category": "closed_qa"},
        {"instruction": "Q4?", "response": "I don't know.", "context": "e"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_questions(tmp_path / "q.jsonl")
    assert [q.answers for q in found] == [("a",), (), ("c",), ()] and found[0].source == "x.md"
    assert load_questions(tmp_path / "q.jsonl", limit=2) == [found[0], found[1]]  # one of each kind
    entry = {"question": " Q? ", "answers": [{"text": "a"}, {"text": "a"}, {"text": "b"}], "id": "1"}
    squad = {"data": [{"title": "Force", "paragraphs": [{"context": "a b", "qas": [entry]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    assert load_questions(tmp_path / "squad.json") == [Question("Q?", ("a", "b"), "Force.md", "a b")]


def test_bad_question_files_name_the_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "ok", "answers": []}\n{oops\n{"question": "x"}\n{"question": "x", "answers": "y"}\n')
    with pytest.raises(UserError) as error:
        load_questions(path)
    assert all(f"q.jsonl:{n}" in str(error.value) for n in (2, 3, 4)) and "q.jsonl:1" not in str(error.value)
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (("gone.jsonl", "not found"), ("bad.json", "not a SQuAD file")):
        with pytest.raises(UserError, match=message):
            load_questions(tmp_path / name)


# ------------------------------------------------------------------------------- the command

CELL = {
    *(
        "model",
        "context",
        "em",
        "f1",
        "overall_f1",
        "f1_low",
        "f1_high",
        "refusal_precision",
        "refusal_recall",
        "refusal_f1",
    ),
    *("citation_precision", "citation_recall", "faithfulness", "words_mean", "seconds_median"),
}


def test_the_whole_table_and_resuming(collection, tiny_adapter, tmp_path, capsys, monkeypatch):
    from qlora.answering.generator import Generator

    tiny_adapter = shutil.copytree(tiny_adapter, tmp_path / "tiny")
    words = ["evaluate", "--adapter", tiny_adapter, "--limit", 12, "--max-new-tokens", 4, "--output", tmp_path / "out"]
    assert rag(*words) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (report["questions"], report["answerable"]) == (12, sum(bool(q.answers) for q in sample_questions(12)))
    cells = [(cell["model"], cell["context"]) for cell in report["cells"]]
    assert cells == [(model, context) for model in c.MODELS for context in c.CONTEXTS]
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
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| tuned | retrieved |" in table
    card = (tiny_adapter / "README.md").read_text()
    assert card.count(table) == 1 and card.startswith("---\n") and (tiny_adapter / "evaluation.png").is_file()
    answers = (tmp_path / "out" / "answers.jsonl").read_text()
    assert len(answers.splitlines()) == 72

    # Killed after 30 answers, in the middle of a line: only the rest is made again.
    lines = answers.splitlines()
    (tmp_path / "out" / "answers.jsonl").write_text("\n".join(lines[:30]) + "\n" + lines[30][:50])
    made, complete = [], Generator.complete
    monkeypatch.setattr(Generator, "complete", lambda self, asked: made.extend(asked) or complete(self, asked))
    assert rag(*words) == 0
    assert len(made) == len(read_pairs(lines[30:]) - read_pairs(lines[:30])) < 42  # passages of two contexts: read once
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for report_ in (report, again):
        for cell in report_["cells"]:
            del cell["seconds_median"]
    assert again == report
    assert (tiny_adapter / "README.md").read_text().count("| tuned | retrieved |") == 1  # replaced, not added

    # A smaller run deletes no answer, and the larger one makes none again. A card that cannot be written is told.
    whole = tmp_path / "out" / "answers.jsonl"
    before = {json.loads(line)["key"] for line in whole.read_text().splitlines()}
    (tiny_adapter / "README.md").unlink()
    capsys.readouterr()
    assert rag(*words, "--limit", 2, "--contexts", "retrieved") == 0
    shown = capsys.readouterr()
    assert "README.md does not show this evaluation" in shown.err and "F1" in shown.out
    assert {json.loads(line)["key"] for line in whole.read_text().splitlines()} == before
    assert len(c.read_answers(whole)) == 4
    made.clear()
    assert rag(*words, "--seed", 1, "--models", "tuned", "--contexts", "oracle") == 0
    made.clear()
    assert rag(*words) == 0 and not made and len(c.read_answers(whole)) == 72

    capsys.readouterr()
    assert rag("compare", *[tmp_path / "out" / "evaluation.json"] * 2, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["model"], row["context"]) for row in rows} == set(cells)
    assert all(row["mean"] == row["low"] == row["high"] == 0 and row["first"] == row["second"] for row in rows)


def test_a_passage_is_read_again_where_a_confidence_forbids_to_refuse(tmp_path):
    asked = []

    def complete(pairs):
        asked.extend(pairs)
        yield [(n, check_answer("red [1]", documents, "No.")) for n, (_, documents) in enumerate(pairs)]

    asking = e.Asking(AnswerLog(tmp_path / "answers.jsonl", {}), complete, lambda documents: False, 8)
    plain = Document("It is red.", metadata={"source": "a.md", "score": 1.0})
    sure = Document("It is red.", metadata={**plain.metadata, "confidence": 0.9})
    question = Question("What colour?", ("red",))
    contexts = {"retrieved": [(question, [sure])], "oracle": [(question, [plain])]}
    e.answer_cells(asking, {"tuned": contextlib.nullcontext}, contexts)
    assert len(asked) == 2
    e.answer_cells(asking, {"tuned": contextlib.nullcontext}, {**contexts, "retrieved": contexts["oracle"]})
    assert len(asked) == 2


def read_pairs(lines):
    """What a model was asked in these lines of answers.jsonl, whatever the context was called."""
    answers = map(json.loads, lines)
    return {json.dumps([answer["model"], answer["question"], answer["passages"]]) for answer in answers}


def sample_questions(limit):
    return load_questions(SAMPLE / "questions.jsonl", limit)


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
    assert "only the base model is evaluated" in captured.err
    assert "Only one model: nothing to compare" in captured.out
    assert rag(*words, "--limit", 4, "--contexts", "oracle", "--json") == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["model"], cell["context"]) for cell in cells] == [("base", "oracle")]
    assert rag(*words, "--models", "best", "--contexts", "none") == 2
    assert "--models best is not valid" in (told := capsys.readouterr().err) and "--contexts none" in told
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert rag(*words, "--questions", tmp_path / "bad.jsonl") == 2
    assert "bad.jsonl:1" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"question": "Why?", "answers": []}\n')
    assert rag(*words, "--questions", tmp_path / "q.jsonl", "--collection", "nothing-here") == 2
    assert "collection nothing-here is empty" in capsys.readouterr().err
    assert rag(*words, "--questions", tmp_path / "q.jsonl", "--contexts", "oracle") == 2
    assert "no question has a context" in capsys.readouterr().err
    assert rag(*words, "--questions", tmp_path / "q.jsonl") == 0
    for flags, message in {
        ("--models", "tuned"): "no adapter to evaluate",
        ("--calibrate", "--contexts", "oracle"): "--calibrate needs answers from retrieved passages",
        ("--calibrate", "--limit", 9): "9 questions are too few - --calibrate - give 10 or more",
        ("--output", tmp_path / "q.jsonl"): "no folder can be made there",
        ("--sweep", "foo=1"): "unknown argument --sweep",
        ("--questions", tmp_path): "question file not found",
    }.items():
        assert rag(*words, *flags) == 2
        assert message in capsys.readouterr().err


def test_a_page_of_one_model_or_none_is_told(collection, tiny_base, tmp_path, capsys):
    from qlora.console import run
    from qlora.evaluation import report

    (tmp_path / "page.md").write_text("<!-- proof -->\n<!-- end of proof -->\n")
    words = "--adapter", "none", "--base-model", tiny_base, "--max-new-tokens", 2, "--limit", 4
    assert rag("evaluate", *words, "--output", tmp_path / "out") == 0
    for folder, message in {"out": "no retrieved answers of the tuned model", "gone": "no evaluation there"}.items():
        assert run(report.main, [str(tmp_path / name) for name in ("page.md", "page.md", folder)]) == 2
        assert message in capsys.readouterr().err
    assert run(report.main, []) == 2
    assert (tmp_path / "page.md").read_text() == "<!-- proof -->\n<!-- end of proof -->\n"


def test_calibrate_stores_the_threshold_that_ask_obeys(collection, database, tiny_base, tmp_path, capsys):
    """Questions that nothing in the documents is near to, and a model that never refuses: a threshold must come out."""
    from qlora.retrieval.database import Database
    from qlora.retrieval.pgvector_store import PgVectorStore

    sample = [q for q in sample_questions(60) if q.source.startswith("canteen/")]
    assert rag("ingest", SAMPLE / "documents" / "canteen") == 0
    lines = [{"question": q.question, "answers": q.answers, "source": q.source} for q in sample]
    far = ["How hot is the core of Jupiter?", "Who won the chess final of 1972?", "What is an eigenvector?"]
    far += ["Which enzyme unwinds DNA?", "Who painted the Night Watch?", "What does a capacitor store?"]
    lines = [{**line, "answers": line["answers"] or ["otters"]} for line in lines]
    lines += [{"question": question, "answers": []} for question in far]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--adapter", "none", "--base-model", tiny_base, "--max-new-tokens", 2]
    words_of_run = [*words, "--questions", tmp_path / "q.jsonl", "--output", tmp_path / "out"]
    assert rag("evaluate", *words_of_run, "--calibrate") == 0
    assert "Refusal threshold: 0." in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["calibration"]
    assert found["with"]["refusal_recall"] > found["without"]["refusal_recall"] == 0

    def threshold():
        return PgVectorStore(Database(database), None, EMBEDDED_EMBEDDER, collection).refusal_threshold

    assert threshold() == pytest.approx(found["threshold"], abs=1e-4)
    assert rag("ask", *words, "--json", "What is an eigenvector?") == 0
    turn = json.loads(capsys.readouterr().out)
    assert turn["refused"] and turn["tokens"] == {"prompt": 0, "completion": 0} and len(turn["passages"]) == 3
    assert rag("evaluate", *words_of_run) == 0  # without --calibrate the stored threshold applies
    cells = json.loads((tmp_path / "out" / "evaluation.json").read_text())["cells"]
    recall = {cell["context"]: cell["refusal_recall"] for cell in cells}
    assert recall["retrieved"] > 0.5 > recall["closed-book"] == 0


def test_sweep_ranks_values_and_leaves_no_collection_behind(collection, database, tmp_path, capsys, monkeypatch):
    import psycopg2

    from qlora.retrieval import database as databases

    documents = SAMPLE / "documents" / "canteen"
    assert rag("ingest", documents) == 0
    rows = [row for row in map(json.loads, (SAMPLE / "questions.jsonl").open()) if row["source"].startswith("canteen/")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sweep", "--questions", tmp_path / "q.jsonl", "--documents", documents, "--output", tmp_path / "out"]
    words += ["top-k=1,12,3"]
    capsys.readouterr()
    opened, connect = [], databases.connect
    monkeypatch.setattr(databases, "connect", lambda *address: opened.append(connect(*address)) or opened[-1])
    assert rag(*words, "passages=24,200", "--search", "dense", "--json") == 0
    assert len(opened) == 4 and all(connection.closed for connection in (opened[0], *opened[2:]))  # [1] is the store
    by_count, by_length = json.loads(capsys.readouterr().out)
    assert [row["value"] for row in by_length["rows"]] == [200, 24]  # 24 tokens cut answers in two
    assert by_length["rows"][0]["given"] > by_length["rows"][1]["given"]
    given = [row["given"] for row in by_count["rows"]]
    assert {row["value"] for row in by_count["rows"]} == {1, 3, 12} and given == sorted(given, reverse=True)
    assert given[0] > given[-1] and by_count["rows"][-1]["value"] == 1
    top = {row["value"]: row for row in by_count["rows"]}
    assert top[1]["given"] == top[1]["recall@1"] and top[3]["given"] == top[3]["recall@3"]
    assert top[1]["words"] < top[3]["words"] < top[12]["words"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM rag.collections WHERE name LIKE 'sweep%'")
        assert cursor.fetchone()[0] == 0
    assert rag(*words) == 0
    assert "`words`" in capsys.readouterr().out


def test_mistakes_in_sweep_and_compare(collection, tmp_path, capsys):
    assert rag("sweep", "passages=0,x", "colour=red") == 2
    err = capsys.readouterr().err
    assert "passages=0,x is not valid" in err and "colour=red is not valid" in err
    (tmp_path / "q.jsonl").write_text('{"question": "Why?", "answers": []}\n')
    assert rag("sweep", "passages=100", "--questions", tmp_path / "q.jsonl") == 2
    assert "name them with --documents" in capsys.readouterr().err
    assert rag("compare", tmp_path / "a.json", tmp_path / "b.json") == 2
    assert "no evaluation there" in capsys.readouterr().err
    for name, question in (("a", "One?"), ("b", "Two?")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text("{}")
        scores = {"f1": 1.0, "overall_f1": 1.0}
        line = {"model": "base", "context": "oracle", "question": question, "answers": ["x"], "scores": scores}
        (tmp_path / name / "answers.jsonl").write_text(json.dumps(line) + "\n")
    assert rag("compare", *(tmp_path / name / "evaluation.json" for name in "ab")) == 2
    assert "share no question" in capsys.readouterr().err


def test_readme_shows_answers_of_every_kind_and_every_question_file(tmp_path):
    """The first right, the first wrong, and the first without an answer, beside what the base said."""
    facts = [("A?", ["9"], "9 [1]"), ("B?", ["8"], "8"), ("C?", ["7"], "a|b\n1"), ("D?", [], "I don't know.")]
    lines = []
    for question, answers, tuned in facts:
        for model, text in (("base", "It is 4."), ("tuned", tuned)):
            answer = check_answer(text, [], "I don't know.")
            scores = e.score_answer(Question(question, tuple(answers)), answer)
            row = {"model": model, "context": "retrieved", "question": question, "answers": answers, "answer": text}
            lines.append(json.dumps({**row, "scores": scores}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    cells = [
        {"model": model, "context": "retrieved", "f1": f1, "refusal_f1": 0.5, "citation_precision": None}
        for model, f1 in (("base", 0.1), ("tuned", 0.6))
    ]
    report = {"questions": 4, "answerable": 3, "cells": cells, "retrieval": {"recall@3": 0.9}}
    (tmp_path / "evaluation.json").write_text(json.dumps({**report, "settings": {"questions": "some/mine.jsonl"}}))
    assert describe_answers(tmp_path).splitlines()[2:] == [
        "| A? | 9 | It is 4. | 9 [1] |",
        "| C? | 7 | It is 4. | a\\|b 1 |",
        "| D? | (not in the documents) | It is 4. | I don't know. |",
    ]
    assert compare_files([tmp_path]).splitlines()[2:] == ["| `mine.jsonl` | 4 | 3 | 0.10 | 0.60 | 0.50 |  | 0.90 |"]


def test_a_section_is_replaced_added_or_refused_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- one -->\nold\n<!-- end of one -->\n\nend\n")
    put_section(page, "one", "new")
    assert page.read_text() == "# Page\n\n<!-- one -->\nnew\n<!-- end of one -->\n\nend\n"
    put_section(page, "two", "more", "Second")
    assert page.read_text().endswith("end\n\n## Second\n\n<!-- two -->\nmore\n<!-- end of two -->\n")
    before = page.read_text()
    for name, text in (("three", before), ("one", before.replace("<!-- end of one -->", ""))):
        page.write_text(text)
        with pytest.raises(UserError, match="no section"):
            put_section(page, name, "lost")
        assert page.read_text() == text
