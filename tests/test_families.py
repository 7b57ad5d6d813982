"""Base models that people have: random tiny models of their architectures, with tokenizers and templates like theirs.

For each: packed losses and gradients, the prompt, the end of an answer, and an adapter that plain PEFT answers with.
"""

import copy
import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from conftest import QUICK, sample_rows, train
from gguf import GGUFReader
from test_packing import BATCHES, gradients

from benchmarks import random_llama
from qlora.console import UserError
from qlora.model import base_model, lean_layers, packing
from qlora.prompt import IGNORED, choose_prompt, encode_prompt, encode_row
from qlora.training import gguf_file, trainer
from qlora.training.examples import collate

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}

LOOP = "{% for message in messages %}"
CHATML = LOOP + "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
THINKING = "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
THINKING = CHATML + THINKING + "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
LLAMA3 += "{{ message.content + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
LLAMA3 += "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{% elif message.role == 'user' %}"
)
MISTRAL += "{{ '[INST] ' }}{% if messages[0].role == 'system' and loop.index0 == 1 %}{{ messages[0].content + '\n\n' }}"
MISTRAL += "{% endif %}{{ message.content + '[/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}"
MISTRAL += "{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
GEMMA += LOOP + "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
GEMMA += "{{ message.content + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
GEMMA += "{{ '<start_of_turn>model\n' }}{% endif %}"
PHI3 = LOOP + "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
PHI3 += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"


@dataclass(frozen=True)
class Family:
    """An architecture, its special tokens (BOS or none, EOS, others), its template, and the token that ends a turn."""

    config: type
    template: str
    bos: str | None
    eos: str
    end: str
    others: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)


CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # Qwen2's tokenizer adds a pad token that the model lacks
PRESET_OF = {"llama-3": "llama3-8b", "qwen3": "qwen3-8b", "mistral": "mistral-7b"}
FAMILIES = {
    "llama-3": Family(
        transformers.LlamaConfig,
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"rope_parameters": LLAMA3_ROPE},
    ),
    "qwen2": Family(transformers.Qwen2Config, CHATML, None, "<|im_end|>", "<|im_end|>", CHAT_TOKENS),
    "qwen3": Family(
        transformers.Qwen3Config, THINKING, None, "<|im_end|>", "<|im_end|>", CHAT_TOKENS, {"head_dim": 16}
    ),
    "mistral": Family(
        transformers.MistralConfig, MISTRAL, "<s>", "</s>", "</s>", ("[INST]", "[/INST]"), {"sliding_window": 2048}
    ),
    "gemma": Family(
        transformers.GemmaConfig,
        GEMMA,
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        {"head_dim": 16},
    ),
    "gemma-3": Family(
        transformers.Gemma3TextConfig,
        GEMMA,
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        {"head_dim": 16, "sliding_window": 24},
    ),
    "gemma-2": Family(
        transformers.Gemma2Config,
        GEMMA,
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        {"head_dim": 16, "sliding_window": 24, "attn_logit_softcapping": 1.0},  # caps what random weights give, too
    ),
    "phi-3": Family(
        transformers.Phi3Config,
        PHI3,
        None,
        "<|endoftext|>",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "smollm3": Family(transformers.SmolLM3Config, THINKING, None, "<|im_end|>", "<|im_end|>", CHAT_TOKENS),
}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """The family and a folder with its random model."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("bases") / request.param
    named = {name: token for name, token in (("bos_token", family.bos), ("eos_token", family.eos)) if token}
    texts = [row["context"] for row in sample_rows()[::9]]
    tokenizer = random_llama.make_tokenizer(texts, 900, 2048, named, family.others)
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = family.config(**SIZES, **family.options, **ids, vocab_size=len(tokenizer))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return family, folder


def test_packed_losses_and_gradients_are_those_of_row_by_row(made):
    _, folder = made
    packing.register_attention()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    packed = copy.deepcopy(plain)
    packed.set_attn_implementation(packing.ATTENTION)
    lean_layers.make_lean(packed)
    expected = 0.0
    for row in BATCHES["passages in common"]:
        ids, labels = torch.tensor([row.input_ids.tolist()]), torch.tensor([row.labels.tolist()])
        expected = expected + plain.train()(input_ids=ids, labels=labels).loss * (labels != IGNORED).sum()
    wanted = gradients(plain, expected)
    loss = trainer.response_loss(packed.train(), collate(BATCHES["passages in common"]), 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(packed, loss)
    assert found.keys() == wanted.keys() and len(found) >= 15
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * max(1.0, gradient.abs().max().item())), name


def test_the_prompt_begins_the_row_and_the_turn_ends_with_its_own_token(made):
    family, folder = made
    tokenizer = base_model.load_tokenizer(str(folder))
    prompt = choose_prompt(tokenizer)
    assert tokenizer.eos_token == family.end and tokenizer.pad_token
    history = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    messages = prompt.messages("Who signs?", ["The bosun signs."], history)
    ids, labels = encode_row(tokenizer, messages, "The bosun. [1]")
    start = encode_prompt(tokenizer, messages)
    assert ids[: len(start)] == start and labels[: len(start)] == [IGNORED] * len(start)
    assert labels[len(start) :] == ids[len(start) :] and ids[-1] == tokenizer.convert_tokens_to_ids(family.end)
    assert ids.count(tokenizer.bos_token_id) == (1 if family.bos else 0)
    shown = tokenizer.decode(ids)
    order = [
        shown.find(text) for text in (prompt.rules, "Hi?", "Hello.", "The bosun signs.", "Who signs?", "The bosun. [1]")
    ]
    assert -1 not in order and order == sorted(order)
    assert ("</think>" in shown) == (family.template == THINKING)
    assert prompt.rules_in_question == (family.template == GEMMA)


@pytest.fixture(scope="module")
def trained(made, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / made[1].name
    words = "--base-model", made[1], "--dataset", rows_file, "--output", folder, "--learning-rate", 0.005
    words += "--preset", PRESET_OF.get(folder.name, "laptop"), "--accumulation", 1
    assert train(*[word for word in QUICK if word != 0.02 and word != "--learning-rate"], *words) == 0
    return folder


def test_it_is_trained_and_plain_peft_answers_the_same(made, trained):
    from peft import PeftModel

    from qlora.answering.generator import Generator
    from qlora.model import adapter

    family, folder = made
    read = adapter.read_adapter(trained)
    tokenizer = base_model.load_tokenizer(str(trained))
    assert (
        tokenizer.eos_token == family.end
        and read.prompt.digest == json.loads((trained / "prompt.json").read_text())["digest"]
    )
    result = read.run["result"]
    assert result["eval_loss_after"] < result["eval_loss_before"]
    prompt = encode_prompt(tokenizer, read.prompt.messages("Who signs form B7?", ["The bosun signs form B7."]))
    ours = adapter.load_adapter(base_model.load_base_model(str(folder)), read)
    lean_layers.make_lean(ours)
    [answer] = Generator(model=ours, tokenizer=tokenizer, max_new_tokens=8).generate_ids([prompt])
    plain = PeftModel.from_pretrained(base_model.load_base_model(str(folder)), str(trained)).eval()
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    wanted = plain.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    assert len(answer) > 0
    # Not the tokens: of a random model's two likeliest, bf16 may not tell which is ahead.
    with torch.inference_mode():
        logits, others = (model(input_ids=wanted).logits[0, len(prompt) - 1 :].float() for model in (ours, plain))
    assert (logits - others).abs().max() < 0.1 * others.std()


EXPORTED = ("llama-3", "qwen2", "qwen3", "mistral")


def test_the_table_of_architectures_is_that_of_the_tests(check_table):
    """Each line is a test above that runs for every family; which layers are ours, and what is exported, differs."""
    proven = ["packed loss equals that of single rows", "packed gradients equal those of single rows"]
    proven += ["prompt begins the row, one BOS or none", "the turn's own end is trained", "trained: the loss falls"]
    proven += ["plain PEFT answers as we do", "layers with fewer passes: LoRA"]
    lean = []
    for family in FAMILIES.values():
        with torch.device("meta"):
            outline = transformers.AutoModelForCausalLM.from_config(family.config(**SIZES, **family.options))
        lean.append(any(type(module) is lean_layers.LlamaRMSNorm for module in outline.modules()))
    rows = [[name, *["yes"] * len(FAMILIES)] for name in proven]
    rows.append(["layers with fewer passes: norm and gate", *("yes" if ours else "" for ours in lean)])
    rows.append(["as GGUF the same", *("yes" if name in EXPORTED else "refused" for name in FAMILIES)])
    check_table("families", [["", *FAMILIES], *rows])


def test_as_gguf_it_computes_the_same_or_is_refused(made, tmp_path):
    family, folder = made
    tokenizer, path = base_model.load_tokenizer(str(folder)), tmp_path / "mine.gguf"
    choose_prompt(tokenizer)
    config = base_model.load_config(str(folder))
    if folder.name not in EXPORTED:
        with pytest.raises(UserError, match=f"the architecture {config.model_type} cannot be exported as GGUF here"):
            gguf_file.check_exportable(config, tokenizer)
        return
    gguf_file.check_exportable(config, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # so that biases and norms count, and 16 bit hold all
            weight.copy_((torch.randn_like(weight) / 4 + ("norm" in name)).half())
    gguf_file.write_gguf(path, model, tokenizer)
    loaded = gguf_file.load_gguf(path, model.config, "cpu")
    ids = torch.arange(900)[None] % 800  # beyond the window that Llama-3's scaling begins from
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.convert_tokens_to_ids(family.end)
    assert fields["tokenizer.chat_template"].contents() == family.template
    assert ("rope_freqs.weight" in [tensor.name for tensor in GGUFReader(path).tensors]) == (folder.name == "llama-3")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sliding_window": 512}, "attention in a sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn positions"),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": False}, "a Llama with biases"),
    ],
)
def test_what_would_answer_otherwise_is_not_exported(tiny_base, changes, told):
    config = base_model.load_config(str(tiny_base))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=f"{told} cannot be exported .* --merge FOLDER .*convert_hf_to_gguf.py"):
        gguf_file.check_exportable(config, base_model.load_tokenizer(str(tiny_base)))


def test_an_answer_ends_at_every_end_that_the_model_knows(tiny_base):
    """Llama-3's generation_config lists several."""
    from qlora.answering.generator import Generator

    model, tokenizer = base_model.load_base_model(str(tiny_base)), base_model.load_tokenizer(str(tiny_base))
    generator = Generator(model=model, tokenizer=tokenizer, max_new_tokens=6)
    [free] = generator.generate_ids([[1, 50, 60]])
    model.generation_config.eos_token_id = [free[2], tokenizer.eos_token_id]
    assert generator.generate_ids([[1, 50, 60]]) == [free[: free.index(free[2]) + 1]]
    assert tokenizer.eos_token_id in generator.end_tokens()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ messages[-1].content }}", "the chat template loses or moves messages"),
        ("{% for message in messages | reverse %}{{ message.content }}{% endfor %}", "loses or moves messages"),
        ("{{ raise_exception('No.') }}", "the chat template refuses our messages (No.)"),
    ],
)
def test_a_template_that_loses_messages_is_refused(tiny_base, template, told):
    tokenizer = base_model.load_tokenizer(str(tiny_base))
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        choose_prompt(tokenizer)
    assert told in str(error.value)


