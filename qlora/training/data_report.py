"""The data report: what a run trains on, and what it costs. Shown before the first step, and written as JSON.

    report = build_data_report(tokenizer, training, held_out, counts, plan)
    print_report(report)
    write_report(Path("data_report.json"), report)

`counts` holds rows `read` and `kept`, what was `dropped` and `leaked` (row_filters.Dropped), and for
`training` and `held out` the number of documents and of rows `shortened` and `too long`. `plan` comes
from `costs.plan_costs`.
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from qlora import machine
from qlora.console import fail, note, printable, shorten_text, stderr
from qlora.prompt import IGNORED, Prompt
from qlora.refusal import is_refusal
from qlora.training.costs import estimate_memory, estimate_seconds, measure_rate
from qlora.training.examples import Example, count_labels, count_tokens
from qlora.training.row_filters import Dropped

PERCENTILES = (5, 25, 50, 75, 95)
MARKS = "⟦", "⟧"  # around the trained tokens, where colours are missing


def build_data_report(
    tokenizer,
    training: Sequence[Example],
    held_out: Sequence[Example],
    counts: dict,
    plan: dict,
    rate: float | None = None,
) -> dict:
    """The report as JSON-able data; `rate` are FLOP per second of this machine, measured when None.

    `training` are the rows of the first epoch.

    Raises UserError for examples that would train nothing, or no end of an answer (`check_examples`).
    """
    check_examples(tokenizer, training, "training")
    check_examples(tokenizer, held_out, "held-out")
    tokens = count_tokens(training)
    batches, refusal = plan["batches"], plan.get("refusal", Prompt.refusal)
    batches_a_step = plan["accumulation"] * plan["processes"]
    trained = sum(map(count_labels, training))
    return {
        "rows": {"read": counts["read"], "kept": counts["kept"], "dropped": describe_dropped(counts["dropped"])},
        "leakage": describe_dropped(counts["leaked"]),
        "training": describe_part(training, counts["training"]),
        "held_out": describe_part(held_out, counts["held out"]),
        "lengths": measure_lengths(training),
        "labelled_share": round(trained / tokens, 4),
        "refused_share": round(sum(is_refused(tokenizer, example, refusal) for example in training) / len(training), 4),
        "tokens_an_epoch": tokens,
        "steps": plan["steps"],
        "tokens_computed_an_epoch": sum(batches),
        "rows_a_step": round(len(training) * batches_a_step / len(batches), 1),
        "epochs": round(plan["steps"] * batches_a_step / len(batches), 2),
        "gradient_checkpointing": plan["checkpointing"],
        "estimate": {
            "seconds": round(estimate_seconds(plan, rate or measure_rate())),
            "memory_gb": estimate_memory(plan),
        },
        "example": mark_trained(tokenizer, choose_example(tokenizer, training, refusal)),
    }


def write_report(path: Path, report: dict) -> None:
    """Writes the report as indented JSON."""
    machine.write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------- check


def check_examples(tokenizer, examples: Sequence[Example], name: str) -> None:
    """Raises UserError when no token is trained, or for the first row that doesn't end in a trained EOS.

    Otherwise hours of training would give a model that learnt nothing, or that never stops.
    """
    if examples and not any(map(count_labels, examples)):
        what = f"no token of the {name} rows is trained: every label is {IGNORED}"
        raise fail(what, "chat template", "report it, with the base model's name; another base model may work")
    for n, example in enumerate(examples, 1):
        if example.input_ids[-1] != tokenizer.eos_token_id or example.labels[-1] != tokenizer.eos_token_id:
            end = shorten_text(tokenizer.decode(example.input_ids[-12:]))
            what = f"{name} row {n} does not end in a trained EOS token but in {end!r}"
            where = f"tokenizer, whose EOS is {tokenizer.eos_token!r}"
            raise fail(what, where, "check that the tokenizer belongs to the base model; if it does, report it")


# ------------------------------------------------------------------------------- count


def describe_dropped(dropped: Dropped) -> dict[str, dict]:
    """Reason -> number of rows and up to three examples."""
    return {reason: {"rows": n, "examples": dropped.examples.get(reason, [])} for reason, n in dropped.items()}


def describe_part(examples: Sequence[Example], counts: dict[str, int]) -> dict[str, int]:
    """Rows, tokens and documents of the training or the held-out part, and what --max-length did to it."""
    return {
        "rows": len(examples),
        "documents": counts["documents"],
        "tokens": count_tokens(examples),
        "shortened": counts["shortened"],
        "too_long": counts["too long"],
    }


def measure_lengths(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Percentiles and maximum of the tokens of prompt, response (with EOS) and whole row.

    A percentile is the smallest length of a row that at least that share of the rows does not exceed.
    """
    import numpy

    rows = numpy.array([len(example.input_ids) for example in examples])
    responses = numpy.array([count_labels(example) for example in examples])
    names = [*(f"{share}%" for share in PERCENTILES), "max"]

    def describe(lengths) -> dict[str, int]:
        values = numpy.percentile(lengths, [*PERCENTILES, 100], method="inverted_cdf")
        return dict(zip(names, map(int, values), strict=True))

    return {"prompt": describe(rows - responses), "response": describe(responses), "row": describe(rows)}


