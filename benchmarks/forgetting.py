#!/usr/bin/env python
"""Does the tuned model still do what the base model could? Loss on closed-book instructions of no document.

    python benchmarks/forgetting.py --adapter adapters/demo      # under a minute on two cores

The 40 rows of benchmarks/closed_book.jsonl (questions, lists, classification, rewriting, a poem) are in no
training. The loss is that of training, a mean over the responses' tokens; the interval is over rows.
"""

import json
import sys
from pathlib import Path

from qlora import console, machine, settings
from qlora.evaluation import comparison
from qlora.model import adapter, base_model
from qlora.training.examples import tokenize_rows
from qlora.training.rows import load_rows

PROJECT = Path(__file__).resolve().parent.parent

ROWS = PROJECT / "benchmarks" / "closed_book.jsonl"


def main(argv: list[str]) -> int:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="forgetting.py --adapter FOLDER", description=title, epilog=text)
    parser.add_argument("--adapter", type=Path, required=True, help="folder that training wrote")
    flags, problems = console.parse_arguments(parser, argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    from qlora.model.lean_layers import make_lean

    trained = adapter.read_adapter(flags.adapter)
    tokenizer = base_model.load_tokenizer(str(flags.adapter))
    tokenizer.chat_template = trained.prompt.chat_template
    # As for training: the CPU kernel for answering repacks the weights, which packed rows cannot use.
    base = base_model.load_base_model(base_model.resolve_base_model(trained.base_model), training=True)
    model = adapter.load_adapter(base, trained).eval()
    make_lean(model)
    examples, _ = tokenize_rows(tokenizer, trained.prompt, load_rows(str(ROWS)), max_length=1024)
    with model.disable_adapter():
        before = measure_losses(model, examples)
    print(json.dumps(compare(before, measure_losses(model, examples)), indent=2))
    return 0


def measure_losses(model, examples) -> list[tuple[float, int]]:
    """The summed loss of each row's response, and its tokens."""
    import torch

    from qlora.training import trainer
    from qlora.training.examples import collate

    measured = []
    for example in examples:
        row = {name: tensor.to(model.device) for name, tensor in collate([example]).items()}
        with torch.no_grad(), torch.autocast(model.device.type, dtype=machine.compute_dtype()):
            losses = trainer.token_losses(trainer.label_logits(model, row), row["labels"])
        measured.append((losses.sum().item(), int((losses > 0).sum())))
    return measured


def compare(base: list[tuple[float, int]], tuned: list[tuple[float, int]]) -> dict:
    """Loss a token of both models, and how much of the base's the tuned model's is above it."""
    tokens = sum(count for _, count in base)
    before, after = (sum(loss for loss, _ in rows) / tokens for rows in (base, tuned))
    scale = len(base) / (tokens * before)  # with it the mean over rows is the difference a token, in the base's losses
    rows = ([loss * scale for loss, _ in part] for part in (tuned, base))
    spread = comparison.paired_bootstrap(*rows, seed=0)
    worse = {"mean": spread["mean"], "low": spread["low"], "high": spread["high"]}
    return {"rows": len(base), "tokens": tokens, "base": round(before, 4), "tuned": round(after, 4), "worse by": worse}


if __name__ == "__main__":
    sys.exit(console.run(main))
