"""Training: LoRA on the 4-bit base, and an SFTTrainer that computes only what the loss needs.

Three things make it fast and leave the loss as it is: logits for the response positions only (rows
are padded on the left, so that all responses end together), batches of rows of similar length, and
bf16 autocast.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from qlora import console
from qlora.base_model import LARGE, compute_dtype
from qlora.dataset import Example
from qlora.prompt import IGNORED


def add_lora(model, rank: int, alpha: int, dropout: float, seed: int):
    """The model with trainable low-rank adapters on all linear layers but the head, the rest frozen."""
    from peft import LoraConfig, get_peft_model

    set_seed(seed)  # the A matrices start random
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all) weights; a 4-bit weight counts as one although two share a byte."""
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return trainable, model.num_parameters()


def needs_checkpointing(choice: str, parameters: int) -> bool:
    """Whether activations are recomputed: slower by a third, needed where they fill the memory."""
    return choice == "on" or (choice == "auto" and parameters >= LARGE)


@dataclass(frozen=True)
class Schedule:
    """How a run trains; `steps` are optimizer steps of `micro_batch` x `accumulation` rows each."""

    learning_rate: float
    micro_batch: int
    accumulation: int
    steps: int
    eval_steps: int
    warmup_steps: int
    scheduler: str
    checkpointing: bool
    seed: int


def plan_schedule(args, rows: int, parameters: int) -> Schedule:
    """The schedule of a run over `rows` rows; --max-steps goes before --epochs."""
    effective = args.batch_size * args.accumulation
    steps = args.max_steps or max(1, math.ceil(args.epochs * rows / effective))
    return Schedule(
        learning_rate=args.learning_rate,
        micro_batch=args.batch_size,
        accumulation=args.accumulation,
        steps=steps,
        eval_steps=args.eval_steps or math.ceil(steps / 2),
        warmup_steps=math.ceil(args.warmup * steps),
        scheduler=args.scheduler,
        checkpointing=needs_checkpointing(args.gradient_checkpointing, parameters),
        seed=args.seed,
    )


def collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    """A batch padded on the left: (rows, longest) input_ids, attention_mask, position_ids and labels."""

    def pad(key: str, value: int) -> torch.Tensor:
        rows = [torch.tensor(example[key]) for example in examples]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    # The labels say where a row begins; the mask hides what stands before, so any id will do there.
    mask = pad_sequence(
        [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples],
        batch_first=True,
        padding_side="left",
    )
    return {
        "input_ids": pad("input_ids", 0),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "labels": pad("labels", IGNORED),
    }


