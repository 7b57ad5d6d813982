"""A training step and an answer on a GPU, on torch's meta device: every shape, type and device, and no values.

Whatever would make the CPU wait for the GPU raises an error there: a tensor without values has none to fetch.
"""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_memory
from benchmarks.gpu_memory import LLAMAS, Step, count_step, make_model, make_rows, pretended_gpu, to_meta
from qlora import console, machine, presets, settings
from qlora.console import UserError
from qlora.model import base_model, lean_layers
from qlora.training import costs, trainer
from qlora.training.examples import collate

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def two_layers(name: str) -> dict[str, int]:
    return LLAMAS[name] | {"num_hidden_layers": 2}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LLAMAS)
def test_a_step_of_a_real_shape_stays_on_the_gpu_and_takes_the_memory_of_the_estimate(name, checkpointing):
    with pretended_gpu():
        step = Step(two_layers(name), 8, 2048, checkpointing)  # activations outweigh two layers' weights
        model, rows = make_model(step), make_rows(step)
        counted, strays = count_step(model, rows)
        assert not strays
        assert gpu_memory.estimate(step, model, rows) == pytest.approx(counted, rel=0.1)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(weights) == 2 * 2 * 7 and all(weight.grad.shape == weight.shape for weight in weights.values())
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flash", [True, False])
def test_the_layers_compute_in_16_bit_and_the_loss_in_fp32(dtype, flash):
    """Also before Ampere, where the pieces of a batch are attended one by one."""
    with pretended_gpu(dtype, flash):
        step = Step(two_layers("7b"), 3, 300, checkpointing=False)
        model, types = make_model(step), set()
        for layer in model.get_decoder().layers:
            layer.register_forward_hook(lambda layer, inputs, output: types.add(output.dtype))
        loss = trainer.response_loss(model, to_meta(collate(make_rows(step))))
        loss.backward()
    assert types == {dtype} and loss.dtype == torch.float32


def test_neither_loss_nor_counts_wait_for_the_gpu():
    with pretended_gpu():
        step = Step(two_layers("7b"), 2, 300, checkpointing=False)
        model, progress = make_model(step), trainer.Progress()
        inputs = to_meta(collate(make_rows(step)))
        loss = trainer.ResponseTrainer.compute_loss(SimpleNamespace(progress=progress), model, inputs)
        with pytest.raises(RuntimeError, match="meta"):
            loss.item()
    computed = 600 - gpu_memory.RULES
    assert (progress.useful_tokens, progress.labelled_tokens, progress.computed_tokens) == (600, 120, computed)


def test_llama_2_13b_chat_reads_a_prompt_and_writes_a_token_on_the_gpu():
    with pretended_gpu():
        model = make_model(Step(two_layers("13b"), 1, 1, checkpointing=False)).eval()
        lean_layers.cast_adapter(model)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.uint8}
        strays = gpu_memory.Strays()
        with strays, torch.inference_mode():
            ids = torch.zeros(1, 700, dtype=torch.long, device="meta")
            read = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = read.logits.argmax(-1)
            written = model(input_ids=token, past_key_values=read.past_key_values, use_cache=True)
    assert written.logits.shape == (1, 1, 32000) and written.logits.dtype == torch.bfloat16
    assert written.past_key_values.get_seq_length() == 701
    assert strays.found <= {"aten.arange.start"}


# ------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_norm_is_the_model_s(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1, 0.1)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 64).mul_(5).to(dtype)
    plain, fused = (x.clone().requires_grad_() for _ in range(2))
    wanted, found = norm(plain), lean_layers.run_fused_norm(norm, None, fused)
    wanted.float().pow(3).sum().backward()
    found.float().pow(3).sum().backward()
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    assert found.dtype == wanted.dtype == dtype and torch.allclose(found, wanted, **near)
    assert torch.allclose(fused.grad, plain.grad, rtol=near["rtol"], atol=near["atol"] * plain.grad.abs().max().item())


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bit_are_as_near_to_fp32_s_as_peft_s(tiny_base, dtype, monkeypatch):
    """Packed batches and lean layers under autocast, with the loss scaled as fp16 needs it; fp32 adapters."""
    from test_packing import BATCHES

    batch = collate(BATCHES["passages in common"])
    padded = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def gradients(compute, ours: bool) -> torch.Tensor:
        monkeypatch.setattr(machine, "compute_dtype", lambda: compute)
        model = small_model(tiny_base, ours)
        with torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
            loss = trainer.response_loss(model, batch) if ours else model(**padded).loss
        scale = 1 if compute == torch.float32 else 2.0**14
        (loss * scale).backward()
        found = [weight.grad for weight in model.parameters() if weight.requires_grad]
        assert {gradient.dtype for gradient in found} == {torch.float32}
        return torch.cat([gradient.flatten() / scale for gradient in found])

    exact = gradients(torch.float32, ours=False)
    plain, lean = ((gradients(dtype, ours) - exact).norm() / exact.norm() for ours in (False, True))
    assert 0 < lean < 1.5 * plain + 0.005 and plain < 0.05


