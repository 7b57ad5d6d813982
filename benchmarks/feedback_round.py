#!/usr/bin/env python
"""A round of feedback on the sample, made of known answers: what `improve` gains, and whether its gate holds.

    python -m benchmarks.feedback_round         # about an hour on two cores, resumable

A tenth of the documents that the sample has rows about is put apart, and an adapter is trained on the rows of the
others, as `make demo` does. It is asked the questions of those that were put apart. Of its wrong answers 40 are
corrected: half become rows and half questions, by their hash. Then a copy of the adapter is improved in both ways
(--train), and one is ruined on purpose: its learning rate is 50 times as high. The control is an adapter of another
seed without any feedback.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import improve_qlora
from benchmarks import ablation, trials
from qlora import console, settings
from qlora.evaluation import gate
from qlora.evaluation.comparison import describe_interval
from qlora.evaluation.questions import read_question
from qlora.markdown import as_markdown_table, put_section
from qlora.metrics import token_f1
from qlora.model.adapter import digest_weights
from qlora.presets import EMBEDDED_EMBEDDER
from qlora.prompt import Prompt
from qlora.releasing import history
from qlora.releasing.history import read_scores
from qlora.retrieval.feedback import Judgement
from qlora.retrieval.opening import load_embeddings, open_collection
from qlora.training.row_filters import hold_out
from qlora.training.rows import COLUMNS, Row, load_rows
from qlora.words import MARK, normalize
from qlora.writing.report import write_rows

WAYS = {"continue": 1, "anew": 1, "ruined": 50, "control": 1}  # and the factor of the learning rate
CORRECTED, RIGHT = 40, 0.5  # answers, and the F1 from which one is right
OTHERS = "others about these documents"
APART = 0.1  # of the rows, by document
COLLECTION, FOLDER = "feedback-round", Path("improvements/feedback-round")
GENTLE = improve_qlora.GENTLE["learning_rate"]


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    run_script("rag_qlora.py", "ingest", trials.DOCUMENTS, "--collection", COLLECTION)
    trained_on, apart = hold_out(load_rows([str(trials.SAMPLE / "train.jsonl")]), APART, seed=0)
    adapter = train_adapter(trained_on)
    log = open_collection("pgvector", COLLECTION, load_embeddings(EMBEDDED_EMBEDDER), EMBEDDED_EMBEDDER).feedback()
    if not log.all():
        for judgement in correct_answers(adapter, apart):
            log.add(judgement)
    console.note(f"{len(log.all())} answers are corrected")
    rows = [["", "released", "questions", "F1, old", "F1, new", "overall F1, new - old"]]
    for way in args.ways:
        improve(adapter, way)
        evaluate_others(adapter, FOLDER / way, apart)
        rows += [describe(way, name) for name in (improve_qlora.OLD, improve_qlora.FED_BACK, OTHERS)]
    text = as_markdown_table(rows, left=3)
    print(text)
    if args.write:
        put_section(args.write, "feedback-round", text)
    return 0


def train_adapter(rows: Sequence[Row]) -> Path:
    """The demo's recipe on these rows alone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    adapter, dataset = FOLDER / "adapter", FOLDER / "rows.jsonl"
    if not (adapter / "ranking.json").is_file():
        write_rows(dataset, list(map(as_line, rows)))
        words = ["--preset", "laptop", "--dataset", dataset, "--output", adapter]
        run_script("instruct_train_qlora.py", *words, "--resume" if adapter.exists() else "--overwrite")
        run_script("rag_qlora.py", "fit", "--adapter", adapter, "--collection", COLLECTION)
    return adapter


