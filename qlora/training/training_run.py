"""A run of a ResponseTrainer from start or checkpoint to the best weights: recorded, and stopped when it breaks."""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from qlora import console, machine, settings
from qlora.console import Problem, RunError
from qlora.training import checkpoints
from qlora.training.trainer import Progress, ResponseTrainer

ANSWERS = ("eval_em", "eval_f1", "eval_refusal_f1")
MEASURED = ("loss", "eval_loss", *ANSWERS, "eval_refusal_bias", "eval_ends", "learning_rate", "grad_norm")
NEVER_ENDS = 0.01  # probability of EOS after the response below which a model does not stop


def train(trainer: ResponseTrainer, checkpoint: Path | None) -> dict[str, object]:
    """Trains from `checkpoint` (or from the start), loads the best weights into the model, and returns the results.

    Raises RunError when the run breaks: loss or gradient not finite, a gradient of zero, an adapter that did
    not change, or a model that does not learn to stop.
    """
    metrics = trainer.folder / "metrics.jsonl"
    recorder = Recorder(metrics, trainer)
    trainer.add_callback(recorder)
    done = 0
    if checkpoint:
        done = checkpoints.step_of(checkpoint)
        if settings.process_rank() == 0:
            checkpoints.cut_metrics(metrics, done)
        trainer.restore(checkpoint)
        console.note(f"continuing from step {done} of {trainer.plan.steps}")
    else:
        trainer.evaluate()
    try:
        # A finished run does not go to Trainer, which would train one more step in the middle of an epoch.
        if done < trainer.plan.steps and not trainer.is_stale():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        recorder.bar.stop()
    if trainer.progress.evaluated_step < trainer.state.global_step:
        trainer.evaluate()
    check_adapter_changed(trainer)
    trainer.restore_best()
    if settings.process_rank() > 0:
        return {}  # the first process wrote the metrics
    return describe_result(metrics, trainer.progress, trainer.state.global_step)


class Recorder(TrainerCallback):
    """Shows a progress bar, appends every measurement to metrics.jsonl, and stops a broken run."""

    def __init__(self, path: Path, trainer: ResponseTrainer):
        self.path, self.trainer = path, trainer
        self.bar = console.progress()
        self.task = None
        self.started = time.perf_counter()
        self.threads = machine.Threads(checkpoints.threads(trainer.folder))

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.progress.threads = self.threads.adjust()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the step is only queued; its loss is read next anyway
        self.trainer.progress.seconds += time.perf_counter() - self.started
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        known = {key: logs[key] for key in MEASURED if key in logs}
        if not known or settings.process_rank() > 0:
            return
        if "loss" in known:
            check_step(known, state.global_step, args.fp16)
            known |= describe_speed(self.trainer.progress)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **known}) + "\n")
        if "loss" in known:
            self.show_step(state, known)
        else:
            console.note(f"held-out loss {when(state.global_step)}: {describe_evaluation(known)}")

    def show_step(self, state, known: dict[str, float]) -> None:
        rate, memory = known["useful_tokens_per_second"], known["memory_gb"]
        detail = f"loss {known['loss']:.3f}, {rate:.0f} tokens/s, {memory:.1f} GB"
        self.bar.update(self.task, description=f"training, {detail}")
        if not self.bar.console.is_terminal and state.global_step % math.ceil(state.max_steps / 10) == 0:
            left = (state.max_steps - state.global_step) * self.trainer.progress.seconds / state.global_step
            console.note(f"step {state.global_step} of {state.max_steps}, {detail}, {left:.0f} s left")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


def when(step: int) -> str:
    return f"after step {step}" if step else "before"


def describe_evaluation(known: dict[str, float]) -> str:
    """`0.319, answers: exact match 0.50, F1 0.61, refusals: F1 0.71`"""
    answers = f", answers: exact match {known['eval_em']:.2f}, F1 {known['eval_f1']:.2f}" if "eval_em" in known else ""
    refusals = f", refusals: F1 {known['eval_refusal_f1']:.2f}" if "eval_refusal_f1" in known else ""
    return f"{known['eval_loss']:.3f}{answers}{refusals}"


def describe_speed(progress: Progress) -> dict[str, float]:
    """Tokens per second of training alone (all, and trained ones), the share of shared tokens, memory in GB."""
    seconds = max(progress.seconds, 1e-9)
    return {
        "useful_tokens_per_second": round(progress.useful_tokens / seconds, 1),
        "labelled_tokens_per_second": round(progress.labelled_tokens / seconds, 1),
        "shared_share": round(1 - progress.computed_tokens / progress.useful_tokens, 4),
        "memory_gb": max(peak_memory().values()),
        "threads": progress.threads,
    }


def describe_result(metrics: Path, progress: Progress, steps: int) -> dict[str, object]:
    """Held-out loss and answers before and after (of the best weights), speed, steps; the refusal bias, if fitted."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    evaluated = {line["step"]: line for line in lines if "eval_loss" in line}
    before, after = evaluated[0], evaluated[progress.best_step]
    check_stops(before, after)
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "eval_loss_before": before["eval_loss"],
        "eval_loss_after": after["eval_loss"],
        **{f"{key}_after": after[key] for key in ANSWERS if key in after},
        **({"refusal_bias": after["eval_refusal_bias"]} if "eval_refusal_bias" in after else {}),
        "train_loss": sum(losses) / len(losses),
        "train_seconds": round(progress.seconds, 1),
        "useful_tokens": progress.useful_tokens,
        **describe_speed(progress),
        "steps": steps,
        "best_step": progress.best_step,
    }


def peak_memory() -> dict[str, float]:
    """Peak memory in GB so far: of this process, and of the GPU when there is one."""
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB on Linux
    peaks = {"process_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peaks["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return peaks


# ------------------------------------------------------------------------------- guards


def check_step(known: dict[str, float], step: int, scaled: bool) -> None:
    """Raises RunError for a loss or gradient from which training cannot recover.

    `scaled`: with fp16, gradients overflow at times until the scale of the loss is found.
    """
    gradient = known.get("grad_norm", 1.0)
    if not math.isfinite(known["loss"]):
        raise broken(f"the loss is {known['loss']} at step {step}", "lower --learning-rate, or look at the rows")
    if not math.isfinite(gradient) and not scaled:
        raise broken(f"the gradient is {gradient} at step {step}", "lower --learning-rate")
    if gradient == 0:
        raise broken(f"the gradient is zero at step {step}", "nothing is trained: look at the rows with --dry-run")


def check_adapter_changed(trainer: ResponseTrainer) -> None:
    """Raises RunError when every B matrix is still zero: the adapter does nothing."""
    if not any(weight.abs().sum() > 0 for name, weight in trainer.best.items() if "lora_B" in name):
        raise broken("the adapter did not change", "raise --learning-rate or --max-steps")


def check_stops(before: dict[str, float], after: dict[str, float]) -> None:
    """Raises RunError when EOS does not follow the response, and training did not improve that."""
    if after["eval_ends"] < NEVER_ENDS and after["eval_ends"] <= before["eval_ends"]:
        message = f"the model does not stop after a response (EOS has probability {after['eval_ends']:.4f})"
        raise broken(message, "look at one row with --dry-run: EOS must be trained")


def broken(what: str, fix: str) -> RunError:
    return RunError(Problem(f"{what}; no adapter was saved", "training", fix))
