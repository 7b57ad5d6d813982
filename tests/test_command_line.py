"""Both scripts as a user calls them: in one process through main, and as real processes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT, QUICK, SAMPLE, process, rag, train, without_network

import instruct_train_qlora
from qlora import settings
from qlora.cli import training_flags

read_dotenv = settings.load_dotenv_once  # before conftest puts it away

SHAPE = {"question", "answer", "refused", "supported", "unsupported", "citations", "passages", "timings", "tokens"}
SHAPE |= {"model", "collection", "rerank", "prompt_digest"}


@pytest.fixture
def words(tiny_base, rows_file, tmp_path):
    return ["--base-model", tiny_base, "--dataset", rows_file, "--output", tmp_path / "out", *QUICK]


# ------------------------------------------------------------------------------- training


def test_all_mistakes_of_one_call_are_told_together(words, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    code = train(*words, "--rank", 0, "--learning-rate", -1, "--lerning-rate=2", "--filter", "subject=x")
    err = capsys.readouterr().err
    assert code == 2
    for text in (
        "5 problems",
        "--rank 0 is not valid - command line - give a whole number of at least 1",
        "--learning-rate -1 is not valid",
        "unknown argument --lerning-rate=2 - command line - did you mean --learning-rate?",
        "the output is a file",
        "unknown column subject",
    ):
        assert text in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "training knows no attention_dropout (0.1)"),
        ({"model_type": "unheard-of"}, "cannot be used"),
    ],
)
def test_a_model_that_cannot_be_trained_is_told_before_its_weights_are_loaded(
    words, tiny_base, tmp_path, changes, message, capsys
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"nothing")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    assert train(*words, "--base-model", base) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--filter", "category=poem"], "no row is left after filtering"),
        (["--columns", "context=passage"], "no column passage"),
        (["--dataset", "nowhere.jsonl"], "dataset file not found"),
        (["--base-model", "./nowhere"], "base model folder not found"),
        (["--base-model", str(SAMPLE)], "config.json is missing"),
        (["--max-length", "64"], "every row is too long"),
        (["--preset", "desktop"], "unknown preset desktop"),
        (["--scheduler", "square"], "one of cosine, linear, constant_with_warmup"),
        (["--epochs"], "expected one argument"),
    ],
)
def test_mistakes_in_training(words, flags, message, capsys, tmp_path):
    assert train(*words, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_little_disk(words, capsys, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert train(*words) == 2
    assert "too little disk" in capsys.readouterr().err


def test_gated_or_unreachable_model_names_both_ways_out(rows_file, tmp_path):
    done = process(
        "instruct_train_qlora.py",
        *("--preset", "llama2-7b", "--dataset", rows_file, "--output", tmp_path / "out"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 2
    assert "HF_TOKEN" in done.stderr and "--preset laptop" in done.stderr and "Traceback" not in done.stderr


def test_precedence_is_flag_environment_dotenv_default(tiny_base, tmp_path, monkeypatch):
    def resolve(*words):
        return training_flags.resolve_arguments(list(map(str, words)), "", instruct_train_qlora.STEPS)

    monkeypatch.setattr(settings, "load_dotenv_once", read_dotenv)
    monkeypatch.setenv("QLORA_PRESET", "laptop")
    assert resolve("--output", tmp_path / "x").base_model == "SmolLM2-135M-Instruct"
    (tmp_path / "own.env").write_text(f"QLORA_BASE_MODEL={tiny_base}\nQLORA_ADAPTER={tmp_path}/from-dotenv\nPATH=x\n")
    monkeypatch.setenv("QLORA_ENV_FILE", str(tmp_path / "own.env"))
    read_dotenv.cache_clear()
    monkeypatch.setenv("QLORA_ADAPTER", str(tmp_path / "from-environment"))
    monkeypatch.setenv("QLORA_BASE_MODEL", "")
    del os.environ["QLORA_BASE_MODEL"]  # what .env sets here, monkeypatch removes
    args = resolve()
    assert args.base_model == str(tiny_base) and args.output.name == "from-environment"
    assert os.environ["PATH"] != "x" and "own.env: QLORA_BASE_MODEL" in settings.describe_dotenv()
    assert resolve("--output", tmp_path / "flag").output.name == "flag"
    assert resolve("--preset", "laptop").base_model == "SmolLM2-135M-Instruct"
    read_dotenv.cache_clear()


def test_a_dotenv_of_the_working_folder_is_named_and_not_read(tmp_path):
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://stranger@127.0.0.1:1/x\n")
    words = PROJECT / "rag_qlora.py", "compare", "a", "b"
    done = process(*words, folder=tmp_path)
    assert "The .env of this folder is not read (DATABASE_URL): set QLORA_ENV_FILE=.env" in done.stderr
    done = process(*words, folder=tmp_path, QLORA_ENV_FILE=".env", DATABASE_URL=None)
    assert "Settings from .env: DATABASE_URL" in done.stderr and "stranger" not in done.stderr
    done = process(*words, folder=tmp_path, QLORA_ENV_FILE="nowhere.env")
    assert done.returncode == 2 and "cannot be read - nowhere.env" in done.stderr


# ------------------------------------------------------------------------------- answering


def test_ingest_search_ask_and_chat(collection, documents, tiny_adapter, capsys, monkeypatch):
    assert rag("ingest", documents) == 0
    assert "5 added, 0 changed, 0 unchanged" in capsys.readouterr().err
    assert rag("ingest", documents) == 0
    assert "0 added, 0 changed, 5 unchanged" in capsys.readouterr().err
    with (documents / "ferry" / "crew.md").open("a") as file:
        file.write("\n## Otters\n\nThe bosun feeds the otter of the ship at noon.\n")
    assert rag("ingest", documents) == 0
    assert "0 added, 1 changed, 4 unchanged" in capsys.readouterr().err

    assert rag("search", "--json", "--top-k", 2, "Who feeds the otter?") == 0
    found = json.loads(capsys.readouterr().out)["passages"]
    assert len(found) == 2 and "otter" in found[0]["text"] and found[0]["score"] > found[1]["score"]
    assert rag("search", "Who feeds the otter?") == 0
    shown = capsys.readouterr().out
    assert "ferry/crew.md, line" in shown and "[3]" in shown

    assert rag("ask", "--json", "--adapter", tiny_adapter, "--max-new-tokens", 8, "Who feeds the otter?", "Why?") == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(turns) == 2 and set(turns[0]) == SHAPE
    assert len(turns[0]["passages"]) == 1 and "otter" in turns[0]["passages"][0]["text"]  # as many as in training
    assert set(turns[0]["passages"][0]) == {"n", "source", "score", "text", "ranks"}
    assert (
        set(turns[0]["passages"][0]["ranks"]) == {"dense", "lexical", "search"} and turns[0]["rerank"] == "likelihood"
    )
    assert set(turns[0]["timings"]) == {"retrieve_s", "rank_s", "first_token_s", "generate_s"}
    assert 0 < turns[0]["timings"]["first_token_s"] <= turns[0]["timings"]["generate_s"]
    assert 1 <= turns[0]["tokens"]["completion"] <= 8 and turns[0]["tokens"]["prompt"] > 100
    assert turns[0]["model"]["adapter"] == str(tiny_adapter)

    lines = iter(["Who feeds the otter?", "And when?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert rag("chat", "--adapter", tiny_adapter, "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out.count("A: ") == 2


def test_base_model_alone_and_empty_collection(collection, tiny_base, capsys):
    assert rag("ask", "--json", "--adapter", "none", "--base-model", tiny_base, "--max-new-tokens", 2, "Who?") == 0
    captured = capsys.readouterr()
    assert "is empty: filling it with the sample documents" in captured.err
    assert json.loads(captured.out)["model"] == {"base": str(tiny_base), "adapter": None}


def test_a_bad_file_is_reported_and_the_rest_goes_in(collection, documents, capsys):
    (documents / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (documents / "empty.md").write_text("\n")
    assert rag("ingest", documents) == 2
    err = capsys.readouterr().err
    assert "5 added" in err and "broken.pdf" in err and "empty.md" in err and "2 problems" in err
    assert rag("search", "When does the ferry leave?") == 0


HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e"


def test_no_command_for_the_terminal_passes(collection, documents, tiny_adapter, tmp_path, capsys):
    (documents / f"{HOSTILE}.md").write_text(f"# The {HOSTILE} otter\n\nThe bosun {HOSTILE} feeds the otter.\n")
    (documents / f"{HOSTILE}.pdf").write_bytes(b"nothing")
    assert rag("ingest", documents, "--dry-run") == 0
    assert rag("ingest", documents) == 2
    assert rag("documents") == 0 and rag("documents", "--json") == 0
    for flags in ([], ["--json"], ["--explain"]):
        assert rag("search", *flags, f"Who feeds {HOSTILE} the otter?") == 0
    for flags in (["--strict"], ["--json"]):
        rag("ask", "--adapter", tiny_adapter, "--max-new-tokens", 4, *flags, f"Who feeds {HOSTILE} it?")
    assert rag("forget", HOSTILE) == 2 and rag("ask", f"--{HOSTILE}", "--adapter", HOSTILE, "Who?") == 2
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": HOSTILE, HOSTILE: "x"}) + "\n")
    assert train("--dataset", tmp_path / "rows.jsonl", "--dry-run", "--output", tmp_path / HOSTILE) == 2
    said = capsys.readouterr()
    assert "otter" in said.out and "owned" in said.err
    assert not [c for c in said.out + said.err if not c.isprintable() and c not in "\n\t"]


def test_a_trace_that_cannot_be_written_is_told_before_anything_is_loaded(collection, tiny_adapter, tmp_path, capsys):
    for trace, message in {
        tmp_path / "nowhere" / "x.jsonl": "the folder of the file does not exist",
        tmp_path: "the file to write is a folder",
    }.items():
        assert rag("ask", "--adapter", tiny_adapter, "--trace", trace, "Who?") == 2
        said = capsys.readouterr().err
        assert message in said and "[1/4]" not in said


def test_an_answer_as_long_as_the_window_is_told_before_the_weights_are_loaded(collection, tiny_adapter, capsys):
    for length in (1024, 1000, 4096):
        assert rag("ask", "--adapter", tiny_adapter, "--max-new-tokens", length, "Who?") == 2
        said = capsys.readouterr().err
        assert f"--max-new-tokens {length} leaves no room for a question in a window of 1024" in said
        assert "in 4-bit" not in said
    most = re.search(r"give less than (\d+)", said)[1]
    assert rag("ask", "--adapter", tiny_adapter, "--max-new-tokens", most, "Who?") in (0, 2)


def test_another_embedding_model_is_refused(collection, documents, capsys, tmp_path):
    from qlora import presets
    from qlora.model import base_model

    assert rag("ingest", documents) == 0
    copy = shutil.copytree(base_model.resolve_embedding_model(presets.EMBEDDED_EMBEDDER), tmp_path / "embedder")
    assert rag("search", "--embedding-model", copy, "Who?") == 2
    assert "was made with embedding model sentence-transformers/all-MiniLM-L6-v2" in capsys.readouterr().err


def test_mistakes_in_answering(collection, tiny_adapter, capsys, tmp_path):
    assert rag("ingest", tmp_path / "gone", "--top-k", 3, "--passage-tokens", 20, "--overlap", 30) == 2
    err = capsys.readouterr().err
    assert "file not found" in err and "unknown argument --top-k" in err and "--overlap reaches" in err
    assert rag("ask", "--adapter", tmp_path / "gone", "Who?") == 2
    assert "adapter folder not found" in capsys.readouterr().err
    assert rag("ask", "--adapter", tiny_adapter, "--base-model", "other", "Who?") == 2
    assert "not for other" in capsys.readouterr().err
    assert rag("ask") == 2
    assert "required: QUESTION" in capsys.readouterr().err
    assert rag("aks", "Who?") == 2
    assert "invalid choice: 'aks'" in capsys.readouterr().err


# ------------------------------------------------------------------------------- real processes


@pytest.mark.parametrize("script", ["instruct_train_qlora.py", "rag_qlora.py"])
def test_help_and_mistakes_load_nothing_heavy(script):
    done = process("-X", "importtime", script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "trl", "langchain_core", "psycopg2", "datasets"}
    done = process(script, "--bogus")
    assert done.returncode == 2 and "unknown argument --bogus" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback(collection, documents, database):
    assert rag("ingest", documents) == 0
    words = [sys.executable, "rag_qlora.py", "documents", "--collection", collection]
    with subprocess.Popen(
        words,
        cwd=PROJECT,
        env={**os.environ, "DATABASE_URL": database, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 1


def test_answers_go_to_stdout_and_everything_else_to_stderr(collection, database, tiny_adapter):
    done = process(
        "rag_qlora.py",
        *("ask", "--json", "--strict", "--adapter", tiny_adapter, "--max-new-tokens", 2, "Who?"),
        DATABASE_URL=database,
        QLORA_COLLECTION=collection,
    )
    assert done.returncode in (0, 3), done.stderr
    assert set(json.loads(done.stdout)) == SHAPE
    assert "[1/4] Model and Tokenizer Setup" in done.stderr and "Next:" in done.stderr
    assert "rror" not in done.stderr and "Warning" not in done.stderr


def test_the_network_is_not_needed(tiny_adapter, tmp_path):

    words = ("--base-model", json.loads((tiny_adapter / "run.json").read_text())["base_model"]["name"])
    done = process(
        "instruct_train_qlora.py",
        *(*words, "--dataset", SAMPLE / "train.jsonl", "--output", tmp_path / "out", *QUICK, "--max-steps", 1),
        prefix=without_network(),
    )
    assert done.returncode == 0, done.stderr
