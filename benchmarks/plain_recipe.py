"""The plain recipe, TRL's SFTTrainer, and what train_speed.py needs measured in processes of their own.

    python benchmarks/plain_recipe.py prepare FOLDER    # readies the base model, outside of every measurement
    python benchmarks/plain_recipe.py train FOLDER      # the plain recipe: FOLDER/plain with adapter and run.json
    python benchmarks/plain_recipe.py score FOLDER      # losses.json: held-out loss of every adapter in FOLDER

The folder holds setup.json and rows.jsonl, which train_speed.py writes.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qlora import console, settings
from qlora.model import base_model
from qlora.prompt import IGNORED, choose_prompt, defuse, encode_row
from qlora.training.distractors import add_distractors
from qlora.training.examples import batch_groups
from qlora.training.row_filters import drop_leaked, hold_out, keep_usable
from qlora.training.rows import Row, load_rows

PROJECT = Path(__file__).resolve().parent.parent

VARIANTS = ("plain", "ours", "checkpointed")  # each a folder with an adapter
SEED, RANK, ALPHA, LEARNING_RATE, WARMUP = 0, 16, 32, 4e-4, 0  # even a single step trains at the full rate
DISTRACTORS, GOLD_PROBABILITY, EVAL_SHARE = 1, 0.85, 0.25
MAX_LENGTH, MAX_CHARACTERS = 2048, 3000  # a row this short, with a distractor, is never cut


@dataclass(frozen=True)
class Setup:
    """What the processes of a comparison share."""

    folder: str
    base_model: str
    batch_size: int
    rows: int

    @property
    def steps(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def path(self, *names: str) -> Path:
        return Path(self.folder, *names)


def main(argv: list[str]) -> int:
    command, folder = argv
    setup = Setup(**json.loads(Path(folder, "setup.json").read_text(encoding="utf-8")))
    settings.quieten_libraries()
    source = base_model.resolve_base_model(setup.base_model)
    if command != "prepare":
        {"train": train_plain, "score": score_adapters}[command](setup, source)
    return 0


# ------------------------------------------------------------------------------- rows


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, as instruct_train_qlora.py splits them."""
    training, held_out = hold_out(rows, EVAL_SHARE, SEED)
    return drop_leaked(training, held_out)[0], held_out


def load_shaped_rows(setup: Setup, source: str, part: int):
    """The tokenizer, and (messages, response) of the training (0) or held-out (1) rows.

    They are the texts that instruct_train_qlora.py makes of the file, in its order: same functions, same seed.
    """
    tokenizer = base_model.load_tokenizer(source)
    prompt = choose_prompt(tokenizer)
    rows, _ = keep_usable(load_rows(str(setup.path("rows.jsonl"))))
    shaped = add_distractors(split_rows(rows)[part], DISTRACTORS, GOLD_PROBABILITY, prompt, SEED)
    batches = batch_groups([row.passages for row in shaped], setup.batch_size, SEED)
    pairs = []
    for row in (shaped[n] for batch in batches for n in batch):
        passages = [defuse(tokenizer, text) for text in row.passages]
        pairs.append((prompt.messages(defuse(tokenizer, row.instruction), passages), defuse(tokenizer, row.response)))
    return tokenizer, pairs


