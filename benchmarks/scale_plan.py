"""GB that each card needs to fine-tune a Llama-2 on several of them, by the estimate of the data report.

    python -m benchmarks.scale_plan        # nothing is measured: shapes only, a few seconds

Batches of 4 rows of 512 tokens, gradient checkpointing on, LoRA of rank 16 on all linear layers. With --shard the
layers are divided among the cards.
"""

import sys

from benchmarks.gpu_memory import LLAMAS, Step, make_model, make_rows, pretended_gpu
from qlora.markdown import as_markdown_table
from qlora.training import costs, trainer

ROWS, LENGTH = 4, 512
CARDS = (1, 2, 4, 8)
SIZES = (16, 24, 40, 80)  # GB of cards


def estimate(model, rows, cards: int, shares: int) -> float:
    """GB of one of the cards, libraries and all."""
    schedule = trainer.Schedule(
        **dict.fromkeys(trainer.Schedule.__dataclass_fields__, 1) | {"micro_batch": ROWS, "checkpointing": True}
    )
    plan = costs.plan_costs(schedule, [rows], model, shares)
    return costs.estimate_memory({**plan, "processes": cards})["all"]


def smallest(needed: float) -> str:
    """The smallest usual card that has so much left, as `check_gpu_memory` counts."""
    return next((f"{size} GB" for size in SIZES if needed <= costs.FULL * size), "none")


def main() -> int:
    table = [["Llama-2", "cards", "GB per card", "fits", "with --shard", "fits"]]
    with pretended_gpu():
        for name, shape in LLAMAS.items():
            step = Step(shape, ROWS, LENGTH, checkpointing=True)
            model, rows = make_model(step), make_rows(step)
            for cards in CARDS:
                whole, shared = estimate(model, rows, cards, 1), estimate(model, rows, cards, cards)
                divided = [f"{shared:.1f}", smallest(shared)] if cards > 1 else ["", ""]
                table.append([name.upper(), str(cards), f"{whole:.1f}", smallest(whole), *divided])
    print(as_markdown_table(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
