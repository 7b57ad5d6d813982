"""The gate before a release: exit code 4 for a model that is worse, and an error for what cannot be compared."""

import json
import shutil
from xml.etree import ElementTree

import pytest
from conftest import rag

SETTINGS = {"questions_digest": "q", "passages_digest": "p", "prompt": "r"}


def evaluation(folder, scores, **settings):
    """An evaluation whose answers have these values of overall F1, two questions per document."""
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"settings": {**SETTINGS, **settings}}))
    lines = []
    for n, score in enumerate(scores):
        line = {"model": "tuned", "context": "retrieved", "question": f"What is {n}?", "answers": [f"it is {n}"]}
        line |= {"answer": f"\x1b[31mit {score}", "source": f"{n // 2}.md", "scores": {"overall_f1": score}}
        lines.append(json.dumps(line) + "\n")
    (folder / "answers.jsonl").write_text("".join(lines))
    return folder / "evaluation.json"


def gate(*words):
    return rag("compare", "--fail-if-worse", *words)


def test_exit_code_4_only_where_the_whole_interval_is_below_what_is_allowed(tmp_path, capsys):
    old = evaluation(tmp_path / "old", [0.8] * 20)
    worse = evaluation(tmp_path / "worse", [0.5, *[0.7] * 19])
    unsure = evaluation(tmp_path / "unsure", [0.0, *[0.8] * 19])
    better = evaluation(tmp_path / "better", [0.9] * 20)
    for new, code, said in ((worse, 4, "worse"), (unsure, 0, "not worse"), (better, 0, "not worse"), (old, 0, "not")):
        assert gate(new, old) == code
        assert capsys.readouterr().out.splitlines()[-1].startswith(said)
    assert gate(worse, old, "--margin", "0.2") == 0
    assert "a loss of 0.2 is allowed" in capsys.readouterr().out
    assert rag("compare", worse, old, "--margin", "0.2") == 2 and "add --fail-if-worse" in capsys.readouterr().err


def test_documents_that_lost_are_named_with_their_questions(tmp_path, capsys):
    old = evaluation(tmp_path / "old", [0.8] * 6)
    new = evaluation(tmp_path / "new", [0.8, 0.8, 0.9, 0.2, 0.0, 0.0])
    assert gate(new, old, "--json") == 4
    result = json.loads(capsys.readouterr().out)
    assert [one["source"] for one in result["lost"]] == ["2.md", "1.md"]
    assert [asked["question"] for asked in result["lost"][1]["questions"]] == ["What is 3?"]
    assert (result["new"], result["old"], result["n"]) == (0.45, 0.8, 6)
    assert gate(new, old) == 4
    shown = capsys.readouterr().out
    assert "2.md: 0.80 -> 0.00, n=2" in shown and "What is 3?" in shown and "\x1b" not in shown


def test_builds_read_the_result_as_junit_xml(tmp_path):
    old, new = evaluation(tmp_path / "old", [0.8] * 9), evaluation(tmp_path / "new", [0.1] * 9)
    for first, second, failures in ((new, old, 1), (old, new, 0)):
        assert gate(first, second, "--junit", tmp_path / "gate.xml") == 4 * failures
        suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
        assert suite.get("tests") == "1" and suite.get("failures") == str(failures)
        assert len(suite.findall("testcase/failure")) == failures
        assert "overall F1" in suite.find("testcase/system-out").text
    assert gate(new, old, "--junit", tmp_path / "no" / "gate.xml") == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_evaluations_of_other_questions_passages_or_prompts_are_no_result(tmp_path, capsys, name):
    old, new = evaluation(tmp_path / "old", [0.8] * 4), evaluation(tmp_path / "new", [0.1] * 4, **{name: "x"})
    assert gate(new, old) == 2
    assert f"different {name.removesuffix('_digest')}" in capsys.readouterr().err
    unknown = evaluation(tmp_path / "unknown", [0.1] * 4, **{name: None})
    assert gate(unknown, old) == 2 and "does not say which" in capsys.readouterr().err


def test_nothing_in_common_and_damaged_files(tmp_path, capsys):
    old, none = evaluation(tmp_path / "old", [0.8]), evaluation(tmp_path / "none", [])
    assert gate(none, old) == 2 and "no question was answered" in capsys.readouterr().err
    (tmp_path / "none" / "answers.jsonl").write_text("{}\n")
    assert gate(none, old) == 2 and "damaged answers" in capsys.readouterr().err
    (tmp_path / "none" / "answers.jsonl").unlink()
    assert gate(none, old) == 2 and "no answers there" in capsys.readouterr().err
    none.write_text("[")
    assert gate(none, old) == 2 and "damaged evaluation" in capsys.readouterr().err
    none.unlink()
    assert gate(none, old) == 2 and "no evaluation there" in capsys.readouterr().err


def test_an_evaluation_says_what_it_asked_about_which_documents(tiny_adapter, collection, tmp_path, capsys):
    own = shutil.copytree(tiny_adapter, tmp_path / "adapter")  # its card gets the table
    words = ["evaluate", "--adapter", own, "--limit", 4, "--max-new-tokens", 3, "--models", "tuned"]
    for name in "ab":
        assert rag(*words, "--contexts", "retrieved", "--output", tmp_path / name) == 0
    both = [tmp_path / name / "evaluation.json" for name in "ab"]
    capsys.readouterr()
    assert gate(*both) == 0 and "not worse" in capsys.readouterr().out
    first = json.loads((tmp_path / "a" / "answers.jsonl").read_text().splitlines()[0])
    assert first["source"].endswith(".md")
    (tmp_path / "more.md").write_text("The lighthouse is green.")
    assert rag("ingest", tmp_path / "more.md") == 0
    assert rag(*words, "--limit", 6, "--contexts", "retrieved", "--output", tmp_path / "a") == 0
    assert gate(*both) == 2
    said = capsys.readouterr().err
    assert "different questions" in said and "different passages" in said and "different prompt" not in said