def small_model(folder, lean: bool):
    from qlora.model.lora import Lora, add_lora

    model = add_lora(base_model.load_base_model(str(folder), training=True), Lora(4, 8), seed=0).train()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    if lean:
        lean_layers.make_lean(model)
    return model


# ------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("capability", "bf16", "dtype", "flash"),
    [
        ((7, 0), False, torch.float16, False),  # V100
        ((7, 5), False, torch.float16, False),  # T4
        ((8, 0), True, torch.bfloat16, True),  # A100
        ((9, 0), True, torch.bfloat16, True),  # H100
    ],
)
def test_each_generation_of_gpus_has_its_type_and_attention(capability, bf16, dtype, flash, monkeypatch):
    pretend_card(monkeypatch, capability, bf16)
    assert machine.compute_dtype() == dtype and machine.has_flash_attention(dtype) is flash
    machine.check_card()
    said = machine.describe()
    assert said.startswith(f"Card X in {str(dtype).removeprefix('torch.')}") and ("FlashAttention" in said) != flash


def pretend_card(monkeypatch, capability=(8, 0), bf16=True):
    machine.has_flash_attention.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)


def test_each_process_has_a_gpu_of_its_own(monkeypatch, capsys):
    from conftest import train

    pretend_card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    machine.check_card()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train("--output", "unused") == 2
    assert "4 processes for 2 GPUs" in capsys.readouterr().err


def test_a_gpu_that_is_too_old_is_told_before_anything_is_loaded(monkeypatch, capsys):
    from conftest import rag, train

    pretend_card(monkeypatch, (6, 1), bf16=False)
    monkeypatch.setattr(base_model, "load_base_model", lambda source: pytest.fail("loaded"))
    for run in (train, partial(rag, "ask", "Who?", "--adapter", "none")):
        assert run("--preset", "laptop") == 2
        assert "Card X has compute capability 6.1, and 7.0 is needed" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 3])
def test_each_process_loads_onto_its_own_gpu(rank, monkeypatch):
    import transformers

    given = {}
    pretend_card(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    load = SimpleNamespace(from_pretrained=lambda source, **options: given.update(options))
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", load)
    base_model.load_model("llama", "sdpa")
    assert given["device_map"] == {"": rank} and given["dtype"] == torch.bfloat16
    assert given["use_safetensors"] and given["trust_remote_code"] is False


def test_segments_of_gpu_memory_grow(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    settings.quieten_libraries()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_a_gpu_takes_the_preset_of_the_mission(monkeypatch):
    pretend_card(monkeypatch)
    monkeypatch.setenv("QLORA_PRESET", "")
    assert presets.choose_preset(None) == "llama2-7b"


# ------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def plan() -> dict:
    """The costs of Llama-2-7B on four rows of 2,048 tokens at a time."""
    step = Step(LLAMAS["7b"], 4, 2048, checkpointing=False)
    schedule = trainer.Schedule(**dict.fromkeys(trainer.Schedule.__dataclass_fields__, 1) | {"checkpointing": False})
    with pretended_gpu():
        return costs.plan_costs(schedule, [make_rows(step)], make_model(step))


@pytest.mark.parametrize(
    ("free", "told"),
    [
        (80e9, None),
        (24e9, "fewer rows at a time, same effective batch"),
        (12e9, "--gradient-checkpointing on would take"),
        (7.1e9, "--gradient-checkpointing on --max-length 1024 would take"),
        (3e9, "give a smaller base model (--preset llama2-7b, or laptop)"),
    ],
)
def test_a_card_that_is_too_small_is_told_with_what_fits(plan, free, told, monkeypatch, capsys):
    with pretended_gpu():
        monkeypatch.setattr(machine, "free_memory", lambda: free)
        try:
            costs.check_gpu_memory(plan)
            said = capsys.readouterr().err
        except UserError as error:
            said = str(error)
            assert "are needed even for one row of 2048 tokens" in said and f"{free / 1e9:.1f} GB of the GPU" in said
    assert told in said if told else not said


def test_the_cpu_is_not_held_to_the_gpu_s_memory(plan, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1e9)
    costs.check_gpu_memory(plan)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_told_in_a_sentence(error, capsys):
    def main(argv):
        raise error

    assert console.run(main, []) == 2
    said = capsys.readouterr().err
    assert "* out of memory - " in said and "--batch-size" in said and "Traceback" not in said
    with pytest.raises(RuntimeError, match="something else"):
        console.run(lambda argv: (_ for _ in ()).throw(RuntimeError("something else")), [])


def test_packing_tells_flash_attention_where_queries_and_keys_begin():
    from test_packing import BATCHES

    packed = collate(BATCHES["common beginning"])["packed"]
    assert packed.seen.tolist() == [*range(5), *range(9), *range(5), *range(9, 17), *range(5), 17, 18]
    assert packed.bounds.tolist() == [[0, 5, 9, 17, 19], [0, 5, 14, 27, 34]]
    assert packed.longest == (8, 13)
    alone = collate(BATCHES["none in common"])["packed"]
    assert alone.seen is None and alone.bounds.tolist() == [[0, 4, 9]] * 2
