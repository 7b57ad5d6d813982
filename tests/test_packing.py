"""Packed batches and lean layers compute what the ordinary ones do, forward and backward."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora import machine
from qlora.model import base_model, lean_layers, packing
from qlora.model.lora import Lora, add_lora
from qlora.prompt import IGNORED
from qlora.training import trainer
from qlora.training.examples import Example, collate, make_example

BEGINNING = [5, 6, 7, 8, 9]


pytestmark = pytest.mark.cpu


SHAPE = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": packing.ATTENTION}


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama in fp32 with grouped key heads, as SmolLM2 has."""
    packing.register_attention()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def rows(*rests: tuple[list[int], list[int]], beginning=BEGINNING) -> list[Example]:
    return [
        make_example([*beginning, *prompt, *answer], [IGNORED] * len([*beginning, *prompt]) + answer)
        for prompt, answer in rests
    ]


BATCHES = {
    "common beginning": rows(([11, 12], [13, 2]), ([14, 15, 16, 17], [18, 19, 20, 2]), ([21], [2])),
    "none in common": rows(([11, 12], [13, 2]), ([14, 15, 16], [18, 2]), beginning=[]),
    "one row": rows(([11, 12], [13, 2])),
    "the same row twice": rows(([11, 12], [13, 14, 2]), ([11, 12], [13, 14, 2])),
    "one begins the other": rows(([11], [12]), ([11], [12, 13, 2])),
    "passages in common": [
        *rows(([31, 11, 12], [13, 2]), ([31, 14], [18, 19, 2]), beginning=[*BEGINNING, *range(30, 66)]),
        *rows(([11], [13, 2])),
        *rows(([31, 11, 12], [13, 2]), ([31, 14], [18, 2]), beginning=[*BEGINNING, *range(29, 66)]),
    ],
}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def attend_segments(query, key, value, queries, keys, most_queries, most_keys, *, scale, window_size, enable_gqa=False):
    """FlashAttention's varlen kernel, as its documentation has it: segment by segment, in one matrix each."""
    assert window_size[1] == 0 and queries.dtype == keys.dtype == torch.int32
    assert (int(queries.diff().max()), int(keys.diff().max())) == (most_queries, most_keys)
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    mixed = []
    for first, last, start, end in torch.stack([queries[:-1], queries[1:], keys[:-1], keys[1:]], dim=1).tolist():
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key[start:end]) * scale
        later = torch.ones_like(scores, dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        if window_size[0] >= 0:
            gone = scores.shape[2] - scores.shape[1] - window_size[0] - 1
            later |= torch.ones_like(scores, dtype=torch.bool).tril(gone)
        mixed.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), value[start:end]))
    return torch.cat(mixed)


@pytest.mark.parametrize("short", [0, packing.SHORT])
@pytest.mark.parametrize("kernel", ["attend_plain", "attend_fused", "attend_at_once"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_those_of_row_by_row(llama, name, kernel, checkpointing, short, monkeypatch):
    monkeypatch.setattr(packing, "attend_plain", getattr(packing, kernel))
    monkeypatch.setattr(packing, "is_flash", lambda query: kernel == "attend_at_once")
    monkeypatch.setattr(packing, "varlen_attn", attend_segments)
    monkeypatch.setattr(packing, "SHORT", short)
    model = copy.deepcopy(llama).train()
    expected = 0.0
    for row in BATCHES[name]:
        ids, labels = torch.tensor([row.input_ids.tolist()]), torch.tensor([row.labels.tolist()])
        expected = expected + model(input_ids=ids, labels=labels).loss * (labels != IGNORED).sum()
    wanted = gradients(model, expected)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    lean_layers.make_lean(model)
    batch = collate(BATCHES[name])
    losses = trainer.token_losses(trainer.label_logits(model, batch), batch["labels"])
    assert losses.shape == batch["labels"].shape and (losses[batch["labels"] == IGNORED] == 0).all()
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(model, losses.sum())
    assert found.keys() == wanted.keys() and len(found) > 20
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-3, atol=1e-5) for key in wanted)


@pytest.mark.parametrize("kernel", ["attend_plain", "attend_at_once"])
@pytest.mark.parametrize("window", [8, 40, 47])
def test_rows_with_a_sliding_window_are_those_of_row_by_row(kernel, window, monkeypatch):
    """The longest row has 47 tokens."""
    packing.register_attention()
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window, head_dim=8))
    test_losses_and_gradients_are_those_of_row_by_row(
        mistral, "passages in common", kernel, False, packing.SHORT, monkeypatch
    )


def test_the_common_beginning_is_computed_once_and_nothing_is_padded():
    batch = collate(BATCHES["common beginning"])
    packed = batch["packed"]
    assert packed.pieces == [(5, ()), (4, (0,)), (8, (0,)), (2, (0,))] and packed.input_ids.shape == (1, 19)
    assert packed.position_ids[0].tolist() == [*range(5), *range(5, 9), *range(5, 13), 5, 6]
    check_index(batch, packed)


def test_passages_that_neighbours_share_are_computed_once():
    batch = collate(BATCHES["passages in common"])
    packed = batch["packed"]
    assert [before for _, before in packed.pieces] == [(), (0,), (0, 1), (0, 1), (0,), (0,), (0, 5), (0, 5)]
    assert [length for length, _ in packed.pieces] == [5, 37, 4, 4, 3, 38, 4, 3]
    check_index(batch, packed)


