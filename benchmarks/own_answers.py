#!/usr/bin/env python
"""Closed-book rows to train beside others, against forgetting: general instructions, answered by the base model itself.

    python -m benchmarks.own_answers --output own.jsonl        # a minute on two cores
    python instruct_train_qlora.py --dataset rows.jsonl own.jsonl --output adapters/mine

The instructions (benchmarks/general_instructions.txt) are none of benchmarks/closed_book.jsonl, which measures.
"""

import json
import sys
from pathlib import Path

from qlora import console, machine, presets, settings
from qlora.model import base_model

INSTRUCTIONS = Path(__file__).with_name("general_instructions.txt")
BATCH, MOST_TOKENS = 16, 160


def main(argv: list[str]) -> int:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="python -m benchmarks.own_answers [flags]", description=title, epilog=text)
    parser.add_argument("--output", type=Path, default=Path("own.jsonl"), metavar="FILE", help="the rows")
    args, problems = console.parse_arguments(parser, argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    rows = answer(INSTRUCTIONS.read_text(encoding="utf-8").splitlines())
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    console.note(f"{len(rows)} rows: {args.output}")
    return 0


def answer(instructions: list[str]) -> list[dict]:
    """A row per instruction; an answer that does not end is cut at its last sentence."""
    from qlora.answering.generator import Generator
    from qlora.prompt import choose_prompt

    source = base_model.resolve_base_model(presets.EMBEDDED)
    tokenizer = base_model.load_tokenizer(source)
    prompt = choose_prompt(tokenizer)
    machine.threads()
    model = base_model.load_base_model(source)
    generator = Generator(model=model, tokenizer=tokenizer, max_new_tokens=MOST_TOKENS)
    rows = []
    with console.progress() as bar:
        for at in bar.track(range(0, len(instructions), BATCH), description="answers"):
            part = instructions[at : at + BATCH]
            for instruction, text in zip(part, generator.complete([prompt.messages(one) for one in part]), strict=True):
                whole = text.strip()
                cut = whole if whole.endswith((".", "!", "?")) else whole.rpartition(". ")[0] + "."
                rows.append({"instruction": instruction, "response": cut, "category": "closed_book"})
    return rows


if __name__ == "__main__":
    sys.exit(console.run(main))
