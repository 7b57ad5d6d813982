"""What a training step needs on a GPU, counted without one, beside the estimate of the data report.

    python -m benchmarks.gpu_memory                   # 7B, 13B and 70B, with and without checkpointing: 5 minutes
    python -m benchmarks.gpu_memory --only 7b --layers 4

The model is on torch's meta device: every operation of the step runs, with shapes, types and devices but no values.
torch's MemTracker counts the bytes of the tensors that live at once. An operation that would make the CPU wait for the
GPU fails there, since no tensor has a value.
"""

import argparse
import math
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora import machine, presets
from qlora.markdown import as_markdown_table
from qlora.model import lean_layers, packing
from qlora.model.lora import Lora, add_lora
from qlora.prompt import IGNORED
from qlora.training import costs, trainer
from qlora.training.examples import Example, collate, make_example

RULES, ANSWER = 150, 60  # tokens that all rows begin with, and tokens of a response
WINDOW = {"max_position_embeddings": 4096, "vocab_size": 32000}
LLAMAS = {  # config.json of meta-llama/Llama-2-{7b,13b,70b}-hf
    "7b": WINDOW
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": WINDOW
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": WINDOW
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
}


@dataclass(frozen=True)
class Step:
    """A model's shape, and the largest batch of its run."""

    shape: dict[str, int]
    rows: int
    length: int
    checkpointing: bool


def make_model(step: Step):
    """The model in NF4 with LoRA in fp32 on the meta device, as `load_base_model` and ResponseTrainer have it."""
    packing.register_attention()
    config = LlamaConfig(**step.shape, attn_implementation=packing.ATTENTION)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(machine.compute_dtype())
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantisation)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight = pack_weight(module.out_features, module.in_features)
            module.compute_dtype, module.compute_type_is_set = machine.compute_dtype(), True
    model.is_loaded_in_4bit = True
    model = add_lora(model.requires_grad_(False), Lora(16, 32), presets.SEEDS).train()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lean_layers.make_lean(model)
    return model


def pack_weight(*shape: int) -> Params4bit:
    """A weight of (out, in) in NF4 with double quantisation: half a byte per weight and a byte per 64, on meta."""

    def empty(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    blocks = math.prod(shape) // 64
    outer = QuantState(empty((math.ceil(blocks / 256),), torch.float32), code=empty((256,), torch.float32))
    outer.blocksize, outer.dtype = 256, torch.float32
    state = QuantState(empty((blocks,), torch.uint8), torch.Size(shape), empty((16,), torch.float32), 64, "nf4")
    state.dtype, state.state2, state.nested = machine.compute_dtype(), outer, True
    state.offset = empty((), torch.float32)
    packed = empty((math.prod(shape) // 2, 1), torch.uint8)
    return Params4bit(packed, False, state, 64, quant_type="nf4", bnb_quantized=True)


def make_rows(step: Step) -> list[Example]:
    """Rows that share the rules and nothing else."""
    own = step.length - RULES
    tokens = [[*range(RULES), *(n * own + RULES + k for k in range(own))] for n in range(step.rows)]
    labels = [IGNORED] * (step.length - ANSWER)
    return [make_example(row, labels + row[-ANSWER:]) for row in tokens]


def to_meta(batch: dict) -> dict:
    """A collated batch whose tensors are on the meta device."""

    def move(tensor):
        return torch.empty_like(tensor, device="meta") if isinstance(tensor, torch.Tensor) else tensor

    packed = replace(batch["packed"], **{name: move(value) for name, value in vars(batch["packed"]).items()})
    return {name: move(value) for name, value in batch.items()} | {"packed": packed}


# ------------------------------------------------------------------------------- count


class Tracker(MemTracker):
    """MemTracker for models with frozen weights: its hooks for gradients want gradients."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


class Strays(TorchDispatchMode):
    """Collects the operations that are given a tensor of the CPU; numbers (no dimension) may come from there."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "meta" and tensor.dim() for tensor in tensors):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_gpu(dtype: torch.dtype = torch.bfloat16, flash: bool = True):
    """A context in which the project's code believes that it computes on a GPU, with FlashAttention or without."""
    with ExitStack() as patches:
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch, "is_autocast_enabled", lambda *device: False),  # there is no autocast for meta
            (machine, "compute_dtype", lambda: dtype),
            (machine, "has_flash_attention", lambda dtype: flash),
        ):
            patches.enter_context(patch.object(owner, name, value))
        yield


def count_step(model, rows: list[Example]) -> tuple[float, set[str]]:
    """The peak of a step in GB, with gradients of an earlier batch, and the operations on tensors of the CPU."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.empty_like(weight)
    batch, tracker, strays = to_meta(collate(rows)), Tracker(), Strays()
    tracker.track_external(model)
    with strays, tracker:
        earlier = [weight.grad.clone() for weight in trained]  # as in ResponseTrainer.training_step
        trainer.response_loss(model, batch).backward()
    moments = 2 * sum(weight.numel() for weight in earlier)  # AdamW in 8 bit
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("meta")]
    return (snapshot["Total"] + moments) / 1e9, strays.found


def estimate(step: Step, model, rows: list[Example]) -> float:
    """The data report's estimate in GB, without the libraries' part, which the meta device does not have."""
    schedule = trainer.Schedule(
        **dict.fromkeys(trainer.Schedule.__dataclass_fields__, 1)  # memory does not depend on the others
        | {"micro_batch": step.rows, "checkpointing": step.checkpointing}
    )
    needed = costs.estimate_memory(costs.plan_costs(schedule, [rows], model))
    return needed["all"] - needed["libraries"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LLAMAS, default=list(LLAMAS), metavar="MODEL", help="7b, 13b, 70b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    args = parser.parse_args(argv)
    table = [["Llama-2", "rows", "tokens per row", "gradient checkpointing", "counted GB", "estimate GB", "ratio"]]
    with pretended_gpu():
        for name in args.only:
            for rows, length, checkpointing in ((4, 512, False), (4, 512, True), (2, 2048, False), (2, 2048, True)):
                shape = LLAMAS[name] | ({"num_hidden_layers": args.layers} if args.layers else {})
                step = Step(shape, rows, length, checkpointing)
                model, examples = make_model(step), make_rows(step)
                (counted, strays), guessed = count_step(model, examples), estimate(step, model, examples)
                assert not strays, strays
                cells = f"{counted:.2f}", f"{guessed:.2f}", f"{guessed / counted:.2f}"
                table.append([name, str(rows), f"{length:,}", "on" if checkpointing else "off", *cells])
                print(table[-1], file=sys.stderr, flush=True)
    print(as_markdown_table(table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
