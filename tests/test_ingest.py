"""Sync: what is added, replaced, left alone and forgotten; kills, two at once, and unreadable files."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROJECT, rag
from langchain_core.embeddings import DeterministicFakeEmbedding

from qlora.console import UserError
from qlora.retrieval import ingest
from qlora.retrieval.database import Database
from qlora.retrieval.pgvector_store import PgVectorStore

# A process that syncs a folder with a slow embedder, so that a kill hits it in the middle.
SYNC = """
import sys, time
sys.path[:0] = [{project!r}, {tests!r}]
from test_ingest import open_store
from qlora.retrieval import ingest
ingest.BATCH = 8
store = open_store({url!r}, {name!r}, pause={pause})
ingest.put_files(store, [{folder!r}], ingest.choose_splitting(store, "fake", 60, 10))
"""


class FakeEmbeddings(DeterministicFakeEmbedding):
    """Deterministic vectors behind the real embedding model's tokenizer."""

    pause: float = 0.0
    embedded: list = []

    @property
    def _client(self):
        return Tokenizer

    def embed_documents(self, texts):
        time.sleep(self.pause)
        self.embedded.extend(texts)
        return super().embed_documents(texts)


class Tokenizer:
    """As much of a SentenceTransformer as splitting needs: a token is a word."""

    max_seq_length = 256

    @staticmethod
    def tokenizer(text, **options):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=text.split())


def open_store(url, name, pause=0.0) -> PgVectorStore:
    return PgVectorStore(Database(url), FakeEmbeddings(size=8, pause=pause, embedded=[]), "fake", name)


def put(store, folder, **options) -> None:
    ingest.put_files(store, [str(folder)], ingest.choose_splitting(store, "fake", 60, 10), **options)


def passages_of(store) -> dict[str, int]:
    return {entry.source: entry.passages for entry in store.documents()}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    for n in range(6):
        (folder / "sub" / f"{n}.md").write_text(f"# Part {n}\n\n" + f"word{n} says a thing. " * 60)
    return folder


def test_a_name_that_is_not_utf8_is_named_and_the_rest_goes_in(database, collection, folder, capsys):
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("The cafe opens at nine.")
    words = "--passage-tokens", 60
    assert rag("ingest", folder, *words, "--dry-run") == 2
    assert "1 problem" in capsys.readouterr().err
    assert rag("ingest", folder, *words) == 2
    err = capsys.readouterr().err
    assert "6 added" in err and "the file's name is not UTF-8" in err and "rename it" in err
    assert rag("ingest", folder / os.fsdecode(b"caf\xe9.txt")) == 2
    assert "the file's name is not UTF-8" in capsys.readouterr().err


def test_nothing_is_removed_while_a_folder_cannot_be_read(database, collection, folder, monkeypatch, capsys):
    store = open_store(database, collection)
    put(store, folder)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):  # as root no folder is unreadable
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="unreadable folder"):
        put(store, folder, prune=True)
    assert len(passages_of(store)) == 6 and "Nothing is removed" in capsys.readouterr().err


def test_new_changed_unchanged_and_gone(database, collection, folder, capsys):
    store = open_store(database, collection)
    put(store, folder)
    assert "6 added, 0 changed, 0 unchanged, 0 removed" in capsys.readouterr().err
    before = {entry.source: entry for entry in store.documents()}
    assert len(before) == 6 and all(entry.passages > 1 for entry in before.values())
    assert before["sub/1.md"].bytes == (folder / "sub" / "1.md").stat().st_size
    (folder / "sub" / "1.md").write_text("Quite another text.")
    (folder / "sub" / "2.md").unlink()
    (folder / "new.txt").write_text("A new one.")
    put(store, folder, prune=True, dry_run=True)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["+ new.txt", "~ sub/1.md", "- sub/2.md"] and "nothing was done" in shown.err
    assert {entry.source: entry for entry in store.documents()} == before
    put(store, folder)
    assert "1 added, 1 changed, 4 unchanged, 0 removed" in capsys.readouterr().err
    assert "sub/2.md" in passages_of(store)
    put(store, folder, prune=True)
    after = {entry.source: entry for entry in store.documents()}
    assert set(after) == {"new.txt", *(f"sub/{n}.md" for n in (0, 1, 3, 4, 5))} and after["sub/1.md"].passages == 1
    assert all(after[source] == before[source] for source in ("sub/0.md", "sub/3.md"))
    embedded = len(store.embeddings.embedded)
    put(store, folder, prune=True)
    assert len(store.embeddings.embedded) == embedded


