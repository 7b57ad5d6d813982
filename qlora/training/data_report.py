"""The data report: what a run trains on, and what it costs. Shown before the first step, and written as JSON.

    report = build_data_report(tokenizer, training, held_out, counts, plan)
    print_report(report)
    write_report(Path("data_report.json"), report)

`counts` holds rows `read` and `kept`, what was `dropped` and `leaked` (row_filters.Dropped), and for
`training` and `held out` the number of documents and of rows `shortened` and `too long`. `plan` comes
from `plan_costs`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from qlora import machine, settings
from qlora.console import fail, note, printable, shorten_text, stderr
from qlora.prompt import IGNORED
from qlora.refusal import is_refusal
from qlora.training.examples import Example, collate, count_labels, count_tokens
from qlora.training.row_filters import Dropped

PERCENTILES = (5, 25, 50, 75, 95)
MARKS = "⟦", "⟧"  # around the trained tokens, where colours are missing
# Share of the rate of large matmuls that training reaches, by bytes of what it computes in. Measured on two cores with
# 300 to 500 tokens per batch: 260 to 300 of 970 GFLOP/s in bf16, 140 to 160 of 215 in fp32.
UTILISATION = {2: 0.3, 4: 0.65}
# Bytes per token, layer and unit of the hidden size that forward keeps for backward. On a GPU as counted for
# SmolLM2-135M with LoRA on all linear layers under bf16 autocast; on the CPU as the process grows in bf16 and in
# fp32, 263 to 1,037 tokens. With checkpointing a layer keeps only its input.
ACTIVATION_BYTES_CUDA, ACTIVATION_BYTES_CPU = 30, {2: 60, 4: 90}
# Libraries, and on the CPU memory that the allocator keeps from batches of other lengths.
LIBRARIES_CUDA, LIBRARIES_CPU = 1.2e9, 1.9e9
FULL = 0.9  # share of the free memory that an estimate may fill; most estimates are too high


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
    batches = plan["batches"]
    batches_a_step = plan["accumulation"] * plan["processes"]
    trained = sum(map(count_labels, training))
    return {
        "rows": {"read": counts["read"], "kept": counts["kept"], "dropped": describe_dropped(counts["dropped"])},
        "leakage": describe_dropped(counts["leaked"]),
        "training": describe_part(training, counts["training"]),
        "held_out": describe_part(held_out, counts["held out"]),
        "lengths": measure_lengths(training),
        "labelled_share": round(trained / tokens, 4),
        "refused_share": round(sum(is_refused(tokenizer, example) for example in training) / len(training), 4),
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
        "example": mark_trained(tokenizer, choose_example(tokenizer, training)),
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


def is_refused(tokenizer, example: Example) -> bool:
    return is_refusal(tokenizer.decode(example.response_ids, skip_special_tokens=True))


# ------------------------------------------------------------------------------- estimate


def plan_costs(schedule, batches: Sequence[Sequence[Example]], model) -> dict:
    """The schedule's fields, and whatever else decides time and memory: the input of all estimates.

    `model` has its LoRA; it may be on the meta device, without weights. `batches` are those of the first epoch. The
    tokens that are computed count: without padding, common beginnings once.
    """
    computed = [collate(batch)["packed"].input_ids.numel() for batch in batches]
    longest = max(len(example.input_ids) for batch in batches for example in batch)
    sizes = {"batches": computed, "longest": longest, "processes": settings.process_count()}
    return {**asdict(schedule), **describe_model(model), **sizes}


def describe_model(model) -> dict[str, int]:
    """The sizes of a model with LoRA."""
    config = model.config.get_text_config()
    return {
        "parameters": model.num_parameters(),
        "lora_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
    }


def measure_rate(seconds: float = 0.5) -> float:
    """FLOP per second of this machine in a large square matmul, in the type that training computes in."""
    import torch
    from torch.utils.benchmark import Timer

    from qlora.machine import compute_dtype

    device, size = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 1536)
    matrix = torch.randn(size, size, dtype=compute_dtype(), device=device)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=seconds).median


def estimate_seconds(plan: dict, rate: float) -> float:
    """An estimate of how long all steps take, without evaluations: within 30 % on an idle CPU.

    A token costs 2 FLOP per weight forward and 2 backward (the base is frozen: no weight gradients, but for
    LoRA), and 2 more where activations are recomputed.
    """
    tokens = plan["steps"] * plan["accumulation"] * sum(plan["batches"]) / len(plan["batches"])
    share = UTILISATION[machine.compute_dtype().itemsize]
    return tokens * (6 if plan["checkpointing"] else 4) * plan["parameters"] / (rate * share)


def fits(plan: dict) -> bool:
    """Whether the estimated memory of the plan is free on this machine: on its GPU where it has one."""
    return estimate_memory(plan)["all"] * 1e9 <= FULL * machine.free_memory()


def estimate_memory(plan: dict) -> dict[str, float]:
    """An estimate of the GB a process needs, by what needs them, and in all: within a fifth on the CPU.

    4-bit linear layers and 16-bit embeddings take about 0.6 bytes per weight; a LoRA weight takes 16 (fp32 weight,
    gradient and two moments of AdamW). Activations are those of the largest batch, or of the part of it that the CPU
    computes at once; with checkpointing, the inputs of all layers and everything of one.
    """
    import torch

    from qlora.training.trainer import AT_ONCE

    tokens, size, on_gpu = max(plan["batches"]), machine.compute_dtype().itemsize, torch.cuda.is_available()
    if not on_gpu:
        tokens = min(max(AT_ONCE, plan["longest"]), tokens)
    layer = ACTIVATION_BYTES_CUDA if on_gpu else ACTIVATION_BYTES_CPU[size]
    kept = size * plan["layers"] + layer if plan["checkpointing"] else layer * plan["layers"]
    parts = {
        "base_model": 0.6 * plan["parameters"],
        "lora": 16 * plan["lora_parameters"],
        "activations": tokens * plan["hidden_size"] * kept,
        "libraries": LIBRARIES_CUDA if on_gpu else LIBRARIES_CPU,
    }
    return {name: round(size / 1e9, 2) for name, size in [*parts.items(), ("all", sum(parts.values()))]}


# ------------------------------------------------------------------------------- show


def choose_example(tokenizer, examples: Sequence[Example]) -> Example:
    """The row of median length among those with an answer; among all when every row refuses."""
    answered = [example for example in examples if not is_refused(tokenizer, example)] or list(examples)
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
