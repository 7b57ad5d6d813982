"""Cross-encoders: a tiny one on this machine, one on a server, and what is not one."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import rag

from qlora import presets
from qlora.console import UserError
from qlora.model.base_model import resolve_embedding_model
from qlora.retrieval.reranker import check_reranker, open_reranker
from qlora.training.reranker import mine_pairs, train_reranker
from qlora.training.rows import Row

TEXTS = ["The gate closes at nine.", "The ferry is red.", "Dogs pay half."]


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A folder with a random cross-encoder of two narrow layers, whose window is 32 tokens."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("reranker") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(resolve_embedding_model(presets.EMBEDDED_EMBEDDER))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(tokenizer), **sizes, max_position_embeddings=32, num_labels=1, initializer_range=0.5
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_scores_of_one_and_of_many_and_passages_longer_than_the_window(cross_encoder, capsys):
    check_reranker(str(cross_encoder))
    score = open_reranker(str(cross_encoder))
    many = score("When does the gate close?", TEXTS)
    assert len(many) == 3 and len(set(many)) == 3
    assert score("When does the gate close?", TEXTS[:1]) == pytest.approx(many[:1], abs=0.02)
    assert score.shortened == 0
    assert len(score("When?", [*TEXTS, "word " * 100, "word " * 200])) == 5  # not an index error
    assert score.shortened == 2
    assert capsys.readouterr().err.count("window of 32 tokens are shortened") == 1


def test_what_is_no_cross_encoder_is_named(cross_encoder, tiny_base, tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM with 2 labels is not a cross-encoder"):
        check_reranker(str(tiny_base))
    with pytest.raises(UserError, match="reranker not found"):
        check_reranker(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--rerank"):
        check_reranker(str(tmp_path))
    with pytest.raises(UserError, match="without a password"):
        check_reranker("http://me:secret@127.0.0.1/rerank")


@contextmanager
def answering(make_answer):
    """The address of a real server that answers with what `make_answer` makes of the request."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(asked)
            status, answer = make_answer(asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/rerank", seen
    finally:
        server.shutdown()
        server.server_close()


def by_length(asked):
    """As Text Embeddings Inference answers: best first, with indices."""
    rows = [{"index": n, "score": float(len(text))} for n, text in enumerate(asked["texts"])]
    return 200, sorted(rows, key=lambda row: -row["score"])


def by_length_as_vllm(asked):
    rows = [{"index": n, "relevance_score": float(len(text))} for n, text in enumerate(asked["documents"])]
    return 200, {"id": "x", "results": rows[::-1]}


@pytest.mark.parametrize("make_answer", [by_length, by_length_as_vllm])
def test_a_server_s_scores_come_in_the_order_of_the_passages(make_answer):
    with answering(make_answer) as (url, seen):
        assert open_reranker(url)("When?", TEXTS) == [24.0, 17.0, 14.0]
    assert seen[0]["query"] == "When?"
    with pytest.raises(UserError, match="the reranker failed"):
        open_reranker(url)("When?", TEXTS)
    for answer in ((500, {}), (200, [{"index": 0, "score": 1.0}]), (200, {"results": [{"index": 0}] * 3}), (200, 7)):
        with answering(lambda asked, answer=answer: answer) as (url, _), pytest.raises(UserError, match="rerank"):
            open_reranker(url)("When?", TEXTS)


def test_search_and_sweep_take_a_reranker(collection, documents, cross_encoder, tmp_path, capsys):
    assert rag("ingest", documents) == 0
    asked = "search", "When does the ferry sail?", "--json", "--top-k", 3
    with answering(by_length) as (url, seen):
        assert rag(*asked, "--rerank", url) == 0
        longest_first = [len(p["text"]) for p in json.loads(capsys.readouterr().out)["passages"]]
        assert longest_first == sorted(longest_first, reverse=True) and len(seen[0]["texts"]) > 3
        assert rag("search", "When does the ferry sail?", "--explain", "--rerank", url) == 0
        assert "search rank" in capsys.readouterr().out
    assert rag(*asked, "--rerank", url) == 2
    assert "the reranker failed" in capsys.readouterr().err
    assert rag(*asked, "--rerank", cross_encoder) == 0
    assert rag(*asked, "--rerank", "likelihood") == 2
    assert "no adapter reads here" in capsys.readouterr().err
    questions = tmp_path / "q.jsonl"
    lines = [{"question": f"What is said about {topic}?", "answers": [topic]} for topic in ("dogs", "bicycles")]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = "--questions", questions, "--output", tmp_path / "sweep", "--json"
    assert rag("sweep", f"rerank=none,{cross_encoder}", *words) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {row["value"] for row in result["rows"]} == {"none", str(cross_encoder)}


def test_a_server_that_is_down_leaves_serve_the_order_of_the_search(site):
    from qlora.answering.chain import Finding
    from qlora.answering.ranker import Ranker
    from qlora.answering.ranking import Ranking

    service = site.worker.answer.__self__
    gone = "http://127.0.0.1:9/rerank"
    ranker = Ranker(Ranking(gone, {"cross": 1.0}), score=open_reranker(gone), keeps_going=True)
    found = Finding(service.finding.search, 2, ranker).find("When does the ferry sail?", 2)
    plain = service.finding.find("When does the ferry sail?", 2)
    assert [d.page_content for d in found] == [d.page_content for d in plain]
    assert "the reranker failed" in found[0].metadata["unranked"]


def test_a_cross_encoder_of_one_s_own_learns_from_hard_negatives(cross_encoder, tmp_path, capsys):
    """Right passages name the word of the question; the others are what a search finds beside them."""
    from langchain_core.documents import Document

    words = ["oak", "rowan", "hazel", "birch", "larch", "maple", "cedar", "willow"]
    rows = [Row(f"Where is the {word}?", f"at {word}", f"The {word} stands at {word}.") for word in words]
    rows.append(Row("Where is the elm?", "I don't know.", "Nobody knows an elm."))
    found = [Document(row.context) for row in rows]
    pairs = mine_pairs(rows, lambda question, k: found[:k], "I don't know.")
    assert sum(label for *_, label in pairs) == len(words) and len(pairs) == 4 * len(words) + 1
    for question, text, label in pairs:
        word = question.split()[-1].rstrip("?")
        assert (label == 1) == (f"at {word}" in text)
    folder = tmp_path / "reranker"
    folder.mkdir()
    train_reranker(pairs * 4, str(cross_encoder), folder, seed=0)
    assert re.search(r"pairs of question and passage: [01]\.\d\d of the loss", capsys.readouterr().err)
    with pytest.raises(UserError, match="no pairs to learn from"):
        train_reranker([pair for pair in pairs if pair[2]], str(cross_encoder), folder, seed=0)
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    assert list(tmp_path.iterdir()) == [folder]
    check_reranker(str(folder))
    assert len(open_reranker(str(folder))("Where?", TEXTS)) == 3
