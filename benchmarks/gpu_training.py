"""The parts of gpu_check.py about training: is it right, how fast is it, and what when memory or time run out."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

from benchmarks import plain_recipe, train_speed
from benchmarks.gpu_bench import (
    Bench,
    Measure,
    Trained,
    quick_flags,
    ready_to_answer,
    reset_memory,
    sample_rows,
    set_up,
    train,
    tuned_model,
)
from benchmarks.plain_recipe import Setup
from qlora import machine, presets
from qlora.model import adapter, base_model
from qlora.prompt import choose_prompt
from qlora.training.examples import tokenize_rows

PROJECT = Path(__file__).resolve().parent.parent

PADDED = ("input_ids", "attention_mask", "labels")
SCALE = 1024  # of an fp16 loss, whose gradients would be too small for the type


# ------------------------------------------------------------------------------- part 1


def check_small(bench: Bench) -> list[Measure]:
    """The small model: its gradients, ten steps, and its answers beside the CPU's."""
    import torch

    found = [Measure("model", "random weights" if bench.small != presets.EMBEDDED else bench.small)]
    for dtype in (torch.bfloat16, torch.float16)[: 2 if bench.device == "cuda" else 1]:  # a CPU has no fp16 autocast
        found += compare_gradients(bench, dtype)
    trained = train(bench.work / "small", "--overwrite", **quick_flags(bench, 10))
    before, after = (trained.result[f"eval_loss_{when}"] for when in ("before", "after"))
    found.append(Measure("held-out loss, ten steps", after, "nats", after < before, f"below {before:.3f}"))
    found.append(Measure("useful tokens/s, ten steps", trained.result["useful_tokens_per_second"]))
    return found + compare_answers(bench, trained.folder)


def compare_gradients(bench: Bench, dtype) -> list[Measure]:
    """Loss and gradients of one step in 16 bit, ours and plain PEFT's, against plain PEFT's in fp32."""
    import torch

    tokenizer = base_model.load_tokenizer(base_model.resolve_base_model(bench.small))
    rows = sorted(sample_rows(), key=lambda row: row.context)
    examples, _ = tokenize_rows(tokenizer, choose_prompt(tokenizer), [*rows[:4], *rows[-4:]], 512)
    step = Namespace(source=bench.small, examples=examples, device=bench.device)
    exact_loss, exact = take_step(step, torch.float32, ours=False, packed=False)
    name, found, errors = str(dtype).removeprefix("torch."), [], {}
    for way, ours, packed in (
        ("plain, padded", False, False),
        ("ours, padded", True, False),
        ("ours, packed", True, True),
    ):
        loss, gradients = take_step(step, dtype, ours, packed)
        errors[way] = float((gradients - exact).norm() / exact.norm()), abs(loss - exact_loss)
        limits = [1.5 * plain + slack for plain, slack in zip(errors["plain, padded"], (0.01, 0.005), strict=True)]
        for what, error, limit in zip(("gradient off", "loss off"), errors[way], limits, strict=True):
            ok = error <= limit if ours else None
            found.append(
                Measure(f"{name}, {way}: {what}", error, "" if "loss" in what else "of its norm", ok, f"{limit:.4f}")
            )
    return found