def correct_answers(adapter: Path, rows: Sequence[Row]) -> list[Judgement]:
    """Wrong answers to the questions of rows, each with what would have been right."""
    asked = [read_question(vars(row), Prompt.refusal) for row in rows]
    words = ["ask", "--json", "--adapter", adapter, "--collection", COLLECTION]
    lines = run_script("rag_qlora.py", *words, *(one.question for one in asked)).splitlines()
    judgements = []
    for one, turn in zip(asked, map(json.loads, lines), strict=True):
        said = MARK.sub("", turn["answer"]).strip()
        is_right = turn["refused"] if not one.answers else token_f1(said, list(one.answers)) >= RIGHT
        if not is_right or (one.answers and turn["refused"]):
            shown = tuple({"id": str(p["n"]), "source": p["source"], "text": p["text"]} for p in turn["passages"])
            right = {"right_answer": one.answers[0]} if one.answers else {"not_in_documents": True}
            judgements.append(Judgement(one.question, turn["answer"], passages=shown, **right))
    step = max(1.0, len(judgements) / CORRECTED)
    return [judgements[int(n * step)] for n in range(min(CORRECTED, len(judgements)))]


def improve(adapter: Path, way: str) -> None:
    """Improves a copy of the adapter."""
    folder = FOLDER / way
    copy = folder / "adapter"
    if not copy.exists():
        shutil.copytree(adapter, copy)
    before = digest_weights(copy)
    improve_qlora.GENTLE["learning_rate"] = GENTLE * WAYS[way]
    words = ["--adapter", copy, "--collection", COLLECTION, "--questions", ablation.join_questions(), "--work", folder]
    words = [str(word) for word in words]
    if way == "control":
        train_control(improve_qlora.resolve_arguments(words))
    elif not (folder / "improve.md").is_file():
        code = improve_qlora.main([*words, "--train", "anew" if way == "anew" else "continue"])
        if (digest_weights(copy) != before) != (code == 0):
            raise console.fail(f"exit code {code}, but the adapter says otherwise", str(copy), "this is a fault")


def train_control(args) -> None:
    """An adapter of another seed, without the feedback, on the same questions.

    Those that were fed back are chosen for being answered wrongly. Any other adapter is right on some of them.
    """
    candidate = args.work / "candidate"
    with console.step(improve_qlora.STEPS, "Feedback Rows"):
        rows = improve_qlora.export_feedback(args)
    if not (candidate / "ranking.json").is_file():
        words = ["--preset", "laptop", "--dataset", FOLDER / "rows.jsonl", "--seed", 1, "--output", candidate]
        run_script("instruct_train_qlora.py", *words, "--resume" if candidate.exists() else "--overwrite")
        run_script("rag_qlora.py", "fit", "--adapter", candidate, "--collection", COLLECTION)
    improve_qlora.evaluate_both(args, rows)


def evaluate_others(adapter: Path, folder: Path, rows: Sequence[Row]) -> None:
    """Both adapters on all questions about the documents that were put apart which nobody corrected."""
    made = read_lines(folder / "rows.jsonl") + read_lines(folder / "rows.questions.jsonl")
    corrected = {normalize(one.get("instruction") or one["question"]) for one in made}
    questions = FOLDER / "others.jsonl"
    write_rows(questions, [as_line(row) for row in rows if normalize(row.instruction) not in corrected])
    improved = folder / "adapter" if history.last_release(folder) else folder / "candidate"
    for tried, side in ((adapter, "old"), (improved, "new")):
        words = ["evaluate", "--adapter", tried, "--collection", COLLECTION, "--questions", questions]
        words += ["--models", "tuned", "--contexts", "retrieved", "--output", folder / "evaluations" / f"others-{side}"]
        run_script("rag_qlora.py", *words)


def as_line(row: Row) -> dict:
    return {name: getattr(row, name) for name in COLUMNS}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def describe(way: str, name: str) -> list[str]:
    """A line of the table."""
    released = "yes" if history.last_release(FOLDER / way) else "no"
    new, old = (FOLDER / way / "evaluations" / f"{name.split()[0]}-{side}" for side in ("new", "old"))
    result = gate.judge(new / "evaluation.json", old / "evaluation.json", margin=0.0, seed=0)
    f1 = [f"{read_scores(folder)['f1']:.2f}" for folder in (old, new)]
    return [way, released, name, *f1, describe_interval(result, metric=False)]


def run_script(name: str, *words) -> str:
    """What a script of the project printed; ends with its code if it fails."""
    command = [sys.executable, str(trials.PROJECT / name), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="python -m benchmarks.feedback_round [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--ways", nargs="+", choices=WAYS, metavar="NAME", default=list(WAYS), help=", ".join(WAYS))
    flag("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