def test_pruning_leaves_other_folders_alone(database, collection, folder, tmp_path):
    store = open_store(database, collection)
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs.md").write_text("Another folder's.")
    (tmp_path / "single.md").write_text("A file by itself.")
    for path in (folder, other, tmp_path / "single.md"):
        put(store, path)
    (folder / "sub" / "0.md").unlink()
    put(store, folder, prune=True)
    assert set(passages_of(store)) == {"theirs.md", "single.md", *(f"sub/{n}.md" for n in range(1, 6))}


# ------------------------------------------------------------------------------- two folders, one name


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return folder


def found(store, question: str) -> str:
    return store.find(question, 1, mode="lexical")[0].page_content


def test_a_second_folder_never_replaces_the_documents_of_the_first(database, collection, tmp_path):
    store = open_store(database, collection)
    first = write(tmp_path / "a", README="The pump needs diesel.", LICENSE="All rights reserved.")
    second = write(tmp_path / "b", README="The crane lifts nine tonnes.", LICENSE="All rights reserved.", own="A yard.")
    put(store, first)
    with pytest.raises(UserError, match=rf"same names, from {first}: README.md - {second} - ingest the folder above"):
        put(store, second)
    assert set(passages_of(store)) == {"README.md", "LICENSE.md", "own.md"}  # the others are in
    assert found(store, "pump") == "The pump needs diesel."
    with pytest.raises(UserError, match="same names"):
        put(store, second / "README.md")  # a file by itself
    put(store, first / "README.md")  # the very file: nothing to refuse
    (first / "README.md").write_text("The pump needs petrol.")
    put(store, first / "README.md")
    assert found(store, "pump") == "The pump needs petrol."
    store.forget(list(passages_of(store)))
    put(store, tmp_path)
    assert {"a/README.md", "b/README.md"} < set(passages_of(store))


def test_two_files_by_themselves_with_one_name_are_not_one(database, collection, tmp_path):
    store = open_store(database, collection)
    put(store, write(tmp_path / "a", notes="The pump.") / "notes.md")
    with pytest.raises(UserError, match="same names"):
        put(store, write(tmp_path / "b", notes="The crane.") / "notes.md")
    assert found(store, "pump") == "The pump."


def test_a_copy_of_a_folder_may_be_split_anew(database, collection, tmp_path):
    store = open_store(database, collection)
    first = write(tmp_path / "a", one="One pump. " * 90, two="Two cranes.")
    put(store, first)
    write(tmp_path / "b", one="One pump. " * 90, two="Two cranes.")
    ingest.put_files(store, [str(tmp_path / "b")], ingest.choose_splitting(store, "fake", 30, 5))
    assert passages_of(store)["one.md"] > 6


def test_a_moved_folder_is_the_same_folder(database, collection, tmp_path, capsys):
    store = open_store(database, collection)
    old = write(tmp_path / "old", one="One pump.", two="Two cranes.", three="Three locks.")
    put(store, old)
    new = old.rename(tmp_path / "new")
    (new / "two.md").write_text("Two cranes and a winch.")
    embedded = len(store.embeddings.embedded)
    put(store, new)
    assert "0 added, 1 changed, 2 unchanged" in capsys.readouterr().err
    assert len(store.embeddings.embedded) == embedded + 1
    assert {entry.folder for entry in store.documents()} == {str(new)}
    (new / "one.md").unlink()
    put(store, new, prune=True)  # which works by the new folder
    assert set(passages_of(store)) == {"two.md", "three.md"}
    other = write(tmp_path / "other", two="About something else.", three="Quite another story.")
    for file in new.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"three\.md, two\.md"):
        put(store, other)  # not moved: nothing is as it was


def test_a_file_that_changes_while_it_is_read_is_read_again_by_the_next_run(
    database, collection, folder, monkeypatch, capsys
):
    store, load = open_store(database, collection), ingest.documents.load_passages

    def load_and_change(file, *args):
        passages = load(file, *args)
        if file.name == "3.md":
            file.write_text("Another text by now.")
        return passages

    monkeypatch.setattr(ingest.documents, "load_passages", load_and_change)
    with pytest.raises(UserError, match=r"changed while it was read - .*3\.md - ingest it again"):
        put(store, folder)
    assert len(passages_of(store)) == 5 and "5 added" in capsys.readouterr().err
    monkeypatch.setattr(ingest.documents, "load_passages", load)
    put(store, folder)
    assert passages_of(store)["sub/3.md"] == 1


def test_a_document_larger_than_the_memory_is_written_part_by_part(database, collection, folder, monkeypatch):
    monkeypatch.setattr(ingest, "MANY", 50)
    monkeypatch.setattr(ingest, "BATCH", 16)
    rows = "".join(f"N{n};{n} crowns\n" for n in range(123))
    (folder / "large.csv").write_text(f"berth;fee\n{rows}")
    (folder / "zz.md").write_text("After the large one.")
    store = open_store(database, collection)
    asked: list[int] = []
    embed = FakeEmbeddings.embed_documents
    monkeypatch.setattr(FakeEmbeddings, "embed_documents", lambda self, t: asked.append(len(t)) or embed(self, t))
    put(store, folder)
    known = passages_of(store)
    assert known["large.csv"] == 123 and known["zz.md"] == 1 and len(known) == 8
    assert asked.count(16) >= 7  # of the large one never more than a batch
    assert [hit.page_content for hit in store.find("berth N77", mode="lexical", k=1)] == ["berth: N77 / fee: 77 crowns"]
    put(store, folder)
    assert passages_of(store) == known


