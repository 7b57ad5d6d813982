#!/usr/bin/env python
"""Makes an adapter better by what people said of its answers; puts it in place only if it is not worse.

    python improve_qlora.py --adapter adapters/mine --collection mine --questions questions.jsonl
    python improve_qlora.py --adapter adapters/mine --rollback

Feedback becomes rows and questions (half each), a candidate is trained, both adapters answer the old questions and
those that were fed back, and the candidate takes the adapter's place if it is worse on neither and better on the ones
that were fed back. Else the adapter stays, and the exit code is 4. Run it again after a stop: it goes on.
"""

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from qlora import console, machine, settings
from qlora.cli.rag_flags import choose_collection
from qlora.console import note
from qlora.model.adapter import digest_weights, is_finished, read_adapter

STEPS = ("Feedback Rows", "Training", "Evaluation", "Release")
PROJECT = Path(__file__).resolve().parent
# Flags of the adapter's own training that every new one has as well, and those of one that is trained anew.
KEPT = ("preset", "seed", "dataset", "config", "split", "train_on", "filter", "min_words", "max_words", "max_rows")
KEPT += ("require_extractive", "refusal_share", "eval_share", "distractors", "gold_probability", "max_length", "writer")
KEPT += ("batch_size", "accumulation")
ANEW = ("base_model", "start_from", "rank", "alpha", "target_modules", "rslora", "dora", "dropout", "epochs")
ANEW += ("learning_rate", "refusal", "rules")
GENTLE = {"epochs": 2, "learning_rate": 2e-4}  # of a training that goes on; a fifth of the laptop preset's rate
REPLAYED = 10  # of the adapter's own rows for each new one, when it goes on, against forgetting
OLD, FED_BACK = "old questions", "questions that were fed back"


def main(argv: list[str]) -> int:
    args = resolve_arguments(argv)
    settings.quieten_libraries()
    console.print_settings("Improving an adapter", args, argv, build_parser(), ("adapter", "collection"))
    args.work.mkdir(parents=True, exist_ok=True)
    with machine.claiming(args.work):
        return run_steps(args)


def run_steps(args) -> int:
    from qlora.releasing import release

    release.finish(args.adapter)
    if args.rollback:
        release.roll_back(args.adapter)
        note(f"{args.adapter} is the adapter before the last release again; run this once more to undo it")
        return 0
    with console.step(STEPS, "Feedback Rows"):
        rows = export_feedback(args)
    with console.step(STEPS, "Training"):
        train_candidate(args, rows)
    with console.step(STEPS, "Evaluation"):
        if FED_BACK not in questions_of(args, rows):
            note(f"No {FED_BACK} yet: only half of what people correct becomes questions")
        comparisons = evaluate_both(args, rows)
    with console.step(STEPS, "Release"):
        return decide(args, comparisons)


# ============================================================================ Feedback Rows


