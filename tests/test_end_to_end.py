"""The main job with the real parts: the embedded model in 4-bit, the sample documents, both scripts as processes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT, SAMPLE, process, sample_rows, without_network


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The embedded model fine-tuned for ten steps on forty short real rows."""
    folder = tmp_path_factory.mktemp("end")
    rows = sorted(sample_rows(), key=lambda row: (row["source"], len(row["context"])))[:100:2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = process(
        "instruct_train_qlora.py",
        *("--preset", "laptop", "--dataset", folder / "rows.jsonl", "--output", folder / "adapter"),
        *("--distractors", 0, "--max-steps", 10, "--eval-answers", 2),
    )
    assert done.returncode == 0, done.stderr
    for step in ("[1/4] Dataset Preparation", "[2/4] Model Setup", "[3/4] Training Process", "[4/4] Model Saving"):
        assert step in done.stderr
    assert done.stderr.strip().splitlines()[-1].strip().startswith("Next: python rag_qlora.py ask --adapter")
    return folder / "adapter"


def test_held_out_loss_goes_down(adapter):
    result = json.loads((adapter / "run.json").read_text())["result"]
    assert result["eval_loss_after"] < 0.7 * result["eval_loss_before"]


def test_demo_answers_from_the_sample_documents_without_a_network(adapter, database):
    """With no command and no terminal: three answers from retrieved passages, in a process without network."""
    done = process(
        *("rag_qlora.py", "--json", "--adapter", adapter),
        prefix=without_network(),
        DATABASE_URL=database,
        QLORA_COLLECTION="end",
    )
    assert done.returncode == 0, done.stderr
    assert "filling it with the sample documents" in done.stderr
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(turns) == 3
    sources = {path.relative_to(SAMPLE / "documents").as_posix() for path in (SAMPLE / "documents").rglob("*.md")}
    for turn in turns:
        assert {passage["source"] for passage in turn["passages"]} <= sources
        assert turn["refused"] or turn["answer"]
        assert turn["tokens"]["prompt"] > 150
    assert turns[0]["passages"][0]["source"] == "computing/radios-and-handsets.md"  # call signs
    assert turns[0]["model"]["base"] == "SmolLM2-135M-Instruct"


def test_the_six_commands_of_the_readme(collection, tiny_base, rows_file, tmp_path, monkeypatch):
    """A newcomer's folder, with a tiny model in the place of the embedded one; the set-up alone is left out."""
    (tmp_path / "my_documents").mkdir()
    (tmp_path / "my_documents" / "forms.md").write_text("# Forms\n\nThe mayor signs form B7.\n", encoding="utf-8")
    shutil.copyfile(rows_file, tmp_path / "rows.jsonl")
    section = (PROJECT / "README.md").read_text(encoding="utf-8").partition("in six commands")[2]
    examples = re.search(r"```json\n(.*?)```", section, re.DOTALL)[1].splitlines()
    (tmp_path / "questions.jsonl").write_text(examples[1] + "\n" + examples[1].replace("B9", "B7"), encoding="utf-8")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(examples[0] + "\n")
    commands = re.findall(r"^\$ (.*?)(?: +#.*)?$", re.search(r"```console\n(.*?)```", section, re.DOTALL)[1], re.M)
    assert len(commands) == 6 and commands[0].startswith("make setup")
    monkeypatch.delenv("QLORA_COLLECTION")
    for command in commands[1:]:
        words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, PROJECT / words[1], *words[2:]],
            cwd=tmp_path,
            env={**os.environ, "QLORA_PRESET": "laptop", "QLORA_BASE_MODEL": str(tiny_base)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, (command, done.stderr)
    report = json.loads((tmp_path / "evaluations" / "mine" / "evaluation.json").read_text())
    assert report["questions"] == 2 and {cell["model"] for cell in report["cells"]} == {"base", "tuned"}
