"""The committed notebooks are what Markdown and scripts say today; a notebook that is not is refused."""

import json
import shutil

import pytest
from conftest import PROJECT

from notebooks import build
from qlora import console

NAME = "rag_qlora"


def test_the_committed_notebooks_are_those_of_today():
    assert console.run(build.main, ["--check"]) == 0


def change_cell(notebook: dict, text: str, by: str) -> None:
    """Replaces the text in the first code cell that has it."""
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code" and text in "".join(cell["source"]))
    cell["source"] = "".join(cell["source"]).replace(text, by)


def add_output(notebook: dict, output: dict) -> None:
    next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["outputs"].append(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda notebook: change_cell(notebook, "return 3 if", "return 4 if"), "is not what Markdown and script say"),
        (lambda notebook: notebook["cells"].pop(), "is not what Markdown and script say"),
        (lambda notebook: notebook["cells"][4].update(execution_count=7), "not executed once each"),
        (
            lambda notebook: add_output(
                notebook, {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
            ),
            "a cell failed",
        ),
        (
            lambda notebook: add_output(
                notebook, {"output_type": "stream", "name": "stdout", "text": str(PROJECT / "x")}
            ),
            "a path of a machine",
        ),
        (
            lambda notebook: add_output(
                notebook, {"output_type": "stream", "name": "stdout", "text": "x" * build.LIMIT}
            ),
            "keep it below",
        ),
    ],
)
def test_a_notebook_that_drifted_is_refused(change, said, tmp_path, monkeypatch, capsys):
    for suffix in (".md", ".ipynb"):
        shutil.copyfile(PROJECT / "notebooks" / f"{NAME}{suffix}", tmp_path / f"{NAME}{suffix}")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert console.run(build.main, ["--check"]) == 0
    path = tmp_path / f"{NAME}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    change(notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert console.run(build.main, ["--check"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## 2. Text Generation", "## 2. Generating", "the numbered headings are"),
        ("fill_if_empty(args, store)\n```\n\nWhat", "```\n\nWhat", "the steps are called as"),
        ("generator = make_generator(args, model, tokenizer, prompt)", "generator = None", "the steps are called as"),
    ],
)
def test_prose_that_does_not_follow_the_script_is_refused(old, new, said, tmp_path, monkeypatch, capsys):
    text = (PROJECT / "notebooks" / f"{NAME}.md").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / f"{NAME}.md").write_text(text.replace(old, new), encoding="utf-8")
    problems = console.Problems()
    build.check_steps(NAME, build.read_prose(tmp_path / f"{NAME}.md"), problems)
    assert [said in problem.what for problem in problems.found] == [True]


def test_sources_are_those_of_the_files():
    import inspect
    from textwrap import dedent

    import rag_qlora
    from qlora.answering.citations import Answer
    from qlora.answering.generator import Generator

    assert build.find_source("rag_qlora.ask") == inspect.getsource(rag_qlora.ask).rstrip()
    assert build.find_source("qlora.answering.citations.Answer") == inspect.getsource(Answer).rstrip()
    assert (
        build.find_source("qlora.answering.generator.Generator.write")
        == dedent(inspect.getsource(Generator.write)).rstrip()
    )
    assert "STEPS = (" in build.find_source("rag_qlora") and "def " not in build.find_source("rag_qlora")
