"""The HTTP API of a real server, asked by real clients. The model is the tests' own; what it says is a quotation."""

import contextlib
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest
from conftest import rag
from serving_site import MODEL, QUESTION, serving

from qlora.answering.continuous_batch import ContinuousBatch
from qlora.answering.ranker import Ranker
from qlora.answering.ranking import Ranking
from qlora.serving import chat_routes, server
from qlora.serving.guard import Rules
from qlora.serving.worker import BATCH, Full, Job, Lent, Worker


@pytest.fixture
def address(site):
    with serving(site) as url:
        yield url


def connect(url: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


def ask(url: str, question: str = QUESTION, **options):
    messages = [{"role": "user", "content": question}]
    return connect(url).chat.completions.create(model=MODEL, messages=messages, **options)


# ------------------------------------------------------------------------------- OpenAI's clients


def test_the_openai_client_gets_answers_with_checked_citations(address, site):
    assert [model.id for model in connect(address).models.list()] == list(site.models)
    answer = ask(address)
    text = answer.choices[0].message.content
    assert text.endswith("[1]") and not answer.refused and answer.unsupported == []
    (cited,) = answer.citations
    assert cited["n"] == 1 and cited["source"].endswith(".md") and cited["supported"] and cited["score"] > 0
    assert text.removesuffix(" [1]").rstrip(".") in cited["sentence"] and cited["line"] >= 1 and cited["heading"]
    assert answer.usage.prompt_tokens > 50 and answer.usage.completion_tokens > 3
    line = json.loads(site.trace.read_text())
    assert line["answer"] == text and line["model"] == MODEL and line["citations"][0]["source"] == cited["source"]
    passage = httpx.get(f"{address}/documents/{cited['source']}/passages/{cited['passage_id']}", params=cited).json()
    start, end = passage["span"]
    assert " ".join(passage["text"][start:end].split()) == cited["sentence"]


def test_a_streamed_answer_is_the_same_piece_by_piece(address):
    whole = ask(address)
    chunks = list(ask(address, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len([p for p in pieces if p]) > 3
    last = next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert last.citations == whole.citations and last.answer == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_langchain_s_client_asks_in_several_turns(address):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model=MODEL, max_retries=0)
    messages = [("system", "Be brief."), ("human", QUESTION), ("ai", "The mate."), ("human", "And how often?")]
    assert model.invoke(messages).text.endswith("[1]")
    assert "".join(chunk.text for chunk in model.stream(messages)).endswith("[1]")


def test_tokens_and_stop_texts_end_an_answer(address):
    assert ask(address, max_tokens=2).usage.completion_tokens == 2
    whole = ask(address).choices[0].message.content
    word = whole.split()[3]
    assert word not in ask(address, stop=[word]).choices[0].message.content


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('### Task:\nGenerate a title.\nJSON: { "title": "x" }\nUSER: Who sails?', {"title": "Who sails?"}),
        ('### Task:\nGenerate tags.\nJSON: { "tags": ["a"] }', {"tags": []}),
        ('### Task:\nSuggest questions.\nJSON: { "follow_ups": ["a"] }', {"follow_ups": []}),
    ],
)
def test_what_a_chat_program_asks_beside_questions_is_not_searched(address, site, text, wanted):
    answer = ask(address, text)
    assert json.loads(answer.choices[0].message.content) == wanted and not site.trace.exists()
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(address, text, stream=True))
    assert json.loads(streamed) == wanted


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "gpt-9", "messages": [{"role": "user", "content": "Who?"}]}, 404, "there is tuned/ferry"),
        ({"model": MODEL, "messages": []}, 400, "messages"),
        ({"model": MODEL, "messages": [{"role": "assistant", "content": "Who?"}]}, 400, "must be a question"),
        ({"model": MODEL, "messages": [{"role": "user", "content": " "}]}, 400, "must be a question"),
        ({"model": MODEL, "messages": [{"role": "user", "content": "x" * 20_001}]}, 400, "longer than 20000"),
        ({"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "temperature": -1}, 400, "temperature"),
        ({"messages": "Who?"}, 400, "model"),
        (b"{broken", 400, "JSON"),
        ({"model": MODEL, "messages": [{"role": "user", "content": "x" * 2_000_000}]}, 413, "too large"),
    ],
)
def test_mistakes_have_openai_s_shape_and_a_sentence(address, body, status, said):
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{address}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_faults_of_the_server_are_told_without_their_details(site, monkeypatch, caplog):
    def broken(*given):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(site.worker, "answer", broken)
    with serving(site) as url:
        with pytest.raises(openai.InternalServerError, match="failed") as caught:
            ask(url)
        assert "/secret" not in str(caught.value)
        monkeypatch.setattr(site.feedback, "add", broken)
        response = httpx.post(f"{url}/feedback", json={"question": "Who?", "rating": "good"})
        assert response.status_code == 500 and "/secret" not in response.text


