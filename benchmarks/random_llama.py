"""Speed and memory of our training step on the shapes of Llama-2, whose weights nobody needs for that.

python benchmarks/train_speed.py --shape llama2-7b    # on a CUDA GPU
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from qlora import console, settings  # noqa: E402
from qlora.prompt import IGNORED  # noqa: E402

RANK, ALPHA, SEED = 16, 32, 0
BATCHES = ((4, 512), (1, 2048))  # rows, tokens a row


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and what was published for QLoRA on it with one A100."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    published_tokens_per_second: int
    published_gb: float


SHAPES = {"llama2-7b": Shape(4096, 11008, 32, 32, 1579, 7.52), "llama2-13b": Shape(5120, 13824, 40, 40, 974, 12.61)}


def measure_shape(name: str) -> dict:
    """Tokens/s and peak memory of ten steps of 4 x 512 and of 1 x 2,048 tokens.

    Raises UserError where there is no CUDA GPU.
    """
    import torch
    from transformers import LlamaConfig

    if not torch.cuda.is_available():
        raise console.fail("no CUDA GPU here", f"--shape {name}", "run it where there is one, or leave --shape out")
    settings.quieten_libraries()
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
    )
    console.note(f"building {name} from random weights")
    model = build_random_llama(config, torch.device("cuda"))
    runs = []
    for rows, length in BATCHES:
        console.note(f"{rows} x {length} tokens")
        runs.append(time_steps(model, rows, length, steps=10))
    published = {"tokens_per_second": shape.published_tokens_per_second, "peak_gb": shape.published_gb}
    return {"shape": name, "gpu": torch.cuda.get_device_name(), "runs": runs, "published_one_a100": published}


def build_random_llama(config, device):
    """A Llama in 4-bit with LoRA and gradient checkpointing; one matrix at a time exists in 16-bit."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora import packing, trainer
    from qlora.lean_layers import make_lean

    packing.register_attention()
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=packing.ATTENTION)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, random_linear(module, device))
        elif list(module.parameters(recurse=False)):  # embeddings, norms and head stay in 16-bit
            module.to_empty(device=device, recurse=False)
            for weight in module.parameters(recurse=False):
                weight.data.normal_(std=0.02) if weight.dim() > 1 else weight.data.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # computed, never random
    model.is_loaded_in_4bit = True  # PEFT looks here for what kind of LoRA layers to make
    model.activation_checkpointing_enable({"use_reentrant": False})
    model = trainer.add_lora(model, RANK, ALPHA, 0.0, SEED)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # as ResponseTrainer does
    make_lean(model)
    return model.train()


def random_linear(linear, device):
    """A Linear4bit (NF4, double quantisation, bf16) of the same shape with random weights."""
    import bitsandbytes
    import torch

    # Moving a Params4bit is what quantises it; quant_state is then on the weight.
    weight = torch.empty(linear.out_features, linear.in_features, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
    )
    packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed).to(device)
    packed.support_avx512bf16_for_cpu = False  # as load_base_model does for training
    return packed


def time_steps(model, rows: int, length: int, steps: int) -> dict:
    """Tokens/s over `steps` optimizer steps after two unmeasured ones, and the peak of GPU memory in GB.

    Every token is labelled, the most that a head can have to do; a paged optimizer's state, a few
    hundred MB, lies in memory that CUDA manages and doesn't count.
    """
    import bitsandbytes
    import torch

    from qlora.trainer import response_loss

    device = model.device
    on_gpu = device.type == "cuda"
    ids = torch.randint(model.config.vocab_size, (rows, length), device=device)
    labels = ids.clone()
    labels[:, 0] = IGNORED  # nothing predicts the first token
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(trainable) if on_gpu else torch.optim.AdamW(trainable)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps + 2):
        if step == 2:
            started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = response_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()  # waits for the GPU
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    tokens_per_second = rows * length * steps / seconds
    return {"rows": rows, "length": length, "tokens_per_second": tokens_per_second, "peak_gb": peak, "loss": loss}
