"""The trainer: an SFTTrainer that computes only what the loss needs.

Four things make it fast and leave the loss as it is: logits for the labelled positions only, packed batches
with prefix sharing (packing), layers with fewer passes over memory (lean_layers), and bf16 autocast.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from qlora import console, machine, settings
from qlora.model.lean_layers import make_lean
from qlora.prompt import IGNORED, Prompt
from qlora.refusal import fit_refusal_bias
from qlora.training import checkpoints
from qlora.training.examples import Epochs, Example, collate, count_tokens, make_batches, split_rows, unbatch

AT_ONCE = 1024  # tokens that the CPU computes at once; a batch with more is split


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run; `steps` are optimizer steps of `accumulation` batches of up to `micro_batch` rows each."""

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
    refusal: str = Prompt.refusal

    @property
    def effective_batch(self) -> int:
        """Rows per optimizer step, at most, over all processes."""
        return self.micro_batch * self.accumulation * settings.process_count()


def label_logits(model, inputs: dict) -> torch.Tensor:
    """Logits for every label, row by row: (labels, vocabulary).

    The head, a third of the work of a small Llama, runs over the labelled positions only.
    """
    batch = inputs["packed"]
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=torch.empty(1, 1, 1, 1),  # any of four dimensions: no mask is made
        packed=batch,
        logits_to_keep=inputs["places"],
        use_cache=False,
    ).logits[0]


def response_loss(model, inputs: dict, items: int | None = None) -> torch.Tensor:
    """Summed cross-entropy of the labelled tokens over `items` (default: their number).

    On a GPU the CPU does not wait for it: shapes depend on nothing that only the GPU knows.
    """
    targets = inputs["targets"]
    loss = torch.nn.functional.cross_entropy(label_logits(model, inputs).float(), targets, reduction="sum")
    return loss / (items if items is not None else len(targets))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every label by its logits: (rows, longest), 0 where there is none."""
    labelled = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[labelled], reduction="none")
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(labelled, losses)


def score_rows(logits: torch.Tensor, labels: torch.Tensor, refusal: list[int]) -> torch.Tensor:
    """(rows, 6): summed loss, labels, probability of EOS at the end, log-odds of refusing, whether that is right, and
    the share of labels that are the likeliest token when the model may not refuse.

    The log-odds compare the refusal's first token with the likeliest other token at the start of the response.
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
    """The state that checkpoints keep beside weights, optimizer and random state."""

    useful_tokens: int = 0
    labelled_tokens: int = 0
    computed_tokens: int = 0  # a common beginning counts once per batch
    seconds: float = 0.0  # of training alone, without evaluations
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    evaluated_step: int = 0
    threads: int = 0  # of the last step


