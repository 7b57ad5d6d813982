"""A better adapter in the place of an older one: at once, whole, and only where it is not worse."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, SAMPLE, rag

import improve_qlora
from qlora.console import UserError
from qlora.model.adapter import digest_weights
from qlora.releasing import history, release
from qlora.releasing.history import Comparison


def make_adapter(folder: Path, tiny_adapter: Path, mark: int) -> Path:
    """The tiny adapter with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value + mark for name, value in weights.items()}, folder / "adapter_model.safetensors")
    return folder


# ------------------------------------------------------------------------------- the exchange


def test_release_and_roll_back(tmp_path, tiny_adapter):
    adapter, candidate = (make_adapter(tmp_path / name, tiny_adapter, n) for n, name in enumerate(("mine", "next one")))
    old, new = digest_weights(adapter), digest_weights(candidate)
    release.release(adapter, candidate)
    assert (digest_weights(adapter), digest_weights(tmp_path / "mine.previous")) == (new, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.previous"]
    release.roll_back(adapter)
    assert (digest_weights(adapter), digest_weights(tmp_path / "mine.previous")) == (old, new)
    broken = make_adapter(tmp_path / "broken", tiny_adapter, 2)
    (broken / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json missing"):
        release.release(adapter, broken)
    assert digest_weights(adapter) == old and broken.is_dir()
    with pytest.raises(UserError, match="no earlier adapter"):
        release.roll_back(tmp_path / "broken")


def test_a_full_disk_changes_nothing(tmp_path, tiny_adapter, monkeypatch):
    adapter, candidate = (make_adapter(tmp_path / name, tiny_adapter, n) for n, name in enumerate(("mine", "new")))
    old, new = digest_weights(adapter), digest_weights(candidate)

    def write(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(release.machine, "write_whole", write)
    with pytest.raises(OSError, match="No space"):
        release.release(adapter, candidate)
    assert (digest_weights(adapter), digest_weights(candidate)) == (old, new)
    assert not list(tmp_path.glob("*.next"))


RELEASE = """
import sys; from pathlib import Path; from qlora.releasing import release
print("ready", flush=True); sys.stdin.readline()
release.release(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_kill_9_at_any_moment_leaves_one_of_the_two_answering(tmp_path, tiny_adapter):
    """Killed within the milliseconds that a release takes; afterwards it is finished or was never begun."""
    chance, both = random.Random(0), set()
    for n in range(8):
        folder = tmp_path / str(n)
        folder.mkdir()
        adapter, candidate = (make_adapter(folder / name, tiny_adapter, k) for k, name in enumerate(("mine", "new")))
        old, new = digest_weights(adapter), digest_weights(candidate)
        command = [sys.executable, "-c", RELEASE, str(adapter), str(candidate)]
        killed = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        killed.stdout.readline()
        killed.stdin.write(b"\n")
        killed.stdin.flush()
        time.sleep(chance.uniform(0, 0.03))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        for stream in (killed.stdin, killed.stdout):
            stream.close()
        assert digest_weights(adapter) in (old, new)
        release.finish(adapter)
        assert digest_weights(adapter) in (old, new) and not release.beside(adapter, "releasing").exists()
        if digest_weights(adapter) == new:
            assert digest_weights(release.beside(adapter, "previous")) == old
        else:
            assert digest_weights(candidate) == new
        both.add(digest_weights(adapter) == new)


@pytest.mark.parametrize("step", range(4))
def test_what_was_begun_is_finished(tmp_path, tiny_adapter, monkeypatch, step):
    """Stopped before each step of a release, one after the other."""
    adapter, candidate = (make_adapter(tmp_path / name, tiny_adapter, n) for n, name in enumerate(("mine", "new")))
    old, new = digest_weights(adapter), digest_weights(candidate)
    (tmp_path / "mine.previous").mkdir()
    calls, rename, exchange = [], Path.rename, release.exchange

    def count(do, *given):
        calls.append(do)
        if len(calls) > step and step < 3:
            raise KeyboardInterrupt
        return do(*given)

    monkeypatch.setattr(Path, "rename", lambda *given: count(rename, *given))
    monkeypatch.setattr(release, "exchange", lambda *given: count(exchange, *given))
    try:
        release.release(adapter, candidate)
    except KeyboardInterrupt:
        assert digest_weights(adapter) in (old, new)
    monkeypatch.undo()
    release.finish(adapter)
    assert not list(tmp_path.glob("*.next")) and not list(tmp_path.glob("*.releasing"))
    assert digest_weights(adapter) == (old if step == 0 else new)
    if step == 0:
        assert digest_weights(candidate) == new
    else:
        assert digest_weights(tmp_path / "mine.previous") == old


# ------------------------------------------------------------------------------- the report


def evaluation(folder: Path, scores: list[float]) -> Path:
    folder.mkdir(parents=True)
    cell = {"model": "tuned", "context": "retrieved", "f1": sum(scores) / len(scores)}
    cell |= {"overall_f1": cell["f1"], "refusal_f1": None, "citation_precision": 0.9}
    (folder / "evaluation.json").write_text(json.dumps({"cells": [cell], "settings": {}}))
    lines = [
        {"model": "tuned", "context": "retrieved", "question": f"What is {n}?", "answers": [f"{n}"]}
        | {"answer": f"a|b {score}", "source": "a.md", "scores": {"overall_f1": score}}
        for n, score in enumerate(scores)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_report_shows_scores_changes_and_releases(tmp_path):
    new, old = evaluation(tmp_path / "new", [0.5, 1.0, 0.0]), evaluation(tmp_path / "old", [0.5, 0.0, 0.4])
    result = {"mean": 0.2, "low": -0.1, "high": 0.5, "n": 3, "metric": "overall_f1"}
    comparisons = [Comparison("old questions", new, old, result)]
    history.write_report(tmp_path, "adapters/mine", comparisons, "not released: worse")
    text = (tmp_path / "improve.md").read_text()
    assert "**Not released: worse.**" in text and "+0.20 [-0.10, 0.50], n=3" in text
    assert "| worse | What is 2? | 2 | a\\|b 0.4 | a\\|b 0.0 |" in text
    assert "| better | What is 1? | 1 | a\\|b 0.0 | a\\|b 1.0 |" in text
    assert "1 answers are better, 1 worse, of 3." in text and not (tmp_path / "improve.png").exists()
    assert history.last_release(tmp_path) == {}
    history.note_release(tmp_path, comparisons, {"when": "2026-01-02 03:04", "adapter": "x", "files": ["a"]})
    history.note_release(tmp_path, comparisons, {"when": "2026-01-03 03:04", "adapter": "y", "files": ["b"]})
    lines = history.read_releases(tmp_path)
    assert history.last_release(tmp_path)["files"] == ["b"]
    assert [one["when"][:10] for one in lines] == ["", "2026-01-02", "2026-01-03"]
    assert lines[0]["old questions"]["f1"] == pytest.approx(0.3) and lines[1]["old questions"]["f1"] == 0.5
    history.write_report(tmp_path, "adapters/mine", comparisons, "released")
    assert (tmp_path / "improve.png").stat().st_size > 5000


# ------------------------------------------------------------------------------- the whole round


def improve(*words, **environment):
    command = [sys.executable, str(PROJECT / "improve_qlora.py"), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)


def test_a_round_that_makes_nothing_better_changes_nothing(collection, database, tiny_adapter, tmp_path, monkeypatch):
    """Feedback, training, evaluation and gate on a tiny model, which learns nothing; run again, it goes on."""
    import shutil

    from qlora.model.adapter import read_adapter
    from qlora.presets import EMBEDDED_EMBEDDER
    from qlora.retrieval.feedback import Judgement
    from qlora.retrieval.opening import load_embeddings, open_collection

    adapter, work = shutil.copytree(tiny_adapter, tmp_path / "mine"), tmp_path / "work"
    before = digest_weights(adapter)
    settings = {"DATABASE_URL": database, "QLORA_COLLECTION": collection}
    words = "--adapter", adapter, "--questions", tmp_path / "q.jsonl", "--work", work
    (tmp_path / "q.jsonl").write_text("".join((SAMPLE / "questions.jsonl").read_text().splitlines(True)[:4]))
    assert rag("ingest", SAMPLE / "documents" / "canteen") == 0
    done = improve(*words, **settings)
    assert done.returncode == 2 and "nobody has judged an answer" in done.stderr
    log = open_collection("pgvector", collection, load_embeddings(EMBEDDED_EMBEDDER), EMBEDDED_EMBEDDER).feedback()
    for n in range(8):
        log.add(Judgement(f"Who is the mayor of city {n}?", "Bob", not_in_documents=True))
    done = improve(*words, **settings)
    assert done.returncode == 4, done.stderr
    assert "not released" in done.stdout and digest_weights(adapter) == before
    report = (work / "improve.md").read_text()
    assert "| old questions | 4 |" in report and "questions that were fed back" in report
    run = read_adapter(work / "candidate").run
    assert run["parents"][0]["sha256_of_weights"] == before and run["arguments"]["added_rows"]
    calls = []
    monkeypatch.setattr(improve_qlora, "run_script", lambda name, words: calls.append(f"{name} {words[0]}"))
    assert improve_qlora.main(list(map(str, words))) == 4
    assert calls == ["rag_qlora feedback", *["rag_qlora evaluate"] * 4]  # nothing is trained again
    done = improve("--adapter", adapter, "--rollback", "--work", work)
    assert done.returncode == 2 and "no earlier adapter" in done.stderr


def test_mistakes_of_a_call_are_reported_together(tmp_path, tiny_adapter):
    done = improve("--adapter", tmp_path / "none", "--questions", tmp_path / "q.jsonl")
    assert done.returncode == 2 and "adapter folder not found" in done.stderr and "--questions" in done.stderr
    assert improve("--adapter", tiny_adapter).returncode == 2


def test_a_round_wants_new_feedback_unless_the_last_one_was_rolled_back(tmp_path, tiny_adapter, monkeypatch):
    adapter, before = (make_adapter(tmp_path / name, tiny_adapter, n) for n, name in enumerate(("mine", "before")))
    work, asked = tmp_path / "work", tmp_path / "q.jsonl"
    asked.write_text('{"question": "Who?", "answers": ["he"]}\n')
    args = improve_qlora.resolve_arguments(["--adapter", str(adapter), "--questions", str(asked), "--work", str(work)])

    def export(name, words):
        for path in (work / "rows.jsonl", work / "rows.questions.jsonl"):
            path.write_text("{}\n")

    work.mkdir()
    monkeypatch.setattr(improve_qlora, "run_script", export)
    improve_qlora.export_feedback(args)
    files = json.loads((work / "plan.json").read_text())["files"]
    history.note_release(work, [], {"when": "2026-01-02", "adapter": digest_weights(adapter), "files": files})
    with pytest.raises(UserError, match="no feedback since the last release"):
        improve_qlora.export_feedback(args)
    release.exchange(adapter, before)
    improve_qlora.export_feedback(args)


def test_a_release_that_was_noted_before_a_kill_is_noted_once(tmp_path):
    for _ in range(2):
        history.note_release(tmp_path, [], {"when": "2026-01-02", "adapter": "a", "files": ["x"]})
    assert [one.get("adapter") for one in history.read_releases(tmp_path)] == [None, "a"]
