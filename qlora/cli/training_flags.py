"""The command line of instruct_train_qlora.py: its flags, with every value resolved and checked."""

import argparse
import importlib.util
import shlex
from dataclasses import fields, replace
from pathlib import Path

from qlora import console, machine, presets, settings
from qlora.evaluation.questions import read_asked
from qlora.model import adapter, base_model
from qlora.model.lora import Lora
from qlora.model.parent import Parent, grow, read_parent
from qlora.prompt import Prompt
from qlora.training import checkpoints, export
from qlora.training.row_files import SUFFIXES, kind_of
from qlora.training.row_filters import Selection, keep_usable, read_selection
from qlora.training.rows import load_rows
from qlora.words import WORD
from qlora.writing import embedded_writer

REPORTERS = ("tensorboard", "wandb", "trackio")
RANK, TARGETS = 16, "all-linear"


def resolve_arguments(argv: list[str], description: str, steps: tuple[str, ...]) -> argparse.Namespace:
    """The arguments with every value resolved. Raises UserError with all mistakes of the call."""
    settings.load_dotenv_once()
    args, problems = console.parse_arguments(build_parser(description, steps), argv)
    named = args.base_model or (None if args.preset else settings.get("QLORA_BASE_MODEL"))
    preset = presets.PRESETS["laptop"]
    with problems.collecting():
        args.preset = presets.choose_preset(args.preset, detect=not problems.found)
        preset = presets.PRESETS[args.preset]
    for field in fields(preset):
        if getattr(args, field.name, "") is None:
            setattr(args, field.name, getattr(preset, field.name))
    parent = None
    if args.start_from:
        with problems.collecting():
            if args.start_from == embedded_writer.NAME:
                args.start_from = str(embedded_writer.find())
            parent = read_parent(args.start_from, named)
    args.base_model = named or (parent.base_model if parent else preset.base_model)
    args.dataset = [args.dataset] if isinstance(args.dataset, str) else args.dataset
    args.output = choose_output(args.output, args.base_model)
    choose_shape(args, parent, problems)
    choose_texts(args, parent, problems)
    args.columns = read_pairs(args.columns, "--columns", problems)
    if settings.launcher_failed():
        fix = f"on the CPU: torchrun --nproc_per_node 2 {shlex.join(['instruct_train_qlora.py', *argv])}"
        problems.add("one process was started instead of several", "accelerate launch", fix)
    if settings.sharding():
        fix = "leave it out of accelerate's configuration, and give --shard"
        problems.add(f"{settings.sharding()} cannot split 4-bit weights here", "accelerate launch", fix)
    if args.shard and settings.process_count() == 1:
        fix = "start several: torchrun --nproc_per_node N instruct_train_qlora.py"
        problems.add("one process has nobody to share with", "--shard", fix)
    args.filter = args.filter or (list(preset.filters) if args.dataset == [preset.dataset] else [])
    with problems.collecting():
        choose_selection(args)
    check_inputs(args, problems)
    problems.raise_if_any()
    return args


def choose_shape(args, parent: Parent | None, problems: console.Problems) -> None:
    """Resolves rank, alpha and layers: those of the adapter that is trained further, or the flags and defaults.

    Adds a problem for a flag that contradicts the adapter; its rank may grow.
    """
    if args.target_modules == [TARGETS]:
        args.target_modules = TARGETS
    if not parent:
        args.rank = args.rank or RANK
        args.alpha, args.target_modules = args.alpha or 2 * args.rank, args.target_modules or TARGETS
        if args.replay:
            problems.add("--replay without an adapter to start from", "command line", "add --start-from")
        return
    lora, fix = parent.lora, "leave it out: the adapter's shape is kept"
    if args.rank and args.rank < lora.rank:
        problems.add(f"the rank of {parent.name} is {lora.rank}", f"--rank {args.rank}", "give no lower one")
    lora = grow(lora, max(args.rank or 0, lora.rank))
    for flag, given, kept in (
        ("--alpha", args.alpha, lora.alpha),
        ("--target-modules", args.target_modules and sorted(args.target_modules), sorted_layers(lora)),
        ("--rslora", args.rslora, lora.rslora),
        ("--dora", args.dora, lora.dora),
    ):
        if given and given != kept:
            problems.add(f"{parent.name} has {kept}", f"{flag} {given}", fix)
    args.rank, args.alpha, args.target_modules = lora.rank, lora.alpha, sorted_layers(lora)
    args.rslora, args.dora = lora.rslora, lora.dora
    if args.replay and not parent.run:
        problems.add(f"nothing says which rows {parent.name} was trained on", "--replay", "leave it out")
    if args.output.resolve() == parent.folder.resolve():
        problems.add("the output is the adapter to start from", str(args.output), "give another --output")