def response_loss(model, inputs: dict[str, torch.Tensor], items: int | None = None) -> torch.Tensor:
    """Summed cross-entropy of the labelled tokens over `items` (default: their number).

    The head, a third of the work of a small Llama, runs over the longest response of the batch only.
    """
    labels = inputs["labels"]
    longest = int((labels != IGNORED).sum(dim=1).max())
    # Positions, not a count: a count makes a strided slice, which F.linear turns into a batched
    # product with a copy of the whole head for every row (a quarter of a step on the CPU).
    last = torch.arange(labels.shape[1] - longest - 1, labels.shape[1], device=labels.device)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        logits_to_keep=last,
        use_cache=False,
    ).logits[:, :-1]
    targets = labels[:, -longest:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss / (items if items is not None else (targets != IGNORED).sum())


class LengthOrder(Sampler):
    """Row numbers so that each batch holds rows of similar length; a new seeded order every epoch.

    Rows are shuffled, sorted by length within pools of `pool` batches, and the batches shuffled. The
    order depends on seed and epoch alone (TRL's sampler draws from the global generator).
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, pool: int = 16):
        self.lengths, self.batch, self.seed, self.pool = lengths, batch, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        chance = random.Random(self.seed * 1_000_003 + self.epoch)
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        size = self.batch * self.pool
        order = [
            n for at in range(0, len(order), size) for n in sorted(order[at : at + size], key=self.lengths.__getitem__)
        ]
        batches = [order[at : at + self.batch] for at in range(0, len(order), self.batch)]
        # A short batch stays last, where the loader looks for it.
        last = [batches.pop()] if len(batches[-1]) < self.batch else []
        chance.shuffle(batches)
        return iter([n for batch in batches + last for n in batch])


class ResponseTrainer(SFTTrainer):
    """SFTTrainer over our own token ids and labels; see the module's docstring."""

    def __init__(
        self, model, tokenizer, training: Sequence[Example], held_out: Sequence[Example], plan: Schedule, folder
    ):
        on_gpu = torch.cuda.is_available()
        dtype = compute_dtype()
        config = SFTConfig(
            output_dir=str(folder),
            learning_rate=plan.learning_rate,
            per_device_train_batch_size=plan.micro_batch,
            per_device_eval_batch_size=2 * plan.micro_batch,  # no gradients to keep
            gradient_accumulation_steps=plan.accumulation,
            max_steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            lr_scheduler_type=plan.scheduler,
            optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=not on_gpu,
            activation_checkpointing=plan.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if plan.checkpointing else None,
            eval_strategy="steps",
            eval_steps=plan.eval_steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=plan.seed,
        )
        # TRL refuses the DataParallel that Trainer would choose with several GPUs and one process.
        config._n_gpu = min(config.n_gpu, 1)
        super().__init__(
            model=model,
            args=config,
            processing_class=tokenizer,
            data_collator=collate,
            train_dataset=as_dataset(training),
            # Longest first: the peak of memory comes at once, and rows of a batch need little padding.
            eval_dataset=as_dataset(sorted(held_out, key=lambda example: -len(example.input_ids))),
        )
        self.remove_callback(PrinterCallback)
        self.lengths = [len(example.input_ids) for example in training]
        self.useful_tokens = 0
        # TRL casts the adapter to bf16, where small steps of AdamW round to nothing.
        for weight in self.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return LengthOrder(self.lengths, self.args.per_device_train_batch_size, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = response_loss(model, inputs, num_items_in_batch)
        if model.training:
            self.useful_tokens += int(inputs["attention_mask"].sum())
        return (loss, None) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Held-out loss as a mean over tokens: it doesn't depend on the batch size, as Trainer's mean of means does."""
        started = time.perf_counter()
        self.model.eval()
        total, tokens = 0.0, 0
        for inputs in self.get_eval_dataloader():
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                total += response_loss(self.model, inputs, items=1).item()
            tokens += int((inputs["labels"] != IGNORED).sum())
        metrics = {"eval_loss": total / tokens, "eval_runtime": time.perf_counter() - started}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def as_dataset(examples: Sequence[Example]):
    """The examples as a datasets.Dataset with input_ids and labels."""
    import datasets

    return datasets.Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    )


class Recorder(TrainerCallback):
    """Shows a progress bar with loss and time left, and appends every measurement to metrics.jsonl."""

    def __init__(self, path: Path):
        self.path = path
        self.bar = console.progress()
        self.task = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        known = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in logs}
        if not known:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **known}) + "\n")
        if "loss" in known:
            detail = f"loss {known['loss']:.3f}"
            self.bar.update(self.task, description=f"training, {detail}")
            if not self.bar.console.is_terminal and state.global_step % math.ceil(state.max_steps / 10) == 0:
                left = self.bar.tasks[self.task].time_remaining or 0
                console.note(f"step {state.global_step} of {state.max_steps}, {detail}, {left:.0f} s left")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


def train(trainer: ResponseTrainer, metrics: Path) -> dict[str, float]:
    """Trains, and returns held-out loss before and after, training loss, speed.

    Seconds and tokens a second are those of training alone, without the evaluations in between.
    """
    recorder = Recorder(metrics)
    trainer.add_callback(recorder)
    before = trainer.evaluate()["eval_loss"]
    console.note(f"held-out loss before: {before:.3f}")
    started = time.perf_counter()
    try:
        result = trainer.train()
    finally:
        recorder.bar.stop()
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    seconds = time.perf_counter() - started - sum(line["eval_runtime"] for line in evaluated)
    is_last = evaluated and evaluated[-1]["step"] == trainer.state.global_step
    after = evaluated[-1]["eval_loss"] if is_last else trainer.evaluate()["eval_loss"]
    console.note(f"held-out loss after: {after:.3f}")
    return {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "train_loss": result.training_loss,
        "train_seconds": round(seconds, 1),
        "useful_tokens": trainer.useful_tokens,
        "useful_tokens_per_second": round(trainer.useful_tokens / seconds, 1),
        "steps": trainer.state.global_step,
    }


def peak_memory() -> dict[str, float]:
    """Peak memory in GB so far: of this process, and of the GPU when there is one."""
    import resource

    peaks = {"process_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}
    if torch.cuda.is_available():
        peaks["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return peaks
