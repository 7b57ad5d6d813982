"""Presets: the base model, the dataset and the sizes that go together on a kind of machine."""

from dataclasses import dataclass

from qlora import settings
from qlora.console import fail

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
SEEDS = 2**32 - 1  # numpy takes no larger one
SAMPLE_DATA = settings.PROJECT / "sample_data"
DOLLY_WITH_CONTEXT = "category=closed_qa,information_extraction,summarization"


@dataclass(frozen=True)
class Preset:
    """Values that a flag of the same name overrides."""

    base_model: str
    dataset: str
    max_length: int
    batch_size: int
    accumulation: int
    learning_rate: float
    epochs: float
    distractors: int
    gold_probability: float
    filters: tuple[str, ...] = ()


DOLLY = {
    "dataset": "databricks/databricks-dolly-15k",
    "filters": (DOLLY_WITH_CONTEXT,),
    "max_length": 2048,
    "learning_rate": 2e-4,  # QLoRA's own for 7B and 13B (arXiv 2305.14314, table 9)
    "epochs": 1.0,
    "distractors": 2,
    "gold_probability": 0.85,  # Dolly has no rows that refuse
}
PRESETS = {
    # By trials on training documents (benchmarks/runs.jsonl). A model of 135M reads one passage well. A second one is
    # mostly wrong, and costs more answers than it adds. A ninth of the sample's rows refuse.
    "laptop": Preset(
        EMBEDDED,
        dataset=str(SAMPLE_DATA / "train.jsonl"),
        max_length=768,
        batch_size=8,
        accumulation=1,
        learning_rate=1e-3,
        epochs=0.9,  # 3 minutes in bf16 on 2 cores, 5 in fp32
        distractors=0,
        gold_probability=0.95,
    ),
    "llama2-7b": Preset("meta-llama/Llama-2-7b-hf", batch_size=4, accumulation=4, **DOLLY),
    "llama2-13b-chat": Preset("meta-llama/Llama-2-13b-chat-hf", batch_size=2, accumulation=8, **DOLLY),
    # As far as random tiny models of their architectures go (tests/test_families.py).
    "llama3-8b": Preset("meta-llama/Llama-3.1-8B-Instruct", batch_size=2, accumulation=8, **DOLLY),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", batch_size=2, accumulation=8, **DOLLY),
    "mistral-7b": Preset("mistralai/Mistral-7B-Instruct-v0.3", batch_size=4, accumulation=4, **DOLLY),
}


def choose_preset(flag: str | None, detect: bool = True) -> str:
    """The preset's name: flag > QLORA_PRESET > auto, which is llama2-7b on a CUDA GPU and laptop elsewhere.

    Without `detect` it does not look for a GPU: a call with mistakes should not wait for the import of torch.
    """
    name = flag or settings.get("QLORA_PRESET") or "auto"
    if name in PRESETS:
        return name
    if name != "auto":
        where = "--preset" if flag else "QLORA_PRESET"
        raise fail(f"unknown preset {name}", where, f"give auto, {', '.join(PRESETS)}")
    if not detect:
        return "laptop"
    import torch

    return "llama2-7b" if torch.cuda.is_available() else "laptop"