def check_index(batch: dict, packed: packing.PackedBatch) -> None:
    """Every token of the padded batch stands where the index says, at its position."""
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        where = packed.index[row, mask]
        assert packed.input_ids[0, where].tolist() == ids[mask].tolist()
        assert packed.position_ids[0, where].tolist() == list(range(len(where)))


def test_ordinary_batches_are_attended_as_ever(llama):
    """Generation uses the same model: padded on the left, with a cache."""
    batch = collate(BATCHES["common beginning"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    answers = []
    for implementation in (packing.ATTENTION, "sdpa"):
        model = copy.deepcopy(llama).eval()
        model.set_attn_implementation(implementation)
        answers.append(model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*answers)


def test_what_packed_attention_cannot_do_is_refused():
    heads = torch.zeros(1, 2, 3, 4)
    packed = packing.pack(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="no dropout"):
        packing.attend(None, heads, heads, heads, None, 1.0, packed=packed, dropout=0.1)


def test_gradients_of_the_lean_layers_are_right(tiny_base):
    """Against numerical ones, in double precision; the weights are real ones, in 4-bit and kept in 16."""
    attention = base_model.load_base_model(str(tiny_base), training=True).model.layers[0].self_attn
    torch.manual_seed(0)
    for layer in (attention.k_proj.requires_grad_(False), attention.v_proj.requires_grad_(False)):
        shapes = (1, 3, layer.in_features), (2, layer.in_features), (layer.out_features, 2)
        x, a, b = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes)
        assert torch.autograd.gradcheck(lean_layers.LoraLinear.apply, (x, a, b, layer.weight, 0.7))
    y, z = (torch.randn(4, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lean_layers.Gate.apply, (y, z))
    norm, scaled, plain = LlamaRMSNorm(5, eps=1e-3), *(y.detach().float().requires_grad_() for _ in range(2))
    norm.weight.data.normal_()
    (lean_layers.Norm.apply(scaled, norm.weight, 1e-3) ** 3).sum().backward()
    (norm(plain) ** 3).sum().backward()
    assert torch.allclose(scaled.grad, plain.grad, rtol=1e-4, atol=1e-5) and plain.grad.abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_lean_layers_give_peft_s_losses_and_gradients(tiny_base, options):
    batch = collate(BATCHES["common beginning"])
    found = []
    for lean in (False, True):
        model = base_model.load_base_model(str(tiny_base), training=True)
        model = add_lora(model, Lora(4, 8, **options), seed=0)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        if lean:
            lean_layers.make_lean(model)
        with torch.autocast("cpu", dtype=machine.compute_dtype()):
            loss = trainer.response_loss(model.train(), batch)
        found.append((loss.item(), gradients(model, loss)))
    (ordinary, wanted), (lean, ours) = found
    assert lean == pytest.approx(ordinary, rel=1e-2) and wanted.keys() == ours.keys()
    for name, gradient in wanted.items():
        assert torch.cosine_similarity(gradient.flatten(), ours[name].flatten(), dim=0) > 0.99, name
        assert ours[name].norm().item() == pytest.approx(gradient.norm().item(), rel=0.1)


def test_lean_layers_take_fp32_under_autocast(tiny_base):
    """As a CPU without AVX512 gives it to them: autocast casts the inputs of a product, but not of a sum in place."""
    model = add_lora(base_model.load_base_model(str(tiny_base), training=True), Lora(4, 8), seed=0).train()
    lean_layers.make_lean(model)
    layer = next(module for module in model.modules() if isinstance(module, lean_layers.Linear4bit))
    x = torch.randn(1, 5, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


def test_lean_layers_answer_as_peft_does(tiny_base):
    """Without gradients; with the adapter switched off they are the base model's."""
    ids = torch.tensor([[1, *range(20, 60)]])
    model = add_lora(base_model.load_base_model(str(tiny_base)), Lora(4, 8), seed=0).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    with torch.inference_mode():
        tuned = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        lean_layers.make_lean(model)
        lean, last = model(ids).logits, model(ids, logits_to_keep=1).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base)
    step = (tuned - base).abs().max()
    assert step > 0.05 and (lean - tuned).abs().max() < 0.05 * step
    assert torch.allclose(last[:, 0], lean[:, -1], rtol=1e-5, atol=1e-6)  # products of other sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"dora": True},
        {"dropout": 0.05},
        {"rslora": True, "targets": ["q_proj", "lm_head"]},
        {"dora": True, "dropout": 0.5},
    ],
    ids=str,
)
def test_every_option_of_lora_answers_in_every_dtype(tiny_base, monkeypatch, options, dtype):
    """As PEFT's own layers do; in fp32 nearly, in 16 bit up to their rounding."""
    monkeypatch.setattr(machine, "compute_dtype", lambda: dtype)
    model = add_lora(base_model.load_base_model(str(tiny_base)), Lora(4, 8, **options), seed=0)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # as an adapter is loaded
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.tensor([[1, *range(20, 60)]])
    with torch.inference_mode():
        wanted = model.eval()(ids).logits
        with model.disable_adapter():
            step = (wanted - model(ids).logits).norm()
        lean_layers.make_lean(model)
        logits = model(ids).logits
    assert logits.dtype == dtype and (logits - wanted).norm() < (1e-4 if dtype == torch.float32 else 0.05) * step
