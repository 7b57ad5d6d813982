"""The whole path of --preset llama2-13b-chat on a random model of Llama-2's architecture.

Its tokenizer works as Llama-2's does: SentencePiece-style BPE with byte fallback, `<s>` and `</s>`, no pad token, and
the chat template that is published with Llama-2-13b-chat-hf.
"""

import json

import pytest
import torch
from conftest import QUICK, rag, sample_rows, train

from qlora.model import base_model
from qlora.prompt import choose_prompt, encode_prompt

PUBLISHED_TEMPLATE = (  # tokenizer_config.json of meta-llama/Llama-2-13b-chat-hf
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama2") / "Llama-2-13b-chat-hf"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    bytes_of = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special + bytes_of, show_progress=False)
    tokenizer.train_from_iterator([row["context"] for row in sample_rows()[:100]], trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = PUBLISHED_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,  # 7B and 13B have no groups
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=None,
        bos_token_id=begin,
        eos_token_id=tokenizer.token_to_id("</s>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_prompt_is_llama_2_s_published_format_character_by_character(llama2):
    """llama/generation.py, chat_completion: BOS and EOS around every turn, the system text in the first."""
    tokenizer = base_model.load_tokenizer(str(llama2))
    prompt = choose_prompt(tokenizer)
    assert prompt.chat_template == PUBLISHED_TEMPLATE and tokenizer.pad_token == "</s>"
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    messages = prompt.messages("Who signs?", ["The bosun signs."], history)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<s>[INST] <<SYS>>\n{prompt.rules}\n<</SYS>>\n\nHi [/INST] Hello. </s>"
        "<s>[INST] ### Context:\n[1] The bosun signs.\n\n### Instruction:\nWho signs? [/INST]"
    )
    ids = encode_prompt(tokenizer, messages)
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (2, 1)
    # SentencePiece begins a text, and what follows a special token, with a space of its own.
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids).replace("<s> ", "<s>") == text


def test_bytes_that_the_vocabulary_lacks_come_back(llama2):
    tokenizer = base_model.load_tokenizer(str(llama2))
    assert tokenizer.decode(tokenizer("naïve 港 🛟", add_special_tokens=False).input_ids) == "naïve 港 🛟"


def test_the_preset_answers_with_and_without_an_adapter(llama2, rows_file, collection, tmp_path, capsys):
    folder = tmp_path / "adapter"
    preset = "--preset", "llama2-13b-chat", "--base-model", llama2
    words = "--dataset", rows_file, "--output", folder, "--batch-size", 2, "--accumulation", 1, *QUICK
    assert train(*preset, *words) == 0
    run = json.loads((folder / "run.json").read_text())
    assert run["quantisation"]["bnb_4bit_quant_type"] == "nf4" and run["arguments"]["max_length"] == 2048
    assert json.loads((folder / "prompt.json").read_text())["chat_template"] == PUBLISHED_TEMPLATE
    capsys.readouterr()
    for adapter in (folder, "none"):
        assert rag("ask", "Who signs?", *preset, "--adapter", adapter, "--max-new-tokens", 12, "--json") == 0
        turn = json.loads(capsys.readouterr().out)
        assert len(turn["passages"]) == (1 if adapter == folder else 3)  # as many as in training
        assert turn["model"]["base"] == str(llama2) and turn["tokens"]["completion"] > 0
        assert "[INST]" not in turn["answer"] and "<s>" not in turn["answer"]
