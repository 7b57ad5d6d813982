"""The server: everything loaded, then the port; an address to open; an end that loses no answer.

run(options, asking, store, splitting, names)        # until Ctrl-C or SIGTERM
"""

import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import settings
from qlora.answering.chain import Finding
from qlora.answering.chat_session import make_rewriter
from qlora.console import fail, note, say
from qlora.model.adapter import digest_weights
from qlora.prompt import Prompt
from qlora.retrieval.passages import Splitting
from qlora.serving.guard import LOCAL

GRACE = 30  # seconds that answers in work have when the server is stopped
EXAMPLES, SEEN = 3, 2000  # questions to begin with, and passages that they are made of


@dataclass(frozen=True)
class Options:
    """How the server is reached, and what it lets through."""

    host: str
    port: int
    queue: int
    base_model: str
    collection: str
    read_only: bool
    origins: tuple[str, ...]
    trace: Path | None
    adapter: Path | None

    @classmethod
    def of(cls, args) -> "Options":
        names = ("host", "port", "queue", "base_model", "collection", "read_only", "trace", "adapter")
        return cls(**{name: getattr(args, name) for name in names}, origins=tuple(args.allow_origin))


@dataclass(frozen=True)
class Asking:
    """What answers: the search, the prompt, the model."""

    finding: Finding
    prompt: Prompt
    generator: Any


def name_models(adapter: Path | None, collection: str, with_base: bool) -> dict[str, bool]:
    """The ids of /v1/models, each with whether the adapter answers; the first is the default."""
    names = {f"{adapter.name}/{collection}": True} if adapter else {}
    return names | ({f"base/{collection}": False} if with_base or not adapter else {})


def check_options(host: str, port: int) -> None:
    """Raises UserError for a host that is open to others without a key, and for a port that is in use."""
    if host not in LOCAL and not settings.get("QLORA_SERVE_KEY"):
        fix = "set QLORA_SERVE_KEY in the environment or in .env, or leave --host out"
        raise fail(f"{host} can be reached by others, and no key is set", "--host", fix)
    try:
        with socket.create_server((host.strip("[]"), port), family=family_of(host)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise fail(
            f"port {port} cannot be opened ({reason})", "--port", "give another --port, or end what uses it"
        ) from error


def family_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def run(options: Options, asking: Asking, store, splitting: Splitting, names: dict[str, bool]) -> int:
    """Serves until it is stopped; answers in work are finished first. Returns 1 when the port was lost meanwhile.

    The model answers in this thread, in which it was loaded, and the web server has another one: a second thread that
    computes has threads of its own, and more threads than cores wait for each other (a half longer per answer).
    """
    import uvicorn

    from qlora.serving.app import make_app

    worker = make_worker(options, asking)
    site = make_site(options, asking, store, splitting, names, worker)
    note(f"{', '.join(names)}; the API is described at /docs")
    config = uvicorn.Config(
        make_app(site),
        host=options.host.strip("[]"),
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    web = announcing(uvicorn.Server(config), f"http://{options.host}:{options.port}/")
    stop_by_signals(web)
    serving = threading.Thread(target=serve_and_finish, args=(web, worker), name="web", daemon=True)
    serving.start()
    worker.start()
    worker.run()
    serving.join()
    worker.stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the database is still to be stopped
    note("stopped")
    return int(not web.started)


def stop_by_signals(web) -> None:
    """Ctrl-C and SIGTERM end the web server in order; a second one does not wait for answers in work."""

    def stop(*given) -> None:
        if web.should_exit:
            web.force_exit = True
            raise KeyboardInterrupt
        web.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def serve_and_finish(web, worker) -> None:
    """Runs the web server; when it has ended, so does the worker."""
    try:
        web.run()
    finally:
        worker.finish()


def make_worker(options: Options, asking: Asking):
    """What answers: this thread, and with a model server others beside it."""
    from qlora.serving.service import Service
    from qlora.serving.worker import AT_ONCE, Worker

    complete = make_rewriter(options.base_model, asking.prompt, asking.generator)
    service = Service(asking.finding, asking.prompt, asking.generator, complete)
    is_local = hasattr(asking.generator, "generate_ids")
    ways = {"threads": 0} if is_local else {"threads": AT_ONCE - 1, "batch": 1}
    return Worker(service.answer, options.queue, **ways)


def make_site(options: Options, asking: Asking, store, splitting: Splitting, names: dict[str, bool], worker):
    """The parts of the application; what `store` embeds is computed by the worker."""
    from qlora.serving.app import Site
    from qlora.serving.document_routes import Library
    from qlora.serving.guard import Rules
    from qlora.serving.worker import Lent

    examples = suggest_questions(store)
    store.embeddings = Lent(worker, store.embeddings)
    folder = settings.data_folder() / "uploads" / options.collection
    library = Library(store, splitting, folder, store.find, options.read_only)
    rules = Rules(options.host, settings.get("QLORA_SERVE_KEY"), options.origins)
    digests = digest_weights(options.adapter) if options.adapter else "", asking.prompt.digest
    return Site(worker, names, library, rules, store.feedback(), digests, examples, options.trace)


def announcing(server, address: str):
    """The uvicorn server, which prints its address as soon as it can be opened."""
    start = server.startup

    async def startup(sockets=None) -> None:
        await start(sockets)
        if server.started:
            say(address)

    server.startup = startup
    return server


def suggest_questions(store) -> list[str]:
    """Questions about documents of the collection, by their headings."""
    passages = store.all_passages(SEEN)
    headings = {passage.metadata["source"]: passage.metadata.get("heading", "") for passage in reversed(passages)}
    topics = [heading.rpartition(" > ")[2] or source for source, heading in sorted(headings.items())]
    step = max(1, len(topics) // EXAMPLES)
    return [f"What is said about {topic}?" for topic in dict.fromkeys(topics[::step])][:EXAMPLES]
