"""What a run costs: estimates of time and memory, before anything is loaded.

    plan = plan_costs(schedule, batches, outline)
    seconds, memory = estimate_seconds(plan, measure_rate()), estimate_memory(plan)

On a GPU, memory is counted from the shapes of a Llama; on the CPU it was measured.
"""

from collections.abc import Sequence
from dataclasses import asdict

from qlora import machine, settings
from qlora.console import fail, note
from qlora.model.base_model import skipped_layers
from qlora.training.examples import Example, collate

# Share of the rate of large matmuls that training reaches, by bytes of what it computes in. Measured on two cores with
# 300 to 500 tokens per batch: 260 to 300 of 970 GFLOP/s in bf16, 140 to 160 of 215 in fp32.
UTILISATION = {2: 0.3, 4: 0.65}
# Bytes per token, layer and unit of the hidden size by which the process grows on the CPU, in bf16 and in fp32, with
# SmolLM2-135M and LoRA on all linear layers, 263 to 1,037 tokens.
ACTIVATION_BYTES_CPU = {2: 60, 4: 90}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # per weight: half a byte, and scales per 64 that have scales per 256
# Libraries, and on the CPU memory that the allocator keeps from batches of other lengths.
LIBRARIES_CUDA, LIBRARIES_CPU = 1.2e9, 1.9e9
FULL = 0.9  # share of the free memory that an estimate may fill; most estimates are too high


def plan_costs(schedule, batches: Sequence[Sequence[Example]], model, shares: int = 1) -> dict:
    """The schedule's fields, and whatever else decides time and memory: the input of all estimates.

    `model` has its LoRA; it may be on the meta device, without weights. `batches` are those of the first epoch. The
    tokens that are computed count: without padding, common beginnings once. `shares` is how many processes divide the
    layers among them.
    """
    tokens, keys, labels = zip(*map(count_batch, batches), strict=True)
    sizes = {
        "batches": list(tokens),
        "keys": max(keys),
        "labels": max(labels),
        "longest": max(len(example.input_ids) for batch in batches for example in batch),
        "processes": settings.process_count(),
    }
    return {**asdict(schedule), **describe_model(model), "base_bytes": count_base_bytes(model, shares), **sizes}


def count_batch(batch: Sequence[Example]) -> tuple[int, int, int]:
    """Tokens that are computed, keys that are gathered to be shared, and labels."""
    collated = collate(batch)
    packed = collated["packed"]
    return packed.input_ids.numel(), 0 if packed.seen is None else len(packed.seen), len(collated["targets"])