def choose_texts(args, parent: Parent | None, problems: console.Problems) -> None:
    """Resolves the refusal: that of the adapter that is trained further, the flag's, or the default.

    Adds a problem for texts that contradict the adapter's, and for rules that do not name the refusal.
    """
    if kept := parent and parent.prompt:
        for flag, given, theirs in (("--refusal", args.refusal, kept.refusal), ("--rules", args.rules, kept.rules)):
            if given not in (None, theirs):
                problems.add(f"the prompt of {parent.name} is kept: {theirs}", flag, "leave it out")
        args.refusal, args.rules = kept.refusal, None
    args.refusal = args.refusal or Prompt.refusal
    if not WORD.search(args.refusal):
        problems.add("a refusal without words", "--refusal", "give a sentence")
    if args.rules and args.refusal not in args.rules:
        what = f"the rules do not say what to answer when the passages do not: {args.refusal}"
        problems.add(what, "--rules", "put the text of --refusal into them, word for word")


def sorted_layers(lora: Lora) -> str | list[str]:
    return lora.targets if isinstance(lora.targets, str) else sorted(lora.targets)


def choose_selection(args) -> Selection:
    """The rows that --filter, --min-words, --max-words, --max-rows, --require-extractive and --refusal-share select.

    None has a question of --exclude. Raises UserError for words that are not filters, and for bad questions.
    """
    problems = console.Problems()
    selection = read_selection(args.filter, args.min_words, args.max_words, problems)
    problems.raise_if_any()
    given = {"max_rows": args.max_rows, "extractive": args.require_extractive, "refusal_share": args.refusal_share}
    return replace(selection, **given, refusal=args.refusal, asked=read_asked(args.exclude))


def check_inputs(args, problems: console.Problems) -> None:
    """Adds problems of the files that the arguments name."""
    if not args.dry_run:
        with problems.collecting():
            checkpoints.check_unfinished(adapter.partial_folder(args.output), args.resume, args.overwrite)
            adapter.check_output(args.output, args.overwrite or (args.resume and adapter.is_finished(args.output)))
            machine.check_disk(machine.check_writable(args.output.parent), adapter.bytes_needed(args.rank))
    if args.merge:
        with problems.collecting():
            export.check_target(Path(args.merge))
    if args.export_gguf:
        with problems.collecting():
            export.check_gguf_target(Path(args.export_gguf))
    if args.push_to_hub:
        with problems.collecting():
            export.check_hub(args.push_to_hub)
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        problems.add(f"{args.report_to} is not installed", "--report-to", f"pip install {args.report_to}")
    if args.base_model != presets.EMBEDDED:
        with problems.collecting():
            base_model.resolve_base_model(args.base_model)
    if problems.found and all(kind_of(Path(source)) in SUFFIXES for source in args.dataset):
        with problems.collecting():  # the call is wrong anyway: report what is wrong with the rows as well
            keep_usable(load_rows(args.dataset, args.columns, args.train_on))


def choose_output(flag: str | None, base: str) -> Path:
    """The adapter folder: flag > QLORA_ADAPTER (unless it is none) > adapters/NAME-OF-BASE."""
    setting = settings.get("QLORA_ADAPTER")
    folder = Path(flag or (setting if setting != "none" else None) or f"adapters/{Path(base).name}").expanduser()
    return folder if folder.name else folder.resolve()