# ------------------------------------------------------------------------------- refused


def change(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (change(quantization_config={"quant_method": "gptq", "bits": 4}), "the model is already quantised (gptq)"),
        (change(quantization_config={"quant_method": "awq", "bits": 4}), "the model is already quantised (awq)"),
        (
            change(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            "the model is already quantised (bitsandbytes)",
        ),
        (change(model_type="my-own", auto_map={"AutoConfig": "code.MyConfig"}), "cannot be used"),
        (change(model_type="llava", vision_config={}), "the model also reads pictures"),
        (pickle_weights, "the weights are in .bin files, which may hold code"),
    ],
)
def test_bases_that_cannot_be_used_are_told_first(tiny_base, rows_file, tmp_path, spoil, told, capsys, monkeypatch):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    spoil(folder)
    monkeypatch.setattr(base_model, "load_base_model", lambda *given, **options: pytest.fail("loaded"))
    assert train("--base-model", folder, "--dataset", rows_file, "--output", tmp_path / "out", *QUICK) == 2
    assert told in capsys.readouterr().err


def test_a_base_in_shards_is_loaded(tiny_base, tmp_path):
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    base_model.load_tokenizer(str(tiny_base)).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.tensor([[1, 40, 50]])
    with torch.inference_mode():
        found, wanted = (base_model.load_base_model(str(folder))(ids).logits for folder in (tmp_path, tiny_base))
    assert torch.equal(found, wanted)


def test_the_tokenizer_of_a_model_that_only_a_server_can_load(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    change(quantization_config={"quant_method": "awq", "bits": 4})(folder)
    assert base_model.load_tokenizer(str(folder)).pad_token == "</s>"


def test_a_follow_up_is_rewritten_where_the_template_has_no_system_role(tiny_base):

    from qlora.answering.chat_session import REWRITING, make_rewriter
    from qlora.answering.generator import Generator

    tokenizer = base_model.load_tokenizer(str(tiny_base))
    tokenizer.chat_template = GEMMA
    prompt = choose_prompt(tokenizer)
    generator = Generator(model=base_model.load_base_model(str(tiny_base)), tokenizer=tokenizer, max_new_tokens=3)
    complete = make_rewriter(str(tiny_base), prompt, generator)
    assert isinstance(complete([*REWRITING, {"role": "user", "content": "And then?"}]), str)
    first, *others = prompt.place_rules([*REWRITING])
    assert first["content"].startswith(REWRITING[0]["content"]) and [turn["role"] for turn in others] == ["assistant"]
