"""Which passage answers, and whether one does: order, confidence, and what they are fitted on."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import SAMPLE, rag
from langchain_core.documents import Document

from qlora.answering.chain import Finding, answer_batch, finish_answer, is_decided, make_fill
from qlora.answering.citations import check_answer
from qlora.answering.generator import Generator
from qlora.answering.ranker import CONTENDERS, Ranker
from qlora.answering.ranking import Ranking, read_ranking, write_ranking
from qlora.answering.reading import Reader
from qlora.console import UserError
from qlora.evaluation import fitting
from qlora.evaluation.questions import Question
from qlora.model import base_model
from qlora.prompt import choose_prompt, encode_prompt

BOTH = {"total": 1.0, "odds": 0.1}


def passage(text: str, total: float, **scores) -> Document:
    return Document(text, metadata={"source": "a.md", "score": total, "total": total, "ranks": {"search": 1}, **scores})


class Odds:
    """A reader that finds what it is told, and notes what it was asked to read."""

    def __init__(self, odds: dict[str, float]):
        self.known, self.asked = odds, []

    def odds(self, question, documents, history=()):
        self.asked.append([document.page_content for document in documents])
        return [self.known[document.page_content] for document in documents]


# ------------------------------------------------------------------------------- order


def test_passages_near_the_first_are_read_and_the_others_are_not():
    reader = Odds({"a": -2.0, "b": 3.0, "c": 0.0})
    found = [passage("a", 1.0), passage("b", 0.9), passage("c", 0.85), passage("d", 0.84), passage("e", 0.1)]
    ordered = Ranker(Ranking("likelihood", BOTH), reader)("Who?", found)
    assert [document.page_content for document in ordered] == ["b", "c", "a", "d", "e"]
    assert reader.asked == [["a", "b", "c"]] and CONTENDERS == 3
    assert [document.metadata["ranks"]["search"] for document in ordered] == [2, 3, 1, 4, 5]
    assert "odds" not in ordered[3].metadata and "odds" not in found[0].metadata
    Ranker(Ranking("likelihood", BOTH), reader)("Who?", [passage("a", 1.0), passage("b", 0.7)])
    assert reader.asked[1:] == [["a"]]
    assert Ranker(Ranking("likelihood", BOTH), reader)("Who?", []) == []


def test_a_confidence_decides_and_a_bias_shifts_it():
    ranking = Ranking("none", {"total": 1.0}, {"intercept": -1.0, "total": 1.0, "odds": 0.5}, threshold=0.6)
    ranker = Ranker(ranking, Odds({"a": 2.0, "b": -4.0}))
    for text, confidence in (("a", 1 / (1 + math.exp(-1))), ("b", 1 / (1 + math.exp(2)))):
        finding = Finding(lambda question, k, text=text: [passage(text, 1.0)], 1, ranker, threshold=0.0)
        documents = finding.find("Who?", 1)
        assert documents[0].metadata["confidence"] == pytest.approx(confidence, abs=1e-4)
        assert finding.refuses(documents) == (confidence < 0.6)
    shy = Ranker(ranking, Odds({"a": 2.0}), bias=3.0)("Who?", [passage("a", 1.0)])
    assert shy[0].metadata["confidence"] == pytest.approx(1 / (1 + math.exp(2)), abs=1e-4)


def test_a_cross_encoder_puts_all_in_order_and_where_it_fails_a_server_goes_on():
    found = [passage("a", 1.0), passage("b", 0.2)]
    ranker = Ranker(Ranking("mine", {"cross": 1.0}), score=lambda question, texts: [-1.0, 2.0])
    assert [document.page_content for document in ranker("Who?", found)] == ["b", "a"]

    def fail(question, texts):
        raise UserError([])

    with pytest.raises(UserError):
        Ranker(Ranking("mine", {"cross": 1.0}), score=fail)("Who?", found)
    kept = Ranker(Ranking("mine", {"cross": 1.0}), score=fail, keeps_going=True)("Who?", found)
    assert [document.page_content for document in kept] == ["a", "b"] and "unranked" in kept[0].metadata


# ------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def generator(tiny_base) -> Generator:
    model = base_model.load_base_model(str(tiny_base))
    tokenizer = base_model.load_tokenizer(str(tiny_base))
    choose_prompt(tokenizer)
    return Generator(model=model, tokenizer=tokenizer, max_new_tokens=12)


def test_reading_gives_the_odds_of_the_first_token_and_the_answer_goes_on_from_there(generator):
    """No token of a prompt that was read is read again, and the answer is what it would have been."""
    prompt = choose_prompt(generator.tokenizer)
    fill = make_fill(prompt, generator)
    found = [passage("The flag is on the north tower.", 1.0), passage("Dogs must be kept on a lead at all times.", 0.9)]
    odds = Reader(generator, fill, prompt).odds("Where is the flag?", found)
    refusal = generator.tokenizer(prompt.refusal, add_special_tokens=False).input_ids[0]
    prompts = [encode_prompt(generator.tokenizer, fill("Where is the flag?", [d.page_content], ())) for d in found]
    for ids, value in zip(prompts, odds, strict=True):
        with torch.inference_mode():
            logits = generator.model(torch.tensor([ids])).logits[0, -1].float()
        others = torch.cat([logits[:refusal], logits[refusal + 1 :]])
        assert value == pytest.approx(float(others.max() - logits[refusal]), abs=0.1)
    lengths, forward = [], generator.model.forward

    def count(input_ids=None, **given):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **given)

    generator.model.forward = count
    try:
        for ids in prompts:
            read = generator.generate_ids([ids])
            assert lengths[0] <= 11  # the last token, and what prompt lookup proposes
            generator.known.pop(tuple(ids))
            lengths.clear()
            assert generator.generate_ids([ids]) == read and lengths[0] >= len(ids)
            lengths.clear()
    finally:
        del generator.model.forward


def test_where_a_confidence_decided_the_model_refuses_no_more(generator):
    prompt = choose_prompt(generator.tokenizer)
    refusal = generator.tokenizer(prompt.refusal, add_special_tokens=False).input_ids[0]
    willing = generator.model_copy(update={"first_bias": {refusal: 100.0}})
    sure, unsure = passage("The flag is red.", 1.0, confidence=0.9), passage("The flag is red.", 1.0)
    pairs = [("What is red?", [sure]), ("What is red?", [unsure])]
    texts = [answer.text for answer in answer_batch(pairs, make_fill(prompt, generator), willing, prompt.refusal)]
    first = generator.tokenizer.decode([refusal]).strip()
    assert texts[1].startswith(first) and not texts[0].startswith(first)


def test_what_the_model_doubts_and_no_passage_supports_is_a_refusal():
    def finish(text, **scores):
        found = [passage("Cosima signs form B7 on 3 May.", 1.0, **scores)]
        return finish_answer(text, "Who signs form B7?", found, "I don't know.")

    doubted = {"confidence": 0.6, "odds": -0.5}
    wrong = finish("Bob signs 12 forms [1]", **doubted)
    assert wrong.refused and wrong.text == "I don't know." and len(wrong.passages) == 1
    assert not finish("Cosima signs it [1]", **doubted).refused
    assert not finish("Bob signs 12 forms [1]", **{**doubted, "odds": 0.5}).refused
    assert not finish("Bob signs 12 forms [1]", odds=-0.5).refused  # no confidence decided: the model itself did


# ------------------------------------------------------------------------------- fit


def candidates(hit_at: int, count: int, answers=("red",)) -> fitting.Candidates:
    texts = [f"the flag is {'red' if n == hit_at else 'there'} {n}" for n in range(count)]
    documents = [passage(text, 1.0 - n / 10, ranks={"search": n + 1}) for n, text in enumerate(texts)]
    return fitting.Candidates(Question("What colour?", answers), documents)


class KnowsRed:
    """A reader that sees what the search does not."""

    def odds(self, question, documents, history=()):
        return [3.0 if "red" in document.page_content else -2.0 for document in documents]


def answer_red(pairs):
    assert all(is_decided(documents) for _, documents in pairs)  # the model must answer: a refusal is never right
    return [check_answer("red [1]" if "red" in d[0].page_content else "blue [1]", d, "No.") for _, d in pairs]


def test_weights_are_fitted_where_reading_knows_more_than_the_search():
    asked = [candidates(n % 2, 2) for n in range(40)]
    reader = fitting.Remembering(KnowsRed())
    ranker = Ranker(Ranking("likelihood", dict(BOTH), dict(BOTH), mode="hybrid"), reader)
    order = fitting.fit_order(asked, ranker)
    assert order["total"] == 1.0 and order["odds"] > 0.02
    fitted = fitting.fit_ranking(asked, Ranker(replace(ranker.ranking, order=order), reader), answer_red)
    assert fitted.answers["odds"] > 0 and fitted.decides
    assert fitted.fitted_on == {"questions": 40, "answerable": 40, "recall@1 before": 0.5, "recall@1": 1.0}
    sure = fitted.confidence({"total": 1.0, "odds": 3.0})
    assert fitted.confidence({"total": 0.9, "odds": -2.0}) < fitted.threshold < sure
    assert fitting.fit_order(asked, Ranker(Ranking("none", {"total": 1.0}))) == {"total": 1.0}


def test_what_becomes_a_refusal_when_it_is_checked_needs_no_threshold():
    asked = []

    def complete(pairs):
        asked.extend(question for question, _ in pairs)
        return [finish_answer("Bob signs 12 forms [1]", question, documents, "No.") for question, documents in pairs]

    doubted, sure = (passage("The flag is red.", 1.0, confidence=1.0, odds=odds) for odds in (-1.0, 1.0))
    known, unknown = Question("What colour?", ("red",)), Question("Who?", ())
    pairs = [(known, sure), (known, doubted), (unknown, sure), (unknown, doubted)]
    scores = fitting.score_answers(pairs, complete)
    assert [score["overall_f1"] for score in scores] == [0.0, 0.0, 0.0, 1.0]
    assert asked == ["What colour?", "What colour?", "Who?"]


def test_too_few_questions_are_said_to_be_too_few():
    ranker = Ranker(Ranking("likelihood", dict(BOTH), dict(BOTH)), KnowsRed())
    with pytest.raises(UserError, match="too few"):
        fitting.fit_order([candidates(0, 2)] * 3, ranker)
    with pytest.raises(UserError, match="0 of 0 answers are right"):
        fitting.fit_ranking([candidates(0, 1, answers=()) for _ in range(12)], ranker, answer_red)


def test_no_passage_is_read_twice_for_a_question():
    reader = Odds({"a": 1.0, "b": 2.0})
    remembering = fitting.Remembering(reader)
    a, b = passage("a", 1.0), passage("b", 1.0)
    assert remembering.odds("Who?", [a]) == [1.0] and remembering.odds("Who?", [a, b]) == [1.0, 2.0]
    assert remembering.odds("Why?", [a]) == [1.0]
    assert reader.asked == [["a"], ["b"], ["a"]]


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"schema": 9}', '{"schema": 1, "rerank": "none", "order": {"size": 1}}'),
        '{"schema": 1, "rerank": "none", "order": {"total": 1}, "threshold": NaN}',
    ],
)
def test_a_damaged_ranking_is_reported(text, tmp_path):
    assert read_ranking(tmp_path) is None
    ranking = Ranking("likelihood", BOTH, {"intercept": 0.5, "odds": 1.0}, 0.4, mode="hybrid")
    write_ranking(tmp_path, ranking)
    assert read_ranking(tmp_path) == ranking
    (tmp_path / "ranking.json").write_text(text)
    with pytest.raises(UserError, match="damaged ranking"):
        read_ranking(tmp_path)


def test_fit_and_then_ask_with_it(tiny_adapter, collection, tmp_path, capsys, monkeypatch):
    """The whole way on a tiny model, whose answers are never right: every other one is taken for right."""
    import shutil

    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    assert rag("ingest", SAMPLE / "documents") == 0
    words = ["--questions", SAMPLE / "questions.jsonl", "--limit", 30, "--max-new-tokens", 4, "--json"]
    assert rag("fit", "--adapter", folder, *words) == 2 and read_ranking(folder) is None
    assert "0 of 25 answers are right: too few" in capsys.readouterr().err

    def score(pairs, complete):
        return [{"answerable": bool(one.answers), "overall_f1": n % 2} for n, (one, _) in enumerate(pairs)]

    monkeypatch.setattr(fitting, "score_answers", score)
    assert rag("fit", "--adapter", folder, *words) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["rerank"] == "likelihood" and {*fitted["answers"]} == {"intercept", "total", "odds"}
    asked = "ask", "--adapter", folder, "--json", "--max-new-tokens", 4, "When may the night shift eat?"
    assert rag(*asked) == 0
    turn = json.loads(capsys.readouterr().out)
    assert 0 < turn["confidence"] < 1 and turn["rerank"] == "likelihood"
    assert rag(*asked, "--rerank", "none") == 0
    assert "confidence" not in json.loads(capsys.readouterr().out)
    assert rag(*asked, "--search", "dense") == 0  # fitted for hybrid search
    output = capsys.readouterr()
    assert "is not used: it was fitted for hybrid search" in output.err and "confidence" not in json.loads(output.out)
    assert rag(*asked, "--search", "dense", "--rerank", "likelihood") == 2
    assert rag("evaluate", "--adapter", folder, "--calibrate", "--output", tmp_path / "out") == 2
    assert "decides when to refuse" in capsys.readouterr().err
    assert rag("fit", "--adapter", "none") == 2 and rag(*asked, "--rerank", "cross-encoder") == 2
    assert "no cross-encoder was trained" in capsys.readouterr().err


def test_fit_knows_the_rows_that_training_held_out(tiny_adapter, rows_file, tmp_path):
    from qlora.model.adapter import read_adapter
    from qlora.training.held_out import split_again

    run = read_adapter(tiny_adapter).run
    training, held_out = split_again(run, "here")
    assert len(held_out) == run["dataset"]["held_out_rows"] and len(training) >= run["dataset"]["training_rows"]
    older = {**run, "dataset": {name: run["dataset"][name] for name in run["dataset"] if name != "held_out_documents"}}
    assert split_again(older, "here") == (training, held_out)
    older["dataset"]["sha256_of_rows"] = "0"
    with pytest.raises(UserError, match="others by now"):
        split_again(older, "here")