def as_plain_text(tokenizer, messages: list[dict], response: str) -> dict[str, str]:
    """TRL's prompt and completion; TRL adds EOS.

    As messages they would end in the template's text after EOS (SmolLM2's: a line break), and their tokens would
    not be ours.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if tokenizer("").input_ids == [tokenizer.bos_token_id]:  # Llama-2: the tokenizer adds the BOS again
        text = text.removeprefix(tokenizer.bos_token)
    return {"prompt": text, "completion": response}


def count_tokens(table, ours: list[tuple[list[int], list[int]]]) -> dict[str, int]:
    """Tokens of TRL's rows, and how many rows have the very ids and labels of ours.

    All have with SmolLM2. Where the tokenizer joins the prompt's end with the response (Llama-2's), a row
    may differ by a token.
    """
    equal = [(row["input_ids"], row["labels"]) == pair for row, pair in zip(table, ours, strict=True)]
    tokens = sum(len(row["input_ids"]) for row in table)
    return {"rows": len(equal), "rows_with_equal_tokens": sum(equal), "useful_tokens": tokens}


# ------------------------------------------------------------------------------- train


def train_plain(setup: Setup, source: str) -> None:
    """Trains with TRL's defaults but for what is named; writes the adapter and what was measured."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
    from trl import SFTConfig, SFTTrainer

    from qlora.training import costs
    from qlora.training.trainer import checkpointing_field
    from qlora.training.training_run import peak_memory

    tokenizer, pairs = load_shaped_rows(setup, source, 0)
    # The same 4-bit base as ours. `training` matters only after evaluation passes, and there are none here.
    model = base_model.load_base_model(source, training=True)
    weights = count_layer_weights(model)
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    model.set_attn_implementation(attention)
    config = SFTConfig(
        output_dir=setup.folder,
        train_sampling_strategy="sequential",
        seed=SEED,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=setup.batch_size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP * setup.steps),
        **{checkpointing_field(): True},  # TRL's default
        use_liger_kernel=is_liger_kernel_available(),
        use_cpu=not torch.cuda.is_available(),  # or TRL's default, bf16 autocast, is refused
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([as_plain_text(tokenizer, *pair) for pair in pairs]),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock := make_step_clock()],
    )
    trained = trainer.train()
    # The peak is taken here, before anything of the benchmark's own; that of ours includes its evaluation.
    run = {"train_seconds": clock.seconds, "peak_memory": peak_memory(), "steps": trainer.state.global_step}
    run |= count_tokens(trainer.train_dataset, [encode_row(tokenizer, *pair) for pair in pairs])
    run |= {"useful_tokens_per_second": run["useful_tokens"] / clock.seconds}
    run |= {"train_loss": trained.training_loss, "attention": attention, "liger": config.use_liger_kernel}
    run |= {"layer_weights": weights, "matmul_gflops": costs.measure_rate() / 1e9}
    trainer.model.save_pretrained(setup.path("plain"))
    setup.path("plain", "run.json").write_text(json.dumps(run), encoding="utf-8")


def make_step_clock():
    """A TrainerCallback whose `seconds` are those of the optimizer steps: what run.json counts as train_seconds."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        started = seconds = 0.0

        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a GPU may still be computing
            self.seconds += time.perf_counter() - self.started

    return StepClock()


def count_layer_weights(model) -> int:
    """The weights of the base model's linear layers: no embeddings, head or norms."""
    from torch.nn import Linear

    layers = model.get_decoder().modules()
    return sum(layer.in_features * layer.out_features for layer in layers if isinstance(layer, Linear))


# ------------------------------------------------------------------------------- score


def score_adapters(setup: Setup, source: str) -> None:
    """Writes losses.json: the held-out loss of the base (`before`) and of every variant's adapter."""
    from peft import PeftModel

    tokenizer, pairs = load_shaped_rows(setup, source, 1)
    examples = [encode_row(tokenizer, *pair) for pair in pairs]
    base = base_model.load_base_model(source, training=True)
    losses = {"before": held_out_loss(base, examples)}
    for variant in VARIANTS:
        model = PeftModel.from_pretrained(base, setup.path(variant))
        losses[variant] = held_out_loss(model, examples)
        base = model.unload()
    setup.path("losses.json").write_text(json.dumps(losses), encoding="utf-8")


def held_out_loss(model, examples: list[tuple[list[int], list[int]]]) -> float:
    """Mean cross-entropy over all labelled tokens, a row at a time: no padding, and nothing of either recipe.

    run.json has the same mean over padded batches; bf16 rounding sets them 1 % apart.
    """
    import torch

    total, count = 0.0, 0
    for ids, labels in examples:
        trained = sum(label != IGNORED for label in labels)
        ids, labels = (torch.tensor([numbers], device=model.device) for numbers in (ids, labels))
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * trained
        count += trained
    return total / count


if __name__ == "__main__":
    sys.exit(console.run(main))