def read_pairs(texts: list[str], flag: str, problems: console.Problems) -> dict[str, str]:
    """NAME=VALUE words as a dict; a problem for each that is not one."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            problems.add(f"{flag} {text}: expected NAME=VALUE", "command line", f"write {flag} NAME=VALUE")
        pairs[name] = value
    return pairs


def build_parser(description: str, steps: tuple[str, ...]) -> argparse.ArgumentParser:
    """The parser, its flags grouped by the steps of the script."""
    title, _, text = description.partition("\n\n")
    parser = console.Parser(usage="instruct_train_qlora.py [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--preset", metavar="NAME", help="auto (by the GPU), laptop, llama2-7b or another (docs/training.md)")
    flag("--seed", type=console.number(int, 0, presets.SEEDS), default=0, help="of row order, split and LoRA weights")
    add_dataset_flags(parser.add_argument_group(steps[0]).add_argument)
    add_model_flags(parser.add_argument_group(steps[1]).add_argument)
    add_training_flags(parser.add_argument_group(steps[2]).add_argument)
    flag = parser.add_argument_group(steps[3]).add_argument
    flag("--output", metavar="FOLDER", help="the adapter (QLORA_ADAPTER, or adapters/NAME-OF-BASE)")
    flag("--overwrite", action="store_true", help="replace an adapter or an unfinished run there")
    flag("--merge", metavar="FOLDER", help="also write base + adapter as one model (also with --resume)")
    flag("--export-gguf", metavar="FILE", help="the same as GGUF, for llama.cpp and Ollama")
    flag("--push-to-hub", metavar="USER/NAME", help="also upload the adapter, private; needs HF_TOKEN")
    flag("--verbose", action="store_true", help="show all settings, also those with their default")
    return parser


def add_dataset_flags(flag) -> None:
    """Which rows are trained on."""
    share, pairs = console.number(float, 0, 1), {"nargs": "+", "action": "extend", "default": []}
    held_out = console.number(float, 0, 0.9, above=True)
    kinds = "files (.jsonl, .json, .csv, .parquet), folders, hub id (preset's)"
    flag("--dataset", nargs="+", metavar="ROWS", help=kinds)
    several = {"nargs": "+", "default": []}
    text = "rows that are all trained on: no document of theirs is held out"
    flag("--added-rows", metavar="ROWS", help=text, **several)
    text = "questions that are never trained on: those of an evaluation"
    flag("--exclude", metavar="FILE", help=text, **several)
    flag("--config", metavar="NAME", help="the configuration of a hub dataset")
    flag("--split", metavar="NAME", default="train", help="the split of a hub dataset, or of a saved one")
    flag(
        "--columns",
        metavar="OURS=THEIRS",
        help="the dataset's names of our columns (found out for usual ones)",
        **pairs,
    )
    text = "train each row turned around, too: the adapter can then write rows"
    flag("--writer", action="store_true", help=text)
    flag("--train-on", type=console.choice("last", "all"), default="last", help="answers of a conversation to train on")
    flag("--filter", metavar="COLUMN=A,B", help="only rows with these values; COLUMN!=A,B: without", **pairs)
    flag("--min-words", metavar="COLUMN=N", help="only rows with at least N words there", **pairs)
    flag("--max-words", metavar="COLUMN=N", help="only rows with at most N words there", **pairs)
    flag(
        "--max-rows",
        type=console.number(int, 2, 10**9),
        help="N rows, by --seed; streamed from the hub",
    )
    flag("--dry-run", action="store_true", help="show and save what would be trained on, and stop")
    flag("--require-extractive", action="store_true", help="only rows whose response is in the context")
    flag("--refusal-share", type=share, default=0.2, help="share of rows that refuse, at most")
    text = f"what the model says when the passages do not answer ({Prompt.refusal})"
    flag("--refusal", metavar="TEXT", help=text)
    flag("--rules", metavar="TEXT", help="the rules of the prompt in your language; they name the refusal")
    flag("--eval-share", type=held_out, default=0.1, help="share of rows held out, by document")
    flag("--distractors", type=console.number(int, 0, 20), help="other passages per row, at most (the preset's)")
    flag("--gold-probability", type=share, help="share of rows with the right passage (the preset's)")
    replay = "share of rows of --start-from that are mixed in"
    flag("--replay", type=console.number(float, 0, 0.9), default=0.0, help=replay)
    flag("--max-length", type=console.number(int, 64, 10**6), help="tokens per row, at most (the preset's)")


def add_model_flags(flag) -> None:
    """Which base model, and the shape of the adapter."""
    choice = console.choice("auto", "on", "off")
    flag("--base-model", metavar="MODEL", help="hub id or folder of a Llama-family model (the preset's)")
    flag("--no-cache", action="store_true", help="do not keep the base model in 4-bit for the next start")
    flag("--shard", action="store_true", help="divide the base model among the processes of torchrun")
    flag("--start-from", metavar="ADAPTER", help="train further: a folder, a hub id, or embedded (the writer)")
    flag("--rank", type=console.number(int, 1, 4096), help=f"LoRA rank ({RANK}, or that of --start-from)")
    flag("--alpha", type=console.number(int, 1, 10**6), help="LoRA alpha (twice the rank)")
    flag("--dropout", type=console.number(float, 0, 1), default=0.0, help="LoRA dropout")
    flag("--target-modules", nargs="+", metavar="LAYER", help=f"layers to adapt ({TARGETS})")
    flag("--rslora", action="store_true", help="scale by alpha / sqrt(rank): for high ranks")
    flag("--dora", action="store_true", help="also train magnitudes: slower, sometimes better at low ranks")
    text = "auto, on or off: recompute activations, for less memory"
    flag("--gradient-checkpointing", type=choice, metavar="X", default="auto", help=text)


def add_training_flags(flag) -> None:
    """How it is trained, measured and stopped."""
    count, steps = console.number(int, 1, 10**5), console.number(int, 0, 10**7)
    schedulers = ("cosine", "linear", "constant_with_warmup")
    flag("--batch-size", type=count, help="rows per forward pass, at most (the preset's)")
    flag("--accumulation", type=count, help="forward passes per optimizer step (the preset's)")
    flag("--epochs", type=console.number(float, 0, 1000, above=True), help="passes over the rows (the preset's)")
    flag("--max-steps", type=steps, default=0, help="optimizer steps; above 0 it overrides --epochs")
    flag("--learning-rate", type=console.number(float, 0, 1, above=True), help="peak rate (the preset's)")
    flag("--warmup", type=console.number(float, 0, 1), default=0.05, help="share of steps with a rising rate")
    text = f"how the rate falls: {', '.join(schedulers)}"
    flag("--scheduler", type=console.choice(*schedulers), metavar="NAME", default="cosine", help=text)
    flag(
        "--neftune", type=console.number(float, 0, 100), default=0.0, help="noise on embeddings; 5 is usual, 0 is none"
    )
    flag("--eval-steps", type=steps, default=0, help="evaluate every N steps; 0 is twice per run")
    flag("--eval-answers", type=steps, default=8, help="held-out rows to answer at each evaluation")
    flag("--patience", type=steps, default=0, help="stop after N evaluations without a lower loss; 0 is never")
    flag("--save-steps", type=steps, default=0, help="checkpoint every N steps; 0 is ten times per run")
    flag("--keep-checkpoints", type=count, default=1, help="checkpoints to keep during the run")
    flag("--resume", action="store_true", help="continue a run that was stopped or killed")
    names, text = ("none", *REPORTERS), f"{', '.join(REPORTERS)}: where the curves go, too"
    flag("--report-to", type=console.choice(*names), metavar="NAME", default="none", help=text)
