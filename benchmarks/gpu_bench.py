"""What the parts of gpu_check.py share: sizes, models of random weights, runs of the scripts, and what was measured."""

import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

from benchmarks import answer_speed, random_llama, train_speed
from benchmarks.plain_recipe import RANK, SEED, Setup
from qlora import console, presets
from qlora.model import adapter, base_model
from qlora.prompt import encode_prompt, fill_prompt
from qlora.training.row_filters import keep_usable
from qlora.training.rows import Row, load_rows

PROJECT = Path(__file__).resolve().parent.parent

SAMPLE_ROWS = PROJECT / "sample_data" / "train.jsonl"


@dataclass(frozen=True)
class Measure:
    """One number that a part found; `ok` is None where there is nothing to hold it against."""

    name: str
    value: float | str
    unit: str = ""
    ok: bool | None = None
    limit: str = ""


@dataclass(frozen=True)
class Sizes:
    """How much the parts do: on a card, or --tiny on the CPU."""

    large: str  # of random_llama.SHAPES
    small: str | None  # None: the embedded model, or its shape where its package is missing
    rows: int
    batch: int
    tokens: int  # of an answer
    askers: int
    passages: int


CARD = Sizes("llama2-7b", None, rows=48, batch=4, tokens=32, askers=16, passages=20_000)
TINY = Sizes("tiny", "tiny", rows=12, batch=4, tokens=8, askers=2, passages=64)


@dataclass(frozen=True)
class Bench:
    """What the parts share: a folder for models and adapters, and one for what is kept."""

    work: Path
    output: Path
    sizes: Sizes

    @cached_property
    def device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def is_tiny(self) -> bool:
        return self.sizes == TINY

    @property
    def large(self) -> str:
        """The folder of the large model, made when it is first asked for."""
        return self.random_model(self.sizes.large)

    @property
    def small(self) -> str:
        """The embedded model's name, or a folder of random weights."""
        if self.sizes.small:
            return self.random_model(self.sizes.small)
        try:
            base_model.prepare_embedded_model()
        except console.UserError:
            return self.random_model("smollm2-135m")
        return presets.EMBEDDED

    def random_model(self, shape: str) -> str:
        folder = self.work / shape
        if not folder.is_dir():
            made = self.work / f".{shape}"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            random_llama.write_llama(made, shape, [row.context for row in sample_rows()], self.device)
            made.rename(folder)
        return str(folder)


def sample_rows() -> list[Row]:
    return keep_usable(load_rows(str(SAMPLE_ROWS)))[0]


# ------------------------------------------------------------------------------- train


@dataclass
class Trained:
    """What a run of instruct_train_qlora.py left."""

    folder: Path
    run: dict
    report: dict
    losses: list[float]
    trainer: object

    @property
    def result(self) -> dict:
        return self.run["result"]

    @property
    def peak_gb(self) -> float:
        """Of the GPU, or of the process where there is none."""
        peaks = self.result["peak_memory"]
        return peaks.get("gpu_gb", peaks["process_gb"])


def train(folder: Path, *words, **flags) -> Trained:
    """Runs instruct_train_qlora.py in this process. Raises RuntimeError when it fails."""
    import instruct_train_qlora
    from qlora.training import training_run

    caught, ordinary = [], training_run.train

    def keep_trainer(run, checkpoint):
        caught.append(run)
        return ordinary(run, checkpoint)

    pairs = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    reset_memory()
    # In so few steps random weights may unlearn to stop, which would end a real run.
    lenient = patch.object(training_run, "check_stops", lambda before, after: None)
    with patch.object(training_run, "train", keep_trainer), lenient:
        code = console.run(instruct_train_qlora.main, ["--output", str(folder), *words, *pairs])
    if code:
        raise RuntimeError(f"training ended with exit code {code}: see the log")
    read = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("run", "data_report")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return Trained(folder, read["run"], read["data_report"], losses, caught[0])


def reset_memory() -> None:
    """Frees unused memory, and resets the peak."""
    import torch
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # one of them can pin gigabytes of an earlier model
        clear_device_cache()
        torch.cuda.reset_peak_memory_stats()


def quick_flags(bench: Bench, steps: int) -> dict:
    """A short training of the small model on the sample rows, as the laptop preset has it but for the steps."""
    rate = 0.01 if bench.is_tiny else 1e-3
    flags = {"preset": "laptop", "base_model": bench.small, "dataset": SAMPLE_ROWS, "max_rows": 400, "max_steps": steps}
    return flags | {"learning_rate": rate, "eval_answers": 0, "eval_steps": 10**6, "save_steps": 10**6}


def set_up(bench: Bench, name: str, rows: list[Row]) -> Setup:
    """The folder that both recipes read."""
    folder = bench.work / name
    folder.mkdir(exist_ok=True)
    return train_speed.write_setup(folder, bench.large, bench.sizes.batch, rows, bench.sizes.rows)


def large_adapter(bench: Bench) -> Path:
    """An adapter of the large model: part 2's, or that of one step."""
    folder = bench.work / "shared" / "ours"
    if adapter.is_finished(folder):
        return folder
    setup = set_up(bench, "shared", sample_rows())
    return train(folder, *train_speed.our_words(setup, "ours"), "--overwrite", max_steps=1).folder


# ------------------------------------------------------------------------------- models


def tuned_model(source: str):
    """The 4-bit model with a LoRA in fp32 that changes something, ready to train."""
    import torch

    from qlora.model.lora import Lora, add_lora

    base = base_model.load_base_model(base_model.resolve_base_model(source), training=True)
    model = add_lora(base, Lora(RANK, 2 * RANK), SEED).train()
    chance = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
        if "lora_B" in name:  # with B at zero the gradients of A would be zero
            weight.data.copy_(torch.empty(weight.shape).normal_(std=0.02, generator=chance))
    return model


def ready_to_answer(folder: Path, tokens: int):
    """What rag_qlora.py answers with, and the prompts of sample questions."""
    import rag_qlora
    from qlora.answering.generator import Generator

    trained = adapter.read_adapter(folder)
    flags = Namespace(
        base_model=trained.base_model,
        adapter=folder,
        base_url=None,
        merge_for_speed=False,
        no_cache=False,
        max_new_tokens=tokens,
    )
    model, tokenizer, prompt = rag_qlora.load_model(flags)
    asked = answer_speed.choose_questions(8)
    filled = [fill_prompt(tokenizer, prompt, 768, question, passages) for question, passages in asked]
    generator = Generator(model=model, tokenizer=tokenizer, max_new_tokens=tokens)
    return generator, [encode_prompt(tokenizer, messages) for messages in filled]