# ------------------------------------------------------------------------------- many at once


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("said", [None, "The walrus plays 47 accordions [1]"])
def test_a_doubted_answer_is_checked_before_anyone_reads_it(site, quoting, said, jobs):
    """Where the model would rather have refused, what the passages do not support is never shown, piece by piece."""

    service, generator = site.worker.answer.__self__, quoting
    if said:
        ids = generator.tokenizer(said, add_special_tokens=False).input_ids
        generator = generator.model_copy(update={"quote": lambda prompt: ids})
    reader = SimpleNamespace(odds=lambda question, documents, history: [-1.0] * len(documents))
    ranking = Ranking("likelihood", {"total": 1.0, "odds": 0.1}, {"intercept": 1.0}, threshold=0.5)
    finding = replace(service.finding, ranker=Ranker(ranking, reader))
    asked = [Job(QUESTION, emit=[].append) for _ in range(jobs)]
    service = replace(service, finding=finding, generator=generator)
    service.answer(asked)
    events = [job.emit.__self__ for job in asked]
    for piece, turn in events:
        assert piece == turn.answer.text and turn.answer.refused == bool(said)
        assert said is None or piece == service.prompt.refusal


def test_askers_get_their_own_answers_from_one_batch(site, quoting, monkeypatch):
    """As many different questions as fit a batch, and more; each answer is what its asker gets alone."""
    sizes = []
    step = ContinuousBatch.step
    monkeypatch.setattr(ContinuousBatch, "step", lambda batch: (sizes.append(len(batch)), step(batch)))
    topics = re.findall(r"\w+", "lifejackets crew bicycles fares passes luggage tide bell slips marks watches dogs")
    questions = [f"What is said about {topic}?" for topic in topics]
    with serving(site) as url, ThreadPoolExecutor(12) as pool:
        alone = [ask(url, question).choices[0].message.content for question in questions]
        together = list(pool.map(lambda question: ask(url, question).choices[0].message.content, questions))
        streamed = list(pool.map(lambda q: list(ask(url, q, stream=True)), questions))
    assert together == alone and len(set(alone)) > 5
    pieces = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices) for chunks in streamed]
    assert pieces == alone
    assert 1 < max(sizes) <= BATCH


def test_one_question_s_fault_ends_no_other_answer(site, monkeypatch, caplog):
    """Of several that are answered together one cannot be searched."""
    service = site.worker.answer.__self__

    def search(text: str, k: int):
        if "unicorns" in text:
            raise RuntimeError("no such thing")
        return service.finding.search(text, k)

    monkeypatch.setattr(site.worker, "answer", replace(service, finding=replace(service.finding, search=search)).answer)
    events = {question: [] for question in ("What is said about the crew?", "And unicorns?", "What do bicycles pay?")}
    for question, seen in events.items():
        site.worker.submit(Job(question, emit=seen.append))
    site.worker.stop()
    first, failed, last = events.values()
    assert isinstance(failed[-1], RuntimeError) and len(failed) == 1
    assert first[-1].answer.text.endswith("[1]") and last[-1].answer.text.endswith("[1]")
    assert "".join(last[:-1]) == last[-1].answer.text


def test_a_full_queue_says_when_to_come_back(site, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(site.worker, "answer", lambda jobs, more: (begun.set(), go_on.wait(20)))
    monkeypatch.setattr(site.worker, "size", 2)
    monkeypatch.setattr(chat_routes, "SECONDS", 5)
    with serving(site) as url, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, url)]
        assert begun.wait(20)  # later ones would be answered together with it
        waiting += [pool.submit(ask, url) for _ in range(2)]
        until = time.monotonic() + 4
        while len(site.worker.waiting) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(url)
        assert caught.value.response.headers["Retry-After"] == "5"
        for one in waiting:
            assert isinstance(one.exception(), openai.InternalServerError)  # it took too long
        go_on.set()