def test_a_large_document_that_fails_in_the_middle_stays_as_it_was(database, collection, folder, monkeypatch):
    monkeypatch.setattr(ingest, "MANY", 20)
    (folder / "large.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(60)))
    store, load = open_store(database, collection), ingest.documents.load_passages
    put(store, folder)
    (folder / "large.jsonl").write_text("".join(f'{{"m": {n}}}\n' for n in range(70)))
    (folder / "zz.md").write_text("After the large one.")

    def load_and_change(file, *args):
        yield from load(file, *args)
        if file.name == "large.jsonl":  # its passages are written by now, but not for good
            file.write_text("another")

    monkeypatch.setattr(ingest.documents, "load_passages", load_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        put(store, folder)
    known = passages_of(store)
    assert known["large.jsonl"] == 60 and known["zz.md"] == 1
    assert store.find("n 59", mode="lexical", k=1)[0].page_content == "n: 59"


def test_equal_passages_are_embedded_once(database, collection, folder):
    for n in range(20):
        (folder / f"copy{n}.txt").write_text("The same notice stands in every one of them.")
    store = open_store(database, collection)
    put(store, folder)
    embedded = store.embeddings.embedded
    assert len(embedded) == len(set(embedded)) and store.count() >= len(embedded) + 19


def test_one_unreadable_file_does_not_stop_the_rest(database, collection, folder, capsys):
    from qlora.console import UserError

    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "empty.md").write_text("  \n")
    store = open_store(database, collection)
    with pytest.raises(UserError) as error:
        put(store, folder)
    assert (
        "broken.pdf" in str(error.value)
        and "empty.md" in str(error.value)
        and "2 unreadable" in capsys.readouterr().err
    )
    assert len(store.documents()) == 6


def start(database, collection, folder, pause):
    code = SYNC.format(
        project=str(PROJECT),
        tests=str(PROJECT / "tests"),
        url=database,
        name=collection,
        folder=str(folder),
        pause=pause,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.alone
def test_killed_at_any_moment_every_document_is_whole_or_absent(database, collection, folder):
    for n in range(6, 30):
        (folder / "sub" / f"{n}.md").write_text(f"# Part {n}\n\n" + f"word{n} says a thing. " * 60)
    wanted = open_store(database, f"{collection} whole")
    put(wanted, folder)
    store = open_store(database, collection)
    chance, killed = random.Random(5), 0
    for _ in range(4):
        process = start(database, collection, folder, pause=0.3)
        known = len(store.documents())
        while len(store.documents()) == known and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.random() / 3)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = passages_of(store)
        assert there.items() <= passages_of(wanted).items() and store.find("word1", 3)
    assert killed >= 2 and len(there) < 30
    put(store, folder)
    assert passages_of(store) == passages_of(wanted)


def test_two_at_once_neither_duplicate_nor_deadlock(database, collection, folder):
    processes = [start(database, collection, folder, pause=0.05) for _ in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    store = open_store(database, collection)
    assert len(store.documents()) == 6 and store.count() == sum(passages_of(store).values())
    whole = open_store(database, f"{collection} whole")
    put(whole, folder)
    assert passages_of(store) == passages_of(whole)


def test_documents_and_forget_on_the_command_line(collection, folder, capsys):
    assert rag("ingest", folder) == 0
    capsys.readouterr()
    assert rag("documents") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].endswith("sub/0.md")
    assert rag("forget", "sub/0.md", "nowhere.md") == 2
    assert "no such document - nowhere.md" in capsys.readouterr().err
    assert rag("forget", "sub/0.md", "sub/3.md") == 0
    capsys.readouterr()
    assert rag("documents", "--json") == 0
    import json

    assert [entry["source"] for entry in json.loads(capsys.readouterr().out)] == [f"sub/{n}.md" for n in (1, 2, 4, 5)]
    assert rag("search", "--explain", "--search", "hybrid", "--where", "source=sub/1.md", "word1 says") == 0
    shown = capsys.readouterr().out
    assert "dense rank " in shown and "lexical rank 1" in shown and "sub/2.md" not in shown
    assert rag("search", "--where", "nonsense", "--search", "fuzzy", "x") == 2
    said = capsys.readouterr().err
    assert "--where nonsense is not valid" in said and "fuzzy is not valid" in said