def export_feedback(args) -> Path:
    """The file of rows, beside it that of questions. What was made of other feedback or another adapter is removed."""
    from qlora.releasing import history

    rows = args.work / "rows.jsonl"
    prompt = read_adapter(args.adapter).prompt
    run_script("rag_qlora", ["feedback", *args.places, "--export", rows, "--refusal", prompt.refusal])
    if not rows.read_text(encoding="utf-8").strip():
        raise console.fail("the feedback makes questions, but no rows", str(rows), "collect more")
    files = [rows, rows.with_suffix(".questions.jsonl"), args.questions, *args.rows]
    plan = {"adapter": digest_weights(args.adapter), "train": args.train}
    plan |= {"files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]}
    last = history.last_release(args.work)
    if (plan["files"], plan["adapter"]) == (last.get("files"), last.get("adapter")):
        raise console.fail("no feedback since the last release", str(args.work), "collect more")
    known = args.work / "plan.json"
    if not known.is_file() or json.loads(known.read_text(encoding="utf-8")) != plan:
        for name in ("candidate", "evaluations"):
            machine.remove_folder(args.work / name)
        machine.write_whole(known, json.dumps(plan))
    return rows


# ============================================================================ Training


def train_candidate(args, rows: Path) -> None:
    """The candidate: the adapter trained further, or a new one, on its own rows and the added ones."""
    from qlora.training.rows import load_rows

    candidate, added = args.work / "candidate", [rows, *args.rows]
    if not is_finished(candidate):
        before = read_training(args)
        given = {name: before.get(name) for name in KEPT + (ANEW if args.train == "anew" else ())}
        given["columns"] = [f"{ours}={theirs}" for ours, theirs in before.get("columns", {}).items()]
        if args.train == "continue":
            count = REPLAYED * len(load_rows(list(map(str, added))))
            given |= {"start_from": args.adapter, "max_rows": min(count, given["max_rows"] or count), **GENTLE}
        given |= {"added_rows": added, "exclude": [*questions_of(args, rows).values()], "output": candidate}
        words = [word for name, value in given.items() for word in as_words(name, value)]
        run_script("instruct_train_qlora", [*words, "--resume" if candidate.exists() else "--overwrite"])
    if (args.adapter / "ranking.json").is_file() and not (candidate / "ranking.json").is_file():
        rerank = json.loads((args.adapter / "ranking.json").read_text(encoding="utf-8"))["rerank"]
        run_script("rag_qlora", ["fit", "--adapter", candidate, *args.places, "--rerank", rerank])


def read_training(args) -> dict:
    """The arguments of the adapter's own training; those of the first adapter where releases have taken its place."""
    from qlora.releasing import history

    known = args.work / "training.json"
    released = {one.get("adapter") for one in history.read_releases(args.work)}
    if not known.is_file() or digest_weights(args.adapter) not in released:
        machine.write_whole(known, json.dumps(read_adapter(args.adapter).run["arguments"]))
    return json.loads(known.read_text(encoding="utf-8"))


def as_words(name: str, value) -> list:
    """A flag with its value, as a command line has it; nothing where it is not given."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool) or value is None:
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    return [flag, *values] if values else []


# ============================================================================ Evaluation


def questions_of(args, rows: Path) -> dict[str, Path]:
    """The files of questions that decide; none of their questions is trained on."""
    made = rows.with_suffix(".questions.jsonl")
    return {OLD: args.questions, **({FED_BACK: made} if made.stat().st_size else {})}


def evaluate_both(args, rows: Path) -> list:
    """The candidate beside the adapter, on the old questions and on those that were fed back."""
    from qlora.evaluation import gate
    from qlora.releasing.history import Comparison

    comparisons = []
    for name, questions in questions_of(args, rows).items():
        folders = {}
        for side, adapter in (("new", args.work / "candidate"), ("old", args.adapter)):
            folders[side] = args.work / "evaluations" / f"{name.split()[0]}-{side}"
            words = ["--questions", questions, "--models", "tuned", "--contexts", "retrieved"]
            run_script("rag_qlora", ["evaluate", "--adapter", adapter, *args.places, *words, "--output", folders[side]])
        reports = [folders[side] / "evaluation.json" for side in ("new", "old")]
        comparisons.append(Comparison(name, **folders, result=gate.judge(*reports, args.margin, args.seed)))
    return comparisons


# ============================================================================ Release


def decide(args, comparisons) -> int:
    """Puts the candidate in the adapter's place, or says why not; writes the report."""
    from qlora.evaluation import gate
    from qlora.releasing import history, release

    why = find_objection(comparisons)
    for one in comparisons:
        console.say(f"{one.name}: {gate.as_line(one.result)}")
    decision = f"not released: {why}" if why else "released"
    if not why:
        digest = digest_weights(args.work / "candidate")
        files = json.loads((args.work / "plan.json").read_text(encoding="utf-8"))["files"]
        about = {"when": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "adapter": digest, "files": files}
        history.note_release(args.work, comparisons, about)  # before it: a kill between them would lose the line
        release.release(args.adapter, args.work / "candidate")
    history.write_report(args.work, str(args.adapter), comparisons, decision)
    console.say(f"{decision}; the report: {args.work / 'improve.md'}")
    if not why:
        note("A server that runs answers with the old one until it is started again")
        note(f"Undo: python improve_qlora.py --adapter {args.adapter} --rollback")
    return gate.WORSE if why else 0


def find_objection(comparisons) -> str:
    """Why the candidate is not released; empty where nothing speaks against it."""
    worse = [one.name for one in comparisons if one.result["worse"]]
    if worse:
        return f"worse on the {' and the '.join(worse)}"
    better = [one for one in comparisons if one.name == FED_BACK] or comparisons
    return "" if better[0].result["mean"] > 0 else f"no better on the {better[0].name}"


# ============================================================================ command line


def run_script(name: str, words: list) -> None:
    """Runs another script of the project at this terminal. Raises UserError when it fails; it has said why."""
    command = [sys.executable, str(PROJECT / f"{name}.py"), *map(str, words)]
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        raise console.fail(f"{name}.py {words[0]} ended with exit code {code}", "see above", "run this again")


def resolve_arguments(argv: list[str]):
    """The arguments with every value resolved. Raises UserError with all mistakes of the call."""
    settings.load_dotenv_once()
    args, problems = console.parse_arguments(build_parser(), argv)
    args.collection = args.collection or choose_collection(problems)
    args.places = ["--collection", args.collection]
    with problems.collecting():
        args.adapter = Path(args.adapter or "")
        read_adapter(args.adapter)
    if not args.rollback:
        for flag, paths in (("--questions", [args.questions]), ("--rows", args.rows)):
            for path in paths:
                if path is None or not path.is_file():
                    problems.add(f"no file {path or 'of questions'}", flag, "name a file")
    problems.raise_if_any()
    args.work = args.work or Path("improvements") / args.adapter.resolve().name
    return args


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="improve_qlora.py [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--adapter", metavar="FOLDER", help="the adapter to improve; the better one takes its place")
    flag("--collection", type=console.name, metavar="NAME", help="whose feedback it is (documents)")
    flag("--questions", type=Path, metavar="FILE", help="questions that it must not answer worse than before")
    flag("--rows", type=Path, nargs="+", metavar="FILE", default=[], help="other new rows, such as `write` makes")
    text = "continue: train the adapter further; anew: train another one on all rows"
    flag("--train", type=console.choice("continue", "anew"), default="continue", help=text)
    flag("--margin", type=console.number(float, 0, 1), default=0.0, help="loss of overall F1 that is allowed")
    flag("--seed", type=console.number(int, 0), default=0, help="of the bootstrap")
    flag("--work", type=Path, metavar="FOLDER", help="where rows, candidate and report go (improvements/NAME)")
    flag("--rollback", action="store_true", help="put back the adapter before the last release")
    flag("--verbose", action="store_true", help="show all settings, also those with their default")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