@pytest.mark.parametrize("stream", [True, False])
def test_an_asker_who_goes_away_frees_the_place_at_once(site, quoting, monkeypatch, stream):
    slow = quoting.model_copy(update={"pause": 0.3, "steps": []})
    monkeypatch.setattr(site.worker, "answer", replace(site.worker.answer.__self__, generator=slow).answer)
    with serving(site) as url:
        client = connect(url, timeout=httpx.Timeout(60, read=1.0))
        messages = [{"role": "user", "content": QUESTION}]
        with contextlib.suppress(openai.APITimeoutError):  # sampled: without prompt lookup every token is a step
            given = {"model": MODEL, "messages": messages, "temperature": 0.01}
            answer = client.chat.completions.create(**given, stream=stream)
            next(chunk for chunk in answer if chunk.choices[0].delta.content)
            answer.close()
        answered = threading.Event()
        site.worker.submit(Job(QUESTION, max_tokens=1, emit=lambda event: answered.set()))
        assert answered.wait(60)
    assert 0 < max(slow.steps) < 10  # of 15 or more


def test_the_worker_answers_what_waits_before_it_stops():
    answered = []
    worker = Worker(lambda jobs, more: answered.extend(job.question for job in jobs), size=3)
    for n in range(3):
        worker.submit(Job(str(n), temperature=0.5 * (n == 1)))
    with pytest.raises(Full):
        worker.submit(Job("3"))
    worker.start()
    worker.stop()
    assert sorted(answered) == ["0", "1", "2"]
    with pytest.raises(Full):
        worker.submit(Job("4"))


def test_who_comes_later_joins_only_while_nobody_else_waits_longer():
    """Jobs that can be answered together are, but a stream of them does not keep another one waiting."""
    rounds = []

    def answer(jobs, more):
        rounds.append([job.question for job in jobs])
        if len(rounds) == 1:
            worker.submit(Job("late"))
            assert more(8) == []  # the base model is asked for something since before
        if len(rounds) == 2:
            worker.submit(Job("base again", tuned=False))
            rounds.append([job.question for job in more(8)])  # the oldest is of another kind again

    worker = Worker(answer, size=8)
    for name in ("a", "base", "b"):
        worker.submit(Job(name, tuned=name != "base"))
    worker.start()
    worker.stop()
    assert rounds == [["a", "b"], ["base"], [], ["late"], ["base again"]]


def test_other_threads_borrow_the_embedding_model():
    calls, tokenizer = [], object()

    class Embedder:
        _client = SimpleNamespace(tokenizer=[tokenizer], max_seq_length=256)

        def embed_documents(self, texts):
            calls.append((threading.current_thread().name, len(texts)))
            return [[float(text)] for text in texts]

        def embed_query(self, text):
            raise ValueError(text)

    worker = Worker(lambda jobs, more: None, size=1)
    worker.start()
    lent = Lent(worker, Embedder())
    assert lent.embed_documents([str(n) for n in range(40)]) == [[float(n)] for n in range(40)]
    assert calls == [("answers 0", 16), ("answers 0", 16), ("answers 0", 8)]
    assert lent._client.tokenizer is not Embedder._client.tokenizer and lent._client.max_seq_length == 256
    with pytest.raises(ValueError, match="why"):
        lent.embed_query("why")
    worker.stop()
    with pytest.raises(Full):
        lent.embed_query("too late")


# ------------------------------------------------------------------------------- documents and feedback


def upload(url: str, *files, **query):
    return httpx.post(f"{url}/documents", files=[("files", file) for file in files], params=query, timeout=60)


def test_documents_are_added_asked_about_and_deleted(address, site):
    before = httpx.get(f"{address}/documents").json()["documents"]
    text = "# Otter\n\nThe otter of the boathouse is called Bramble. She eats 3 herrings each noon."
    done = upload(address, ("otter.md", text.encode())).json()["files"]
    assert done == [{"name": "otter.md", "passages": 1}]
    assert "Bramble" in ask(address, "What is the otter of the boathouse called?").choices[0].message.content
    found = httpx.post(f"{address}/search", json={"question": "otter", "top_k": 1}).json()["passages"]
    assert found[0]["source"] == "otter.md" and "Bramble" in found[0]["text"]
    assert "of this name" in upload(address, ("otter.md", b"other")).json()["files"][0]["error"]
    changed = upload(address, ("otter.md", b"The otter is called Sedge, as all know by now."), replace=True).json()
    assert changed["files"][0]["passages"] == 1
    assert httpx.delete(f"{address}/documents/otter.md").json() == {"deleted": "otter.md"}
    assert httpx.get(f"{address}/documents").json()["documents"] == before
    assert httpx.delete(f"{address}/documents/otter.md").status_code == 404
    assert not list(site.library.folder.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "stored", "error"),
    [
        ("../../etc/passwd.txt", b"A short text about herrings.", "passwd.txt", None),
        ("C:\\docs\\a b.txt", b"A short text about herrings.", "a b.txt", None),
        ("x<script>.txt", b"A short text about herrings.", "x_script_.txt", None),
        ("pro\u0301logo.txt", b"A short text about herrings.", "pr\u00f3logo.txt", None),
        ("a.exe", b"MZ", "a.exe", "type .exe"),
        ("broken.pdf", b"not a PDF", "broken.pdf", "not a readable"),
        ("empty.txt", b"", "empty.txt", "no text"),
    ],
)
def test_a_client_s_name_is_never_a_path_and_bad_files_are_explained(address, site, name, content, stored, error):
    (done,) = upload(address, (name, content)).json()["files"]
    assert done["name"] == stored
    if error:
        assert error in done["error"] or "PDF" in done["error"]
        assert not site.library.folder.exists() or not list(site.library.folder.iterdir())
    else:
        assert done["passages"] == 1 and (site.library.folder / stored).is_file()