def describe_model(model) -> dict[str, int]:
    """The sizes of a model with LoRA."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "parameters": model.num_parameters(),
        "lora_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "mlp_size": config.intermediate_size,
        "query_size": heads * size,
        "key_size": (getattr(config, "num_key_value_heads", None) or heads) * size,
        "vocabulary": config.vocab_size,
    }


def count_base_bytes(model, shares: int = 1) -> int:
    """Bytes of the base model in 4-bit in a process, with what quantisation leaves in 16 bit.

    Of `shares` processes each has its part of the packed weights, and two layers whole: the one that computes, and the
    next, which arrives meanwhile. Scales are not divided.
    """
    from torch.nn import Linear

    kept = set(skipped_layers(model.config.get_text_config()) or ["lm_head"])
    packed = sum(
        layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and ".lora_" not in name and not kept & set(name.split("."))
    )
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    halves, layers = packed / 2, model.config.get_text_config().num_hidden_layers
    here = halves if shares == 1 else halves / shares + 2 * halves / layers
    return round(here + (NF4_BYTES - 1 / 2) * packed + 2 * (model.num_parameters() - trained - packed))


def measure_rate(seconds: float = 0.5) -> float:
    """FLOP per second of this machine in a large square matmul, in the type that training computes in."""
    import torch
    from torch.utils.benchmark import Timer

    from qlora.machine import compute_dtype

    device, size = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 1536)
    matrix = torch.randn(size, size, dtype=compute_dtype(), device=device)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=seconds).median


def estimate_seconds(plan: dict, rate: float) -> float:
    """An estimate of how long all steps take, without evaluations: within 30 % on an idle CPU.

    A token costs 2 FLOP per weight forward and 2 backward (the base is frozen: no weight gradients, but for
    LoRA), and 2 more where activations are recomputed.
    """
    tokens = plan["steps"] * plan["accumulation"] * sum(plan["batches"]) / len(plan["batches"])
    share = UTILISATION[machine.compute_dtype().itemsize]
    return tokens * (6 if plan["checkpointing"] else 4) * plan["parameters"] / (rate * share)


def fits(plan: dict) -> bool:
    """Whether the estimated memory of the plan is free on this machine: on its GPU where it has one."""
    return estimate_memory(plan)["all"] * 1e9 <= FULL * machine.free_memory()


def check_gpu_memory(plan: dict) -> None:
    """Raises UserError, with what would fit, when the GPU has no memory for even one row at a time.

    Reports when it has some for fewer rows than a batch: then training takes as many as fit.
    """
    import torch

    if not torch.cuda.is_available() or fits(plan):
        return
    one = {**plan, "batches": [plan["longest"]], "keys": 0, "labels": min(plan["labels"], plan["longest"])}
    free = f"{machine.free_memory() / 1e9:.1f} GB of the GPU are free"
    if fits(one):
        whole = estimate_memory(plan)["all"]
        note(f"{free}, and the largest batch takes about {whole} GB: fewer rows at a time, same effective batch")
        return
    what = f"{estimate_memory(one)['all']} GB are needed even for one row of {plan['longest']} tokens, and {free}"
    raise fail(what, "GPU", suggest_fit(one))


def suggest_fit(plan: dict) -> str:
    """The flags with which the plan of one row at a time fits."""
    lengths = [length for length in (plan["longest"], 1024, 512) if length <= plan["longest"]]
    for length in lengths:
        smaller = {**plan, "batches": [length], "checkpointing": True}
        if fits(smaller):
            shorter = f" --max-length {length}" if length < plan["longest"] else ""
            flags = f"--gradient-checkpointing on{shorter}"
            return f"{flags} would take {estimate_memory(smaller)['all']} GB; or end other processes on the GPU"
    return "give a smaller base model (--preset llama2-7b, or laptop), or end other processes on the GPU"


def estimate_memory(plan: dict) -> dict[str, float]:
    """An estimate of the GB a process needs, by what needs them, and in all.

    Within a fifth on the CPU, and within a tenth of what torch counts for a step of a Llama on a GPU
    (benchmarks/gpu_memory.py). A LoRA weight takes 16 bytes: on the CPU fp32 weight, gradient and two moments of AdamW;
    on a GPU a copy of the gradient, moments in 8 bit, and the weight in 16 bit. Of several processes each has 4 more,
    for the gradients that it sends.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    parts = {
        "base_model": plan["base_bytes"],
        "lora": (16 if plan["processes"] == 1 else 20) * plan["lora_parameters"],
        "activations": count_activations(plan) if on_gpu else estimate_activations(plan),
        "libraries": LIBRARIES_CUDA if on_gpu else LIBRARIES_CPU,
    }
    return {name: round(size / 1e9, 2) for name, size in [*parts.items(), ("all", sum(parts.values()))]}


def count_activations(plan: dict) -> int:
    """Bytes on a GPU that the forward pass of the largest batch keeps for the backward pass, and that this adds.

    A layer of a Llama keeps the inputs of two norms, of the attention, of the MLP and of their output projections;
    queries, keys and values, and the latter two once more where they are gathered; and both products of the gate. With
    checkpointing all layers keep their input, and one of them everything.
    """
    tokens, hidden, mlp = max(plan["batches"]), plan["hidden_size"], plan["mlp_size"]
    per_token = 4 * hidden + 2 * plan["query_size"] + 2 * plan["key_size"] + 3 * mlp
    layer = 2 * (tokens * per_token + 2 * plan["keys"] * plan["key_size"])
    kept = 2 * tokens * hidden * plan["layers"] + layer if plan["checkpointing"] else layer * plan["layers"]
    # The backward pass adds most at its start, for the logits' gradients, or in an MLP: for a dequantised matrix and
    # two gradients, or for four tensors of the gate, when what came after it is gone.
    loss = 14 * plan["labels"] * plan["vocabulary"]
    return kept + max(loss, 2 * (hidden * mlp + tokens * (mlp + hidden)), 2 * tokens * (4 * mlp - 2 * hidden))


def estimate_activations(plan: dict) -> int:
    """The same on the CPU, which computes a large batch in parts."""
    from qlora.training.trainer import AT_ONCE

    tokens, size = min(max(AT_ONCE, plan["longest"]), max(plan["batches"])), machine.compute_dtype().itemsize
    layer = ACTIVATION_BYTES_CPU[size]
    kept = size * plan["layers"] + layer if plan["checkpointing"] else layer * plan["layers"]
    return tokens * plan["hidden_size"] * kept
