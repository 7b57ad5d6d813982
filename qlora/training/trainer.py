"""Training: LoRA on the 4-bit base, and an SFTTrainer that computes only what the loss needs.

Four things make it fast and leave the loss as it is: logits for the labelled positions only, batches without
padding whose common beginnings are computed once (packing), layers with fewer passes over memory (lean_layers),
and bf16 autocast.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, TrainerState, set_seed
from trl import SFTConfig, SFTTrainer

from qlora import console, machine, settings
from qlora.evaluation.comparison import fit_refusal_bias
from qlora.model import packing
from qlora.model.lean_layers import make_lean
from qlora.prompt import IGNORED, Prompt
from qlora.training import checkpoints
from qlora.training.data_report import count_tokens
from qlora.training.dataset import Example, batch_groups

AT_ONCE = 1024  # tokens of a batch that the CPU computes at once; of those with more, some rows after the others


def add_lora(model, rank: int, alpha: int, dropout: float, seed: int, targets="all-linear", rslora=False, dora=False):
    """The model with trainable low-rank adapters, the rest frozen.

    `targets` names the linear layers (all but the head by default). `rslora` scales by alpha / sqrt(rank)
    (arXiv 2312.03732), `dora` trains the magnitudes, too (arXiv 2402.09353). Raises UserError for unknown layers.
    """
    from peft import LoraConfig, get_peft_model

    set_seed(seed)  # the A matrices start random
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if "Linear" in type(layer).__name__}
        fix = f"name some of {', '.join(sorted(linear))}"
        raise console.fail(f"no layer is called that ({targets})", "--target-modules", fix) from error


def count_parameters(model) -> tuple[int, int, int]:
    """(trainable, in 4-bit, all) weights; a 4-bit weight counts as one although two share a byte."""
    weights = list(model.parameters())
    packed = sum(weight.quant_state.shape.numel() for weight in weights if hasattr(weight, "quant_state"))
    return sum(weight.numel() for weight in weights if weight.requires_grad), packed, model.num_parameters()


@dataclass(frozen=True)
class Schedule:
    """How a run trains; `steps` are optimizer steps of `accumulation` batches of up to `micro_batch` rows each."""

    learning_rate: float
    micro_batch: int
    accumulation: int
    steps: int
    eval_steps: int
    save_steps: int
    warmup_steps: int
    scheduler: str
    checkpointing: bool
    patience: int
    keep_checkpoints: int
    eval_answers: int
    neftune: float
    report_to: str
    seed: int

    @property
    def effective_batch(self) -> int:
        """Rows an optimizer step at most, of all processes."""
        return self.micro_batch * self.accumulation * settings.process_count()


def plan_schedule(args, training: Sequence[Example]) -> Schedule:
    """The schedule of a run whose first epoch takes these rows; --max-steps goes before --epochs.

    With --gradient-checkpointing auto it recomputes nothing: `data_report.fits` says whether it must.
    """
    batches = len(make_batches(training, args.batch_size, args.seed))
    batches_a_step = args.accumulation * settings.process_count()
    steps = args.max_steps or max(1, math.ceil(args.epochs * batches / batches_a_step))
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
    )


def make_batches(examples: Sequence[Example], size: int, seed: int) -> list[list[Example]]:
    """The rows in random order, up to `size` together, where those with the same passages stay together."""
    numbers = batch_groups([example.group for example in examples], size, seed)
    return [[examples[n] for n in batch] for batch in numbers]


def collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    """A batch padded on the left: (rows, longest) input_ids, attention_mask and labels."""

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
        "labels": pad("labels", IGNORED),
    }


def label_logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits for every label, row by row: (labels, vocabulary).

    The head, a third of the work of a small Llama, runs over the labelled positions only.
    """
    batch = packing.pack(inputs["input_ids"], inputs["attention_mask"])
    labelled = inputs["labels"] != IGNORED
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=torch.empty(1, 1, 1, 1),  # any of four dimensions: no mask is made
        pieces=batch.pieces,
        logits_to_keep=batch.index[:, :-1][labelled[:, 1:]],  # a token is predicted one position earlier
        use_cache=False,
    ).logits[0]


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every label by its logits: (rows, longest), 0 where there is none."""
    labelled = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[labelled], reduction="none")
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(labelled, losses)


def response_loss(model, inputs: dict[str, torch.Tensor], items: int | None = None) -> torch.Tensor:
    """Summed cross-entropy of the labelled tokens over `items` (default: their number)."""
    losses = token_losses(label_logits(model, inputs), inputs["labels"])
    return losses.sum() / (items if items is not None else (inputs["labels"] != IGNORED).sum())


def score_rows(logits: torch.Tensor, labels: torch.Tensor, refusal: list[int]) -> torch.Tensor:
    """(rows, 6): summed loss, labels, probability of EOS at the end, log-odds of refusing, whether that is right, and
    the share of labels that are the likeliest token when refusing is out of the question.

    The log-odds are those of the refusal's first token against the likeliest other where the response begins.
    """
    labelled, ids = labels != IGNORED, labels.new_tensor(refusal)
    losses, counts = token_losses(logits, labels), labelled.sum(dim=1)
    begins = (labelled & (labelled.cumsum(dim=1) == 1))[labelled]
    others, chosen = logits[begins].index_fill(1, ids[:1], float("-inf")).max(dim=1)
    odds = logits[begins, ids[0]].float() - others.float()
    refused = (labels[:, -len(ids) :] == ids).all(dim=1) & (counts == len(ids))
    greedy = logits.argmax(dim=1).index_put((begins,), chosen)
    wrong = torch.zeros_like(losses).masked_scatter(labelled, (greedy != labels[labelled]).float()).sum(dim=1)
    return torch.stack([losses.sum(dim=1), counts, (-losses[:, -1]).exp(), odds, refused, 1 - wrong / counts], dim=1)


@dataclass
class Progress:
    """What goes from checkpoint to checkpoint beside weights, optimizer and random state."""

    useful_tokens: int = 0
    labelled_tokens: int = 0
    computed_tokens: int = 0  # with a common beginning counted once a batch
    seconds: float = 0.0  # of training alone, without evaluations
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    evaluated_step: int = 0
    threads: int = 0  # that the last step was computed with


class ResponseTrainer(SFTTrainer):
    """SFTTrainer over batches of our own token ids and labels; see the module's docstring.

    `training` holds the rows of every epoch. Batches are made here, in the order in which they are trained, since
    a batch has as many rows as share their passages.
    """

    def __init__(
        self,
        model,
        tokenizer,
        training: Sequence[Sequence[Example]],
        held_out: Sequence[Example],
        plan: Schedule,
        folder: Path,
    ):
        epochs = [make_batches(rows, plan.micro_batch, plan.seed + n) for n, rows in enumerate(training)]
        batches = [batch for epoch in epochs for batch in epoch]
        held_out_batches = make_batches(held_out, plan.micro_batch, plan.seed)
        super().__init__(
            model=model,
            args=trainer_config(plan, folder),
            processing_class=tokenizer,
            data_collator=lambda batches: collate([row for batch in batches for row in batch["rows"]]),
            train_dataset=as_dataset(batches),
            # Longest first: the peak of memory comes at once.
            eval_dataset=as_dataset(sorted(held_out_batches, key=count_tokens, reverse=True)),
        )
        self.remove_callback(PrinterCallback)
        self.plan, self.folder = plan, folder
        self.sample = held_out[:: math.ceil(len(held_out) / plan.eval_answers)] if plan.eval_answers else []
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        self.parts = 1  # a micro batch is run in so many, after memory ran out
        # TRL casts the adapter to bf16, where small steps of AdamW round to nothing.
        for weight in self.trained().values():
            weight.data = weight.data.float()
        make_lean(self.model)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return SequentialSampler(self.train_dataset)

    # ----------------------------------------------------------------------- train

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = response_loss(model, inputs, num_items_in_batch) * settings.process_count()  # DDP takes the mean
        progress, count = self.progress, settings.process_count()
        progress.useful_tokens += int(inputs["attention_mask"].sum()) * count
        progress.labelled_tokens += int((inputs["labels"] != IGNORED).sum()) * count
        progress.computed_tokens += packing.count_tokens(inputs) * count
        return (loss, None) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As SFTTrainer's, a few rows at a time where the batch is large, to the same gradient.

        When memory runs out, fewer rows from then on.
        """
        weights = self.trained().values()
        gradients = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        progress = replace(self.progress)
        while True:
            loss, parts = 0.0, self.count_parts(inputs)
            try:
                for part in split_rows(inputs, parts):
                    loss = loss + super().training_step(model, part, num_items_in_batch)
                return loss
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not ran_out_of_memory(error):
                    raise
                rows = math.ceil(len(inputs["labels"]) / parts)
                if rows == 1 or settings.process_count() > 1:
                    fix = "lower --batch-size or --max-length, or give --gradient-checkpointing on"
                    raise console.RunError(
                        console.Problem(f"out of memory with {rows} rows at a time", "training", fix)
                    ) from error
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient if gradient is None else gradient.clone()
            self.progress = replace(progress)
            self.parts = 2 * parts
            console.note(f"Out of memory: {math.ceil(rows / 2)} rows at a time from here on, same effective batch")

    def count_parts(self, inputs: dict[str, torch.Tensor]) -> int:
        """In how many parts a batch is computed: on the CPU in parts of AT_ONCE tokens at most, or of one row."""
        parts = self.parts
        while parts < len(inputs["labels"]) and not torch.cuda.is_available():
            if all(packing.count_tokens(part) <= AT_ONCE for part in split_rows(inputs, parts)):
                break
            parts *= 2
        return parts

    # ----------------------------------------------------------------------- evaluate

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Held-out loss, the probability of EOS after the response, when to refuse, and how good sample answers are.

        The loss is a mean over tokens: Trainer's mean of means depends on the batch size.
        """
        started = time.perf_counter()
        self.model.eval()
        refusal = [*self.processing_class(Prompt.refusal, add_special_tokens=False).input_ids]
        refusal += [self.processing_class.eos_token_id]
        batches = []
        with torch.no_grad(), self.accelerator.autocast():
            for inputs in self.get_eval_dataloader():
                inputs = self._prepare_inputs(inputs)
                rows = score_rows(label_logits(self.model, inputs), inputs["labels"], refusal).tolist()
                batches += self.accelerator.gather_for_metrics([rows], use_gather_object=True)
            losses, labels, ends, *refusing = zip(*(row for batch in batches for row in batch), strict=True)
            metrics = {"eval_loss": sum(losses) / sum(labels), "eval_ends": sum(ends) / len(ends)}
            bias, f1 = fit_refusal_bias(*refusing)
            metrics |= {} if f1 is None else {"eval_refusal_bias": bias, "eval_refusal_f1": f1}
            metrics |= self.answer_sample()
        metrics["eval_runtime"] = time.perf_counter() - started
        self.progress.evaluated_step = self.state.global_step
        self.keep_best(metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_stale():
            console.note(f"no better for {self.progress.stale} evaluations: stopping early")
            self.control.should_training_stop = True
        return metrics

    def answer_sample(self) -> dict[str, float]:
        """Exact match and F1 of greedy answers to the sample, without their citations."""
        if not self.sample:
            return {}
        from qlora.answering.citations import MARK
        from qlora.answering.generator import Generator
        from qlora.evaluation.evaluation import exact_match, token_f1

        prompts = [[i for i, label in zip(e.input_ids, e.labels, strict=True) if label == IGNORED] for e in self.sample]
        wanted = [[label for label in example.labels if label != IGNORED] for example in self.sample]
        longest = max(map(len, wanted)) + 8  # a longer answer is wrong in any case
        generator = Generator(model=self.model, tokenizer=self.processing_class, max_new_tokens=longest)
        made = [ids for prompt in chunk(prompts, self.plan.micro_batch) for ids in generator.generate_ids(prompt)]
        texts = [
            [MARK.sub("", text).strip() for text in self.processing_class.batch_decode(ids, skip_special_tokens=True)]
            for ids in (made, wanted)
        ]
        pairs = list(zip(*texts, strict=True))
        return {
            "eval_em": sum(exact_match(answer, [right]) for answer, right in pairs) / len(pairs),
            "eval_f1": sum(token_f1(answer, [right]) for answer, right in pairs) / len(pairs),
        }

    def keep_best(self, loss: float) -> None:
        """Remembers the weights of the lowest held-out loss; the untrained ones don't count."""
        if self.state.global_step == 0:
            return
        if self.progress.best_loss is None or loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step, self.progress.stale = loss, self.state.global_step, 0
            self.best = {name: weight.detach().cpu().clone() for name, weight in self.trained().items()}
        else:
            self.progress.stale += 1

    def is_stale(self) -> bool:
        return 0 < self.plan.patience <= self.progress.stale

    # ----------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial) -> str:
        return str(self.folder / checkpoints.STAGING)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            staged = self.folder / checkpoints.STAGING / f"checkpoint-{step}"
            save_file(self.best, staged / "best.safetensors")
            (staged / "progress.json").write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            checkpoints.put_in_place(self.folder, step, self.plan.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> None:
        """Takes up what `_save_checkpoint` wrote besides Trainer's own files, and the adapter's weights."""
        self.progress = Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
        self.best = load_file(checkpoint / "best.safetensors")
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        torch.set_num_threads(self.progress.threads)

    def restore_best(self) -> None:
        """Puts the weights of the lowest held-out loss back into the model."""
        for name, weight in self.trained().items():
            weight.data.copy_(self.best[name])


def trainer_config(plan: Schedule, folder: Path) -> SFTConfig:
    """The schedule in TRL's own words."""
    on_gpu, dtype, checkpointing = torch.cuda.is_available(), machine.compute_dtype(), checkpointing_field()
    config = SFTConfig(
        output_dir=str(folder),
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=1,  # a batch is one item of the dataset
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        lr_scheduler_type=plan.scheduler,
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        # transformers divides by the root of the tokens in the sequence, which are those of all packed rows.
        neftune_noise_alpha=plan.neftune * math.sqrt(plan.micro_batch) or None,
        eval_strategy="steps",
        eval_steps=plan.eval_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what the guards look for
        save_strategy="steps",
        save_steps=plan.save_steps,
        report_to=plan.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        ddp_find_unused_parameters=False,
        seed=plan.seed,
        **{checkpointing: plan.checkpointing},
        **{f"{checkpointing}_kwargs": {"use_reentrant": False} if plan.checkpointing else None},
    )
    # TRL refuses the DataParallel that Trainer would choose with several GPUs and one process.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def checkpointing_field() -> str:
    """What TrainingArguments call it: transformers 5.17, which GPU machines may have, still by the older name."""
    name = "activation_checkpointing"
    return name if name in SFTConfig.__dataclass_fields__ else "gradient_checkpointing"


def split_rows(inputs: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """The batch in `parts` of about as many rows each."""
    size = math.ceil(len(inputs["labels"]) / parts)
    starts = range(0, len(inputs["labels"]), size)
    return [{key: value[at : at + size] for key, value in inputs.items()} for at in starts]


def chunk(values: Sequence, size: int) -> list[Sequence]:
    return [values[at : at + size] for at in range(0, len(values), size)]


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA's own exception, or what torch's CPU allocator raises."""
    words = ("can't allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def as_dataset(batches: Sequence[Sequence[Example]]):
    """A datasets.Dataset of the batches, each a list of rows with input_ids and labels."""
    import datasets

    rows = [[{"input_ids": row.input_ids, "labels": row.labels} for row in batch] for batch in batches]
    return datasets.Dataset.from_dict({"rows": rows})