def test_reading_goes_on_where_nothing_may_be_changed(site):
    with serving(replace(site, library=replace(site.library, read_only=True))) as url:
        assert upload(url, ("a.txt", b"text")).status_code == 403
        assert httpx.delete(f"{url}/documents/ferry/fares-and-passes.md").status_code == 403
        assert httpx.get(f"{url}/documents").json()["read_only"]
        assert ask(url).citations


def test_feedback_is_kept_and_given_out(address):
    judgement = {"question": QUESTION, "answer": "The cook.", "rating": "bad", "right_answer": "The mate"}
    key = httpx.post(f"{address}/feedback", json=judgement).json()["id"]
    (line,) = [json.loads(line) for line in httpx.get(f"{address}/feedback.jsonl").text.splitlines()]
    assert line["id"] == key and line["given"] and judgement.items() <= line.items()
    assert httpx.post(f"{address}/feedback", json={**judgement, "rating": "maybe"}).status_code == 400


# ------------------------------------------------------------------------------- safe


def test_other_sites_and_other_names_are_refused(address, site):
    port = address.rpartition(":")[2]
    assert httpx.get(f"{address}/health", headers={"Host": "evil.example"}).status_code == 421
    assert httpx.get(f"{address}/health", headers={"Host": f"localhost:{port}"}).status_code == 200
    foreign = {"Origin": "https://evil.example"}
    assert httpx.post(f"{address}/search", json={"question": "x"}, headers=foreign).status_code == 403
    assert httpx.get(f"{address}/documents", headers={"Origin": address}).status_code == 200
    allowed = replace(site, rules=replace(site.rules, origins=("https://chat.example",)))
    with serving(allowed) as url:
        friend = {"Origin": "https://chat.example"}
        response = httpx.get(f"{url}/documents", headers=friend)
        assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert httpx.options(f"{url}/search", headers=friend).status_code == 200
        assert httpx.get(f"{url}/documents", headers=foreign).status_code == 403


def test_a_key_opens_everything_but_the_page(site):
    with serving(replace(site, rules=Rules("0.0.0.0", "right"))) as url:
        for path in ("/documents", "/v1/models", "/about", "/feedback.jsonl", "/docs", "/openapi.json"):
            assert httpx.get(f"{url}{path}").status_code == 401, path
            assert httpx.get(f"{url}{path}", headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(f"{url}{path}", headers={"Authorization": "Bearer right"}).status_code == 200, path
        for path in ("/", "/static/app.js", "/health"):
            assert httpx.get(f"{url}{path}").status_code == 200


def test_headers_keep_scripts_of_others_out(address):
    for path in ("/", "/static/app.js", "/health", "/nowhere", "/docs"):
        headers = httpx.get(f"{address}{path}").headers
        assert headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert headers["X-Content-Type-Options"] == "nosniff"
    page = httpx.get(f"{address}/").text
    assert "http" not in page and "<script>" not in page and not re.search(r"\son\w+=", page)
    docs = httpx.get(f"{address}/docs").text
    assert "/v1/chat/completions" in docs and "<script" not in docs


def test_another_host_needs_a_key_and_a_taken_port_is_told(monkeypatch, collection, capsys, tiny_adapter):
    assert rag("serve", "--adapter", tiny_adapter, "--host", "0.0.0.0") == 2
    assert "QLORA_SERVE_KEY" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert rag("serve", "--adapter", tiny_adapter, "--port", taken.getsockname()[1]) == 2
    assert "cannot be opened (address already in use)" in capsys.readouterr().err
    monkeypatch.setenv("QLORA_SERVE_KEY", "x")
    server.check_options("0.0.0.0", 0)