class ResponseTrainer(SFTTrainer):
    """SFTTrainer over batches of our own token ids and labels; see the module's docstring.

    Batches differ in size, since rows that share passages stay together. So TRL's dataset holds only their numbers.
    """

    def __init__(self, model, tokenizer, training: Epochs, held_out: Sequence[Example], plan: Schedule, folder: Path):
        # Longest first: the peak of memory comes first.
        asked = sorted(make_batches(held_out, plan.micro_batch, plan.seed), key=count_tokens, reverse=True)
        sources = {"training": training, "held out": asked}

        def fetch(items: list[dict[str, int]]) -> dict:
            return collate(unbatch(sources[name][number] for item in items for name, number in item.items()))

        batches = plan.steps * plan.accumulation * settings.process_count()
        super().__init__(
            model=model,
            args=trainer_config(plan, folder),
            processing_class=tokenizer,
            data_collator=fetch,
            train_dataset=datasets.Dataset.from_dict({"training": range(batches)}),
            eval_dataset=datasets.Dataset.from_dict({"held out": range(len(asked))}),
        )
        self.remove_callback(PrinterCallback)
        self.plan, self.folder = plan, folder
        self.sample = held_out[:: math.ceil(len(held_out) / plan.eval_answers)] if plan.eval_answers else []
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        self.parts = 1  # of a micro batch; more than one after memory ran out
        # TRL casts the adapter to bf16, in which small steps of AdamW round to 0.
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
        progress.useful_tokens += inputs["packed"].useful * count
        progress.labelled_tokens += len(inputs["targets"]) * count
        progress.computed_tokens += inputs["packed"].input_ids.numel() * count
        return (loss, None) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """SFTTrainer's step, a few rows at a time where the batch is large, to the same gradient.

        When memory runs out, it takes fewer rows from then on.
        """
        weights = self.trained().values()
        gradients = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        progress = replace(self.progress)
        while True:
            loss, parts = 0.0, self.split(self._prepare_inputs(inputs))
            try:
                for part in parts:
                    loss = loss + super().training_step(model, part, num_items_in_batch)
                return loss
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                self.halve(parts, error)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient if gradient is None else gradient.clone()
            self.progress = replace(progress)

    def halve(self, parts: list[dict], error: Exception) -> None:
        """Doubles the number of parts. Raises other errors than a lack of memory, and UserError for a single row."""
        if not console.ran_out_of_memory(error):
            raise error
        rows = len(parts[0]["labels"])
        if rows == 1 or settings.process_count() > 1:
            fix = "add --resume --gradient-checkpointing on, or begin anew with a lower --batch-size or --max-length"
            raise console.fail(f"out of memory with {say_rows(rows)} at a time", "training", fix) from error
        self.parts = 2 * len(parts)
        fewer = say_rows(math.ceil(rows / 2))
        console.note(f"Out of memory: {fewer} at a time from here on, same effective batch")

    def split(self, inputs: dict) -> list[dict]:
        """The batch in parts: on the CPU of AT_ONCE tokens at most, or of one row.

        Of several processes each takes it whole. They wait for each other in every pass, so all must make as many.
        """
        count, in_step = self.parts, settings.process_count() > 1
        while True:
            parts = [inputs] if count == 1 else split_rows(inputs, count)
            short = all(part["packed"].input_ids.numel() <= AT_ONCE for part in parts)
            fits = short or in_step or torch.cuda.is_available()
            if fits or len(parts) == len(inputs["labels"]):
                return parts
            count *= 2

    # ----------------------------------------------------------------------- evaluate

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Held-out loss, the probability of EOS after the response, the refusal bias, and scores of sample answers.

        The loss is a mean over tokens: Trainer's mean of means depends on the batch size.
        """
        started = time.perf_counter()
        self.model.eval()
        refusal = [*self.processing_class(self.plan.refusal, add_special_tokens=False).input_ids]
        refusal += [self.processing_class.eos_token_id]
        batches = []
        with torch.no_grad(), self.accelerator.autocast():
            for inputs in self.get_eval_dataloader():
                inputs = self._prepare_inputs(inputs)
                rows = self.score(inputs, refusal)
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
            console.note(f"no lower loss in {self.progress.stale} evaluations: stopping early")
            self.control.should_training_stop = True
        return metrics

    def score(self, inputs: dict, refusal: list[int]) -> list[list[float]]:
        """`score_rows` of every row, fewer rows at a time when memory runs out."""
        while True:
            parts = [inputs] if self.parts == 1 else split_rows(inputs, self.parts)
            try:
                scored = [score_rows(label_logits(self.model, part), part["labels"], refusal) for part in parts]
                return torch.cat(scored).tolist()
            except (RuntimeError, MemoryError) as error:
                self.halve(parts, error)

    def answer_sample(self) -> dict[str, float]:
        """Exact match and F1 of greedy answers to the sample, without their citations."""
        if not self.sample:
            return {}
        from qlora.answering.generator import Generator
        from qlora.metrics import exact_match, token_f1
        from qlora.words import MARK

        prompts, wanted = [e.prompt_ids for e in self.sample], [e.response_ids for e in self.sample]
        longest = max(map(len, wanted)) + 8  # a longer answer is wrong anyway
        generator = Generator(model=self.model, tokenizer=self.processing_class, max_new_tokens=longest)
        # Layers that are divided come from all processes for each token, so the last one to finish decides.
        together = {"synced_gpus": settings.process_count() > 1}
        batches = chunk(prompts, self.plan.micro_batch)
        made = [ids for prompt in batches for ids in generator.generate_ids(prompt, **together)]
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
        """Keeps the weights with the lowest held-out loss; untrained ones do not count."""
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
        """Loads the files that `_save_checkpoint` added to Trainer's own, and the adapter's weights."""
        self.progress = Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
        self.best = load_file(checkpoint / "best.safetensors")
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        torch.set_num_threads(self.progress.threads)

    def restore_best(self) -> None:
        """Loads the weights with the lowest held-out loss into the model."""
        for name, weight in self.trained().items():
            weight.data.copy_(self.best[name])


def trainer_config(plan: Schedule, folder: Path) -> SFTConfig:
    """The schedule as TRL's configuration."""
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
        # transformers divides by the root of the sequence's tokens, which here are those of all packed rows.
        neftune_noise_alpha=plan.neftune * math.sqrt(plan.micro_batch) or None,
        eval_strategy="steps",
        eval_steps=plan.eval_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what the checks look for
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
    """The name in TrainingArguments: transformers 5.17, which GPU machines may have, still has the older one."""
    name = "activation_checkpointing"
    return name if name in SFTConfig.__dataclass_fields__ else "gradient_checkpointing"


def chunk(values: Sequence, size: int) -> list[Sequence]:
    return [values[at : at + size] for at in range(0, len(values), size)]


def say_rows(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"
