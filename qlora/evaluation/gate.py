"""Whether a new model may be released: it must not be worse than the old one on the same questions.

    result = judge(new, old, margin=0.0, seed=0)    # two evaluation.json, with their answers.jsonl
    result["worse"]                                 # then `compare --fail-if-worse` ends with exit code 4
    as_line(result)                                 # for the log of a build

Worse: the whole interval of new - old lies below -margin. It is that of a paired bootstrap of overall F1, which counts
right refusals, over the answers of the tuned model from retrieved passages.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from qlora.console import Problems, fail, printable
from qlora.evaluation.comparison import describe_interval, paired_bootstrap, read_answers
from qlora.machine import write_whole

WORSE = 4  # the exit code
METRIC, CELL = "overall_f1", ("tuned", "retrieved")
SAME = {"questions_digest": "questions", "passages_digest": "passages", "prompt": "prompt"}  # of both evaluations


def judge(new: Path, old: Path, margin: float, seed: int) -> dict:
    """The difference with its interval, `worse`, and the documents that lost, with their questions.

    Raises UserError when the evaluations differ in questions, passages or prompt: then it measures something else.
    """
    check_alike(new, old)
    runs = [read_cell(path) for path in (new, old)]
    keys = [key for key in runs[0] if key in runs[1]]
    if not keys:
        what = f"no question was answered by the {CELL[0]} model from {CELL[1]} passages in both evaluations"
        raise fail(what, f"{new}, {old}", "evaluate both adapters on the same questions")
    pairs = [(runs[0][key], runs[1][key]) for key in keys]
    values = [[line["scores"][METRIC] for line in side] for side in zip(*pairs, strict=True)]
    means = {name: round(sum(part) / len(part), 4) for name, part in zip(("new", "old"), values, strict=True)}
    difference = {"metric": METRIC, **paired_bootstrap(*values, seed)}
    worse = difference["high"] < -margin
    return {"worse": worse, "margin": margin, **means, **difference, "lost": find_lost(pairs)}


def check_alike(new: Path, old: Path) -> None:
    """Raises UserError that names everything in which the two evaluations may not differ."""
    problems, settings = Problems(), [read_settings(path) for path in (new, old)]
    for name, what in SAME.items():
        values = [one.get(name) for one in settings]
        if None in values:
            without = new if values[0] is None else old
            problems.add(f"an evaluation that does not say which {what} it used", str(without), "evaluate again")
        elif values[0] != values[1]:
            fix = f"evaluate both with the same {what}, or compare them without --fail-if-worse"
            problems.add(f"the two evaluations have different {what}", f"{new}, {old}", fix)
    problems.raise_if_any()


def read_settings(report: Path) -> dict:
    try:
        return json.loads(report.read_text(encoding="utf-8"))["settings"]
    except OSError as error:
        raise fail("no evaluation there", str(report), "name an evaluation.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise fail(f"damaged evaluation ({error})", str(report), "evaluate again") from error


def read_cell(report: Path) -> dict[tuple, dict]:
    """(question, answers) -> the line of answers.jsonl, of the cell that is judged."""
    path = report.parent / "answers.jsonl"
    try:
        lines = [line for line in read_answers(path) if (line["model"], line["context"]) == CELL]
        return {(line["question"], *line["answers"]): line for line in lines if line["scores"][METRIC] is not None}
    except OSError as error:
        raise fail("no answers there", str(path), "keep answers.jsonl beside evaluation.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"damaged answers ({error})", str(path), "evaluate again") from error


def find_lost(pairs: Sequence[tuple[dict, dict]]) -> list[dict]:
    """The documents whose questions are answered worse, the greatest loss first, each with those questions."""
    documents = defaultdict(list)
    for pair in pairs:
        documents[pair[0].get("source") or "(no document)"].append(pair)
    lost = []
    for source, own in documents.items():
        means = [sum(line["scores"][METRIC] for line in side) / len(own) for side in zip(*own, strict=True)]
        if means[0] < means[1]:
            worse = [describe_pair(new, old) for new, old in own if new["scores"][METRIC] < old["scores"][METRIC]]
            numbers = {"n": len(own), "new": round(means[0], 4), "old": round(means[1], 4)}
            lost.append({"source": source, **numbers, "questions": worse})
    return sorted(lost, key=lambda one: (one["new"] - one["old"]) * one["n"])


def describe_pair(new: dict, old: dict) -> dict:
    """A question with both answers."""
    known = {"question": new["question"], "answers": new["answers"]}
    return {**known, "new": new["answer"], "old": old["answer"]}


# ------------------------------------------------------------------------------- what people and builds read


def as_line(result: dict) -> str:
    """One line: `not worse: overall F1 0.61 -> 0.64, +0.03 [-0.01, 0.07], n=96`."""
    said = "worse" if result["worse"] else "not worse"
    allowed = f", a loss of {result['margin']:g} is allowed" if result["margin"] else ""
    interval = describe_interval(result, metric=False)
    return f"{said}: overall F1 {result['old']:.2f} -> {result['new']:.2f}, {interval}{allowed}"


def as_text(result: dict) -> str:
    """The line, after the documents that lost and their questions."""
    lines = []
    for one in result["lost"]:
        lines.append(f"{one['source']}: {one['old']:.2f} -> {one['new']:.2f}, n={one['n']}")
        lines += [f"  {asked['question']}\n    {asked['old']} -> {asked['new']}" for asked in one["questions"]]
    return "\n".join([*(["Documents with worse answers:", *lines, ""] if lines else []), as_line(result)])


def write_junit(path: Path, result: dict) -> None:
    """The result as JUnit XML: one test, which fails when the new model is worse.

    XML 1.0 has no way to write control characters, which an answer may have.
    """
    counts = {"tests": "1", "failures": str(int(result["worse"]))}
    suite = ElementTree.Element("testsuite", name="rag_qlora compare", **counts)
    case = ElementTree.SubElement(suite, "testcase", classname="rag_qlora", name="answers are not worse than before")
    if result["worse"]:
        ElementTree.SubElement(case, "failure", message=as_line(result)).text = printable(as_text(result))
    ElementTree.SubElement(case, "system-out").text = printable(as_text(result))
    ElementTree.indent(suite)
    write_whole(path, ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")
