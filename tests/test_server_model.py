"""Answers through a loopback server that speaks the OpenAI protocol and has the tests' own model."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import SAMPLE, rag

from qlora.answering.server_model import NO_KEY, choose_model, find_others

QUESTION = "Who checks the kettle?"
KEY = "sk-secret-key"


class Server(ThreadingHTTPServer):
    """One model, or several; `requests` keeps what was asked, `fault` is what goes wrong.

    `cards` says more about a model, by name; `most_busy` counts the requests that were there at the same time.
    """

    def __init__(self, generator, names=("tuned",), fault: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.generator, self.names, self.fault, self.requests = generator, names, fault, []
        self.cards = {name: {} for name in names}
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.server.fault == "list":
            return self.send(500, {"error": {"message": "no cache"}})
        if self.server.fault == "key" and self.headers["Authorization"] != f"Bearer {KEY}":
            given = self.headers["Authorization"].removeprefix("Bearer ")
            return self.send(401, {"error": {"message": f"Incorrect API key: {given}"}})
        known = {"object": "model", "created": 0, "owned_by": "us"}
        cards = [{"id": name, **known, **more} for name, more in self.server.cards.items()]
        return self.send(200, {"object": "list", "data": cards})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **body})
        self.name = self.server.names[0] if self.server.fault == "another" else body["model"]
        if self.server.fault == "busy" and len(self.server.requests) % 2:
            return self.send(503, {"error": {"message": "loading"}})
        if self.server.fault == "then gone" and len(self.server.requests) > 10:
            return self.send(400, {"error": {"message": "gone"}})
        if body["model"] not in self.server.names:
            return self.send(404, {"error": {"message": f"no model {body['model']}"}})
        if self.server.fault == "window":
            return self.send(400, {"error": {"message": "This model's maximum context length is 8 tokens."}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.server.fault == "in the middle":
            return self.write({"error": {"message": "CUDA out of memory"}})
        return self.answer(body)

    def answer(self, body: dict) -> None:
        """Streams what the model says, a chunk a piece, then the token counts."""
        from langchain_core.messages import convert_to_messages

        usage, self.server.busy = None, self.server.busy + 1
        self.server.most_busy = max(self.server.most_busy, self.server.busy)
        with self.server.lock:  # one model
            for chunk in self.server.generator.stream(convert_to_messages(body["messages"])):
                self.write({"choices": [{"index": 0, "delta": {"role": "assistant", "content": chunk.text}}]})
                usage = chunk.usage_metadata or usage
        self.server.busy -= 1
        self.write({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        extra = 5 if self.server.fault == "template" else 0
        tokens = {"prompt_tokens": usage["input_tokens"] + extra, "completion_tokens": usage["output_tokens"]}
        self.write({"choices": [], "usage": {**tokens, "total_tokens": sum(tokens.values())}})
        self.wfile.write(b"data: [DONE]\n\n")

    def write(self, event: dict) -> None:
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": self.name}
        self.wfile.write(f"data: {json.dumps({**head, **event})}\n\n".encode())

    def send(self, status: int, body: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@contextlib.contextmanager
def serving(generator, **options):
    server = Server(generator, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def generator(tiny_base):
    from qlora.answering.generator import Generator
    from qlora.model.base_model import load_base_model, load_tokenizer
    from qlora.prompt import choose_prompt

    tokenizer = load_tokenizer(str(tiny_base))
    choose_prompt(tokenizer)
    return Generator(model=load_base_model(str(tiny_base)), tokenizer=tokenizer, max_new_tokens=12)


def ask(*words) -> int:
    return rag("ask", QUESTION, "--max-new-tokens", 12, *words)


def test_a_server_answers_as_the_model_here_does(generator, tiny_base, collection, capsys):
    same = "--adapter", "none", "--base-model", tiny_base, "--json", "--top-k", 1  # fits the tiny window
    ask(*same)
    here = json.loads(capsys.readouterr().out)
    with serving(generator) as server:
        assert ask(*same, "--base-url", server.url) == 0
        output = capsys.readouterr()
        assert ask(*same, "--base-url", server.url, "--refusal-bias", -1.5) == 2
    assert "a refusal bias is for the first token" in capsys.readouterr().err
    assert [asked.get("logit_bias") for asked in server.requests] == [None]
    there = json.loads(output.out.splitlines()[0])
    assert here["tokens"]["completion"] == 12
    for key in ("answer", "refused", "citations", "passages", "tokens"):
        assert there[key] == here[key]
    assert there["model"] == {**here["model"], "server": server.url, "name": "tuned"}
    asked = server.requests[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "tuned" and asked["stream"]
    assert (asked["max_tokens"], asked["temperature"], asked["seed"]) == (12, 0.0, 0)
    assert "chat template" not in output.err


def test_another_chat_template_is_noticed(generator, tiny_adapter, collection, capsys):
    with serving(generator, fault="template") as server:
        assert rag("ask", QUESTION, "And then?", "--adapter", tiny_adapter, "--base-url", server.url) == 0
    assert capsys.readouterr().err.count("its chat template differs") == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("window", "refused with 400 (This model's maximum context length is 8 tokens.)"),
        ("in the middle", "the server failed (CUDA out of memory)"),
    ],
)
def test_failures_while_answering(generator, tiny_adapter, collection, capsys, fault, said):
    with serving(generator, fault=fault) as server:
        assert ask("--adapter", tiny_adapter, "--base-url", server.url) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error


def test_the_key_is_sent_and_never_shown(generator, tiny_adapter, collection, capsys, monkeypatch):
    with serving(generator, fault="key") as server:
        monkeypatch.setenv("QLORA_API_KEY", "sk-wrong-key")
        assert ask("--adapter", tiny_adapter, "--base-url", server.url) == 2
        error = capsys.readouterr().err
        assert "refused with 401" in error and "sk-wrong-key" not in error
        monkeypatch.setenv("QLORA_API_KEY", KEY)
        assert ask("--adapter", tiny_adapter, "--base-url", server.url) == 0
    output = capsys.readouterr()
    assert KEY not in output.out + output.err


def test_the_model_is_named_or_the_only_one(generator, tiny_adapter, collection, capsys):
    with serving(generator, names=("a", "b")) as server:
        assert ask("--adapter", tiny_adapter, "--base-url", server.url) == 2
        assert "name one with --model NAME: a, b" in " ".join(capsys.readouterr().err.split())
        assert ask("--adapter", tiny_adapter, "--base-url", server.url, "--model", "c") == 2
        assert "refused with 404 (no model c)" in capsys.readouterr().err
        assert ask("--adapter", tiny_adapter, "--base-url", server.url, "--model", "b") == 0
    assert [request["model"] for request in server.requests] == ["c", "b"]


def test_a_server_that_cannot_list_its_models_answers_with_the_one_named(generator, tiny_adapter, collection, capsys):
    with serving(generator, fault="list") as server:
        assert ask("--adapter", tiny_adapter, "--base-url", server.url) == 2
        assert "refused with 500 (no cache)" in capsys.readouterr().err
        assert ask("--adapter", tiny_adapter, "--base-url", server.url, "--model", "tuned") == 0


def test_an_unreachable_server(tiny_adapter, collection, capsys):
    with serving(None) as server:
        pass
    assert ask("--adapter", tiny_adapter, "--base-url", server.url) == 2
    assert "the server cannot be reached" in capsys.readouterr().err


def test_mistakes_of_the_call_are_told_together(tiny_adapter, collection, capsys):
    url = "http://me:hunter2@host/v1"
    assert ask("--adapter", tiny_adapter, "--merge-for-speed", "--base-url", url) == 2
    error = capsys.readouterr().err
    assert "cannot be merged here" in error and "a password in the address" in error and "hunter2" not in error
    assert ask("--adapter", "none", "--base-model", "x", "--merge-for-speed", "--model", "y") == 2
    error = capsys.readouterr().err
    assert "no adapter to merge" in error and "--base-url" in error
    assert ask("--adapter", tiny_adapter, "--base-url", "ftp://host") == 2
    assert "not the address of a server" in capsys.readouterr().err


def test_the_window_of_a_lora_module_is_its_parent_s(generator):
    with serving(generator, names=("base", "mine")) as server:
        server.cards = {"base": {"max_model_len": 2048}, "mine": {"parent": "base"}}
        assert choose_model(server.url, NO_KEY, "mine") == ("mine", 2048, {"base"})
        server.cards["mine"]["max_model_len"] = 1024
        assert choose_model(server.url, NO_KEY, "mine")[1] == 1024


def test_another_model_of_the_server_is_not_taken_for_the_one_asked(generator, tiny_adapter, collection, capsys):
    with serving(generator, names=("a", "b"), fault="another") as server:
        assert ask("--adapter", tiny_adapter, "--base-url", server.url, "--model", "b") == 2
    assert "b was asked, and a answers" in capsys.readouterr().err


def test_a_model_may_have_several_names():
    named = {"gpt": None, "gpt-2026-01-01": None, "other": None}
    assert find_others("gpt", {name: SimpleNamespace() for name in named}) == {"other"}
    roots = {"a": "/llama", "b": "/llama", "mine": "/adapter"}  # vLLM: --served-model-name a b
    assert find_others("a", {name: SimpleNamespace(root=root) for name, root in roots.items()}) == {"mine"}


# ------------------------------------------------------------------------------- evaluate


def evaluate(folder, tiny_base, *words) -> int:
    """Sixteen questions, from one passage each."""
    lines = (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines(True)[:16]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    model = "--adapter", "none", "--base-model", tiny_base, "--contexts", "retrieved", "--top-k", 1
    asked = "--questions", folder / "questions.jsonl", "--max-new-tokens", 12
    return rag("evaluate", *model, *asked, *words)


def read_scores(folder) -> list:
    lines = map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    return sorted((line["question"], line["answer"], line["scores"]["overall_f1"]) for line in lines)


def test_an_evaluation_asks_a_server_many_questions_at_a_time(
    generator, tiny_base, documents, collection, tmp_path, capsys
):
    """With the scores of the model here, although every other request fails once; a stopped one goes on."""
    assert rag("ingest", documents) == 0
    assert evaluate(tmp_path, tiny_base, "--models", "base", "--output", tmp_path / "here", "--batch-size", 1) == 0
    there = "--output", tmp_path / "there"
    with serving(generator, fault="busy") as server:
        assert evaluate(tmp_path, tiny_base, *there, "--base-url", server.url, "--batch-size", 4) == 0
        assert 1 < server.most_busy <= 4 and len(server.requests) > 16
    assert read_scores(tmp_path / "there") == read_scores(tmp_path / "here")
    settings = json.loads((tmp_path / "there" / "evaluation.json").read_text())["settings"]
    assert settings["server_model"] == "tuned" and settings["refusal_bias"] == 0
    again = "--output", tmp_path / "again", "--batch-size", 1
    with serving(generator, fault="then gone") as server:
        assert evaluate(tmp_path, tiny_base, *again, "--base-url", server.url) == 2
        assert "refused with 400 (gone)" in capsys.readouterr().err
        server.fault, server.requests = "", []
        assert evaluate(tmp_path, tiny_base, *again, "--base-url", server.url) == 0
        assert len(server.requests) == 6  # the first 10 of 16 were kept
    assert read_scores(tmp_path / "again") == read_scores(tmp_path / "here")
    with serving(generator) as server:  # another server may have the model in another precision
        assert evaluate(tmp_path, tiny_base, *again, "--base-url", server.url) == 0
        assert len(server.requests) == 16


def test_a_server_has_one_of_the_two_models(tiny_adapter, collection, capsys):
    words = "evaluate", "--adapter", tiny_adapter, "--base-url", "http://127.0.0.1:9/v1"
    assert rag(*words, "--models", "base", "tuned") == 2
    assert "the tuned one or the base model, not both" in capsys.readouterr().err