def take_step(step: Namespace, dtype, ours: bool, packed: bool):
    """The loss of a batch, and the gradients of all LoRA weights in one vector."""
    import torch

    from qlora.model.lean_layers import make_lean
    from qlora.training import trainer
    from qlora.training.examples import collate

    with patch.object(machine, "compute_dtype", lambda: dtype):
        model = tuned_model(step.source)
    if ours:
        make_lean(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    inputs = {name: tensor.to(step.device) for name, tensor in collate(step.examples).items()}
    with torch.autocast(step.device, dtype=dtype, enabled=dtype != torch.float32):
        loss = trainer.response_loss(model, inputs) if packed else model(**{name: inputs[name] for name in PADDED}).loss
    scale = SCALE if dtype == torch.float16 else 1
    (loss * scale).backward()
    return loss.item(), torch.cat([weight.grad.float().flatten().cpu() / scale for weight in weights])


def compare_answers(bench: Bench, folder: Path) -> list[Measure]:
    """Greedy answers of the adapter here, and those of the CPU in a process without a card."""
    from qlora.training.export import keeps_answer

    path = bench.work / "answers.json"
    command = [sys.executable, __file__, str(folder), str(path), str(bench.sizes.tokens)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    elsewhere = subprocess.Popen(command, env=hidden, stdin=subprocess.DEVNULL)
    try:
        generator, prompts = ready_to_answer(folder, bench.sizes.tokens)
        answers = [generator.generate_ids([prompt])[0] for prompt in prompts]
        if elsewhere.wait():
            raise RuntimeError("the CPU's answers failed: see the log")
    finally:
        elsewhere.kill()
    wanted = json.loads(path.read_text(encoding="utf-8"))
    equal = sum(ours == theirs for ours, theirs in zip(answers, wanted, strict=True))
    kept = sum(keeps_answer(generator.model, *pair) for pair in zip(prompts, wanted, strict=True))
    return [
        Measure("answers equal to the CPU's", f"{equal} of {len(prompts)}"),
        Measure("equal but for ties", f"{kept} of {len(prompts)}", ok=kept == len(prompts), limit="all"),
    ]


# ------------------------------------------------------------------------------- parts 2 to 4


def prepare(bench: Bench) -> list[Measure]:
    """The large model's folder."""
    started = time.perf_counter()
    files = Path(bench.large).iterdir()
    size = sum(file.stat().st_size for file in files) / 1e9
    return [Measure(bench.sizes.large, size, "GB on disk"), Measure("made in", time.perf_counter() - started, "s")]


def train_ours(bench: Bench) -> list[Measure]:
    """The large model by instruct_train_qlora.py, on rows that share passages."""
    return measure_ours(bench, set_up(bench, "shared", sample_rows()))


def train_plain(bench: Bench) -> list[Measure]:
    """The same rows by TRL's SFTTrainer."""
    return measure_plain(set_up(bench, "shared", sample_rows()))


def train_unshared(bench: Bench) -> list[Measure]:
    """Rows that have a passage each, ours and TRL's."""
    rows = list({row.context: row for row in sample_rows()}.values())
    setup = set_up(bench, "unshared", rows)
    return [*measure_ours(bench, setup), *measure_plain(setup)]


def measure_ours(bench: Bench, setup: Setup) -> list[Measure]:
    words = train_speed.our_words(setup, "ours")
    trained = train(setup.path("ours"), *words, "--overwrite")
    estimate = trained.report["estimate"]["memory_gb"]["all"]
    share = trained.peak_gb / estimate
    return [
        Measure("ours: useful tokens/s", trained.result["useful_tokens_per_second"]),
        Measure("ours: of the tokens shared", trained.result["shared_share"]),
        Measure("ours: peak memory", trained.peak_gb, "GB"),
        Measure("ours: peak / estimate", share, ok=None if bench.is_tiny else 0.6 <= share <= 1.1, limit="0.6 to 1.1"),
        Measure("ours: mean training loss", trained.result["train_loss"], "nats"),
        Measure("ours: seconds of all steps", trained.result["train_seconds"], "s"),
    ]


def measure_plain(setup: Setup) -> list[Measure]:
    reset_memory()
    plain_recipe.train_plain(setup, setup.base_model)
    run = json.loads(setup.path("plain", "run.json").read_text(encoding="utf-8"))
    peaks = run["peak_memory"]
    return [
        Measure("TRL: attention, kernels", f"{run['attention']}, {'Liger' if run['liger'] else 'no Liger'}"),
        Measure("TRL: useful tokens/s", run["useful_tokens_per_second"]),
        Measure("TRL: peak memory", peaks.get("gpu_gb", peaks["process_gb"]), "GB"),
        Measure("TRL: mean training loss", run["train_loss"], "nats"),
        Measure("rows with equal tokens", f"{run['rows_with_equal_tokens']} of {run['rows']}"),
    ]


# ------------------------------------------------------------------------------- part 6


def check_memory(bench: Bench) -> list[Measure]:
    """Checkpointing, the paged optimizer, a batch that is too large, and a run that is stopped and resumed."""
    return [*run_out_of_memory(bench), *stop_and_resume(bench), *compare_checkpointing(bench)]


def compare_checkpointing(bench: Bench) -> list[Measure]:
    """The large model with activations recomputed and kept, four steps each."""
    setup = set_up(bench, "shared", sample_rows())
    found, peaks = [], {}
    for choice, variant in (("on", "checkpointed"), ("off", "ours")):
        words = train_speed.our_words(setup, variant)
        trained = train(bench.work / f"checkpointing-{choice}", *words, "--overwrite", max_steps=4)
        peaks[choice] = trained.peak_gb
        rate = trained.result["useful_tokens_per_second"]
        found += [
            Measure(f"checkpointing {choice}: useful tokens/s", rate),
            Measure(f"checkpointing {choice}: peak memory", peaks[choice], "GB"),
        ]
    optimizer = trained.trainer.optimizer.optimizer
    paged = bool(getattr(optimizer, "is_paged", False))
    found.append(Measure("optimizer", type(optimizer).__name__ + (", paged" if paged else "")))
    if bench.device == "cpu":  # a process's peak never falls
        return found
    saves = peaks["on"] < peaks["off"]
    return [
        *found,
        Measure("checkpointing saves", peaks["off"] - peaks["on"], "GB", saves, "above 0"),
        Measure("optimizer is paged", str(paged), ok=paged),
    ]


def run_out_of_memory(bench: Bench) -> list[Measure]:
    """The same two steps with memory for the whole batch, and without."""
    flags = quick_flags(bench, 2) | {"batch_size": 16}
    whole = train(bench.work / "whole", "--overwrite", **flags)
    with short_of_memory(bench, whole):
        halved = train(bench.work / "halved", "--overwrite", **flags)
    gap = max(abs(a - b) / a for a, b in zip(whole.losses, halved.losses, strict=True))
    parts = halved.trainer.parts
    return [
        Measure("out of memory: parts of a batch", parts, ok=parts > 1, limit="above 1"),
        Measure("out of memory: losses differ by", gap, ok=gap < 0.02, limit="0.02"),
    ]


@contextmanager
def short_of_memory(bench: Bench, whole: Trained):
    """A context in which the batches of `whole` don't fit; on the CPU that is made believe."""
    import torch

    from qlora.training import trainer

    if bench.device == "cpu":
        ordinary = trainer.label_logits

        def refuse(model, inputs):
            if len(inputs["labels"]) > 2 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. (made believe)")
            return ordinary(model, inputs)

        with patch.object(trainer, "label_logits", refuse):
            yield
        return
    reset_memory()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.7 * whole.peak_gb * 1e9 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def stop_and_resume(bench: Bench) -> list[Measure]:
    """Six steps twice in one go, and once stopped after the third."""
    from qlora.training import checkpoints

    flags = quick_flags(bench, 6) | {"save_steps": 3}
    runs = [train(bench.work / name, "--overwrite", **flags) for name in ("straight", "again")]
    ordinary = checkpoints.put_in_place

    def stop(*given):
        ordinary(*given)
        raise KeyboardInterrupt

    folder = bench.work / "resumed"
    with patch.object(checkpoints, "put_in_place", stop), suppress(RuntimeError):  # exit code 130
        train(folder, "--overwrite", **flags)
    if not checkpoints.last_checkpoint(adapter.partial_folder(folder)):
        raise RuntimeError("no checkpoint was left: see the log")
    runs.append(train(folder, "--resume", **flags))
    straight, again, resumed = ((run.folder / "adapter_model.safetensors").read_bytes() for run in runs)
    gap = max(abs(a - b) / a for a, b in zip(runs[0].losses, runs[2].losses, strict=True))
    return [
        Measure("two runs byte-equal", str(straight == again)),
        Measure("resumed byte-equal", str(straight == resumed), ok=straight == resumed or straight != again),
        Measure("resumed: losses differ by", gap, ok=gap < 0.02, limit="0.02"),
    ]


def main(argv: list[str]) -> None:
    """The CPU's answers with an adapter, for `compare_answers`."""
    from qlora import settings

    folder, path, tokens = argv
    settings.quieten_libraries()
    generator, prompts = ready_to_answer(Path(folder), int(tokens))
    answers = [generator.generate_ids([prompt])[0] for prompt in prompts]
    Path(path).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