def is_refused(tokenizer, example: Example, refusal: str) -> bool:
    return is_refusal(tokenizer.decode(example.response_ids, skip_special_tokens=True), refusal)


# ------------------------------------------------------------------------------- show


def choose_example(tokenizer, examples: Sequence[Example], refusal: str = Prompt.refusal) -> Example:
    """The row of median length among those with an answer; among all when every row refuses."""
    answered = [example for example in examples if not is_refused(tokenizer, example, refusal)] or list(examples)
    return sorted(answered, key=lambda example: len(example.input_ids))[len(answered) // 2]


def mark_trained(tokenizer, example: Example) -> str:
    """The row as the model reads it, with special tokens, and its trained part between the marks."""
    pieces = []
    tokens = zip(example.input_ids, example.labels, strict=True)
    for trained, group in groupby(tokens, key=lambda token: token[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        text = text.replace(MARKS[0], "[[").replace(MARKS[1], "]]")
        pieces.append(f"{MARKS[0]}{text}{MARKS[1]}" if trained else text)
    return "".join(pieces)


def color_trained(marked: str):
    """A rich Text of `mark_trained`'s text without marks, the trained part in bold green."""
    from rich.text import Text

    text = Text()
    for n, piece in enumerate(re.split(f"[{''.join(MARKS)}]", marked)):
        text.append(printable(piece), style="bold green" if n % 2 else "")
    return text


def print_report(report: dict) -> None:
    """Prints on stderr what the notes of the step leave out: examples, lengths, cost and one row."""
    for dropped in (report["rows"]["dropped"], report["leakage"]):
        print_dropped(dropped)
    print_lengths(report["lengths"])
    note(f"trained are {report['labelled_share']:.1%} of the tokens; {report['refused_share']:.1%} of the rows refuse")
    note(
        f"{report['steps']} steps of {report['rows_a_step']:g} rows = {report['epochs']} epochs "
        f"of {report['tokens_an_epoch']:,} tokens, of which {report['tokens_computed_an_epoch']:,} are computed"
    )
    memory = dict(report["estimate"]["memory_gb"])
    needed = memory.pop("all")
    parts = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in memory.items())
    note(f"estimate: {show_seconds(report['estimate']['seconds'])}, {needed} GB of memory ({parts})")
    note(f"gradient checkpointing {'on' if report['gradient_checkpointing'] else 'off'}")
    note("one row; its trained part is green:")
    stderr().print(color_trained(report["example"]))


def print_dropped(dropped: dict[str, dict]) -> None:
    """The reasons of `describe_dropped`, each with its examples."""
    for reason, found in dropped.items():
        note(f"  {found['rows']} dropped: {reason}")
        for row in found["examples"]:
            note(f"    {row['instruction']} -> {row['response']}")


def print_lengths(lengths: dict[str, dict[str, int]]) -> None:
    """The table of percentiles."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 0, 0, 2))
    for heading in ("tokens", *lengths["row"]):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for name, values in lengths.items():
        table.add_row(name, *map(str, values.values()))
    stderr().print(table)


def show_seconds(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`: as exact as an estimate can be."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
