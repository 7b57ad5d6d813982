"""A server of the tests' own: its model is random, but says the first sentence of the passage, and cites it."""

import contextlib
import re
import socket
import threading
import time

import uvicorn
from conftest import rag

from qlora.answering.generator import Generator
from qlora.model import base_model
from qlora.prompt import choose_prompt
from qlora.serving.app import Site, make_app
from qlora.serving.document_routes import Library
from qlora.serving.guard import Rules
from qlora.serving.service import Service
from qlora.serving.worker import Lent, Worker

MODEL = "tuned/ferry"
QUESTION = "Who inspects the lifejackets?"


class Quoting(Generator):
    """The random model, made to say the beginning of passage [1] and to cite it; the pause makes it slow."""

    pause: float = 0.0
    steps: list[int] = []  # of every answer, the tokens so far

    def bias_first(self, start: int):
        answers: list[list[int]] = []

        def process(ids, logits):
            if not answers:
                prompts = self.tokenizer.batch_decode(ids[:, :start], skip_special_tokens=True)
                answers.extend(self.quote(prompt) for prompt in prompts)
            time.sleep(self.pause)
            self.steps.append(ids.shape[1] - start)
            for row, answer in enumerate(answers):
                at = ids.shape[1] - start
                token = answer[at] if at < len(answer) else self.tokenizer.eos_token_id
                logits[row, :] = -1e9
                logits[row, token] = 0
            return logits

        return process

    def quote(self, prompt: str) -> list[int]:
        passage = prompt.rpartition("[1] ")[2].partition("### Instruction:")[0]
        sentence = re.split(r"(?<=[.!?])\s", " ".join(passage.split()))[0]
        return self.tokenizer(f"{' '.join(sentence.split()[:12])} [1]", add_special_tokens=False).input_ids


def make_generator(tiny_base) -> Quoting:
    tokenizer = base_model.load_tokenizer(str(tiny_base))
    choose_prompt(tokenizer)
    return Quoting(model=base_model.load_base_model(str(tiny_base)), tokenizer=tokenizer, max_new_tokens=60)


def make_site(generator, documents, folder) -> Site:
    """The parts of a server over the ferry's documents, in the tests' database."""
    import rag_qlora
    from qlora.cli.rag_flags import resolve_arguments
    from qlora.retrieval.ingest import choose_splitting

    assert rag("ingest", documents) == 0
    args = resolve_arguments(["search", "x", "--top-k", "2"], rag_qlora.__doc__, rag_qlora.STEPS)
    store = rag_qlora.open_store(args)
    finding = rag_qlora.make_finding(args, store)
    service = Service(finding, choose_prompt(generator.tokenizer), generator)
    worker = Worker(service.answer, size=16)
    worker.start()
    again = rag_qlora.open_store(args, embeddings=store.embeddings)
    again.embeddings = Lent(worker, store.embeddings)
    library = Library(again, choose_splitting(again, args.embedding_model, 120, 24), folder / "uploads", again.find)
    models = {MODEL: True, "base/ferry": False}
    digests = "weights", service.prompt.digest
    trace = folder / "trace.jsonl"
    return Site(worker, models, library, Rules("127.0.0.1"), again.feedback(), digests, ["Who sails?"], trace)


@contextlib.contextmanager
def serving(site: Site):
    """The address of a real server."""
    config = uvicorn.Config(make_app(site), log_level="error", timeout_graceful_shutdown=5)
    running = uvicorn.Server(config)
    # Its socket is opened here and handed on: a port that is closed and opened again may be taken in between.
    with socket.create_server(("127.0.0.1", 0)) as opened:
        thread = threading.Thread(target=running.run, args=([opened],), daemon=True)
        thread.start()
        while not running.started:
            assert thread.is_alive(), "the server ended before it answered"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive(), "the server did not end"
