"""What a GGUF file says of a tokenizer: which of llama.cpp's it is, its scores, the types of its tokens.

llama.cpp itself was asked by hand (docs/measurements.md): here stand its rules.
"""

from itertools import pairwise

import pytest
import torch
from conftest import sample_rows
from gguf import GGUFReader, GGUFWriter, TokenType
from test_llama2 import llama2  # noqa: F401
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.console import UserError
from qlora.model import base_model
from qlora.training import gguf_file


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    """Text split by the regex, each piece as bytes."""
    pieces = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA3, QWEN = gguf_file.SPLITS
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])
OLD = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
METASPACE = {name: pre_tokenizers.Metaspace(prepend_scheme=name, split=False) for name in ("always", "first")}
BYTES, MERGES = {"byte_fallback": True}, {"ignore_merges": True}
KINDS = [
    ({}, None, PLAIN, {"model": "gpt2", "pre": "gpt-2"}),
    ({}, None, DIGITS, {"model": "gpt2", "pre": "smollm"}),
    (MERGES, None, split(LLAMA3), {"model": "gpt2", "pre": "llama-bpe"}),
    ({}, normalizers.NFC(), split(QWEN), {"model": "gpt2", "pre": "qwen2"}),
    (BYTES, OLD, None, {"model": "llama", "add_space_prefix": True}),
    (BYTES, None, METASPACE["always"], {"model": "llama", "add_space_prefix": True}),
    (BYTES, None, METASPACE["first"], {"model": "llama", "add_space_prefix": False}),
    (BYTES, normalizers.NFKC(), None, None),
    ({}, None, split(LLAMA3), None),  # Llama-3 takes a piece that is a token whole, and llama.cpp with its name, too
    ({}, None, split(r"\p{N}+"), None),
    ({}, normalizers.Lowercase(), PLAIN, None),
    ({}, None, pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    ({}, None, None, None),
]


@pytest.mark.parametrize("n", range(len(KINDS)))
def test_which_tokenizer_of_llama_cpp_is_the_same(n):
    options, normalizer, before, wanted = KINDS[n]
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, [], **options))
    if normalizer:
        tokenizer.normalizer = normalizer
    if before:
        tokenizer.pre_tokenizer = before
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert gguf_file.describe_tokenizer(fast) == wanted
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    assert gguf_file.describe_tokenizer(other) is None


def test_a_space_before_the_text_alone_needs_a_prompt_that_begins_with_a_special_token(tiny_base):
    config, model = base_model.load_config(str(tiny_base)), models.BPE({"a": 0, "<s>": 1, "</s>": 2}, [], **BYTES)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = METASPACE["first"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ bos_token + messages[0].content }}"
    gguf_file.check_exportable(config, fast)
    fast.chat_template = "{{ 'a' + messages[0].content }}"
    with pytest.raises(UserError, match="a chat template that does not begin with a special token cannot be exported"):
        gguf_file.check_exportable(config, fast)


def test_the_factors_of_llama_3_s_scaling_are_those_of_transformers():
    from test_families import LLAMA3_ROPE, SIZES

    config = LlamaConfig(**SIZES | {"hidden_size": 512}, rope_parameters=LLAMA3_ROPE)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = LLAMA3_ROPE["rope_theta"] ** -(torch.arange(0, 128, 2) / 128)
    factors = torch.tensor(gguf_file.rope_factors(config))
    torch.testing.assert_close(factors, plain / scaled, rtol=1e-4, atol=0)
    assert factors[0] == 1 and factors[-1] == 8 and len(factors.unique()) > 3
    assert gguf_file.rope_factors(LlamaConfig(**SIZES)) == []


def join_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """llama.cpp's llm_tokenizer_spm: of all neighbours that make a token, those with the best score are joined."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while pairs := [(scores[a + b], -n) for n, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]:
        n = -max(pairs)[1]
        pieces[n : n + 2] = ["".join(pieces[n : n + 2])]
    spelt = ([piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces)
    return [token for tokens in spelt for token in tokens]


def test_the_scores_of_a_sentencepiece_tokenizer_join_what_its_merges_join(llama2, tmp_path):  # noqa: F811
    tokenizer, path = base_model.load_tokenizer(str(llama2)), tmp_path / "mine.gguf"
    writer = GGUFWriter(path, "llama")
    gguf_file.add_tokenizer(writer, len(tokenizer) + 2, tokenizer, [2, 7])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in GGUFReader(path).fields.items()}
    scores = {
        token: score
        for token, score, kind in zip(found["tokens"], found["scores"], found["token_type"], strict=True)
        if kind == TokenType.NORMAL
    }
    for row in sample_rows()[:120:4]:
        assert join_by_score(row["instruction"], scores) == tokenizer.tokenize(row["instruction"])
    kinds = {token: TokenType(kind) for token, kind in zip(found["tokens"], found["token_type"], strict=True)}
    assert [kinds[token] for token in ("<unk>", "</s>", "<0x0A>", "▁", f"[PAD{len(tokenizer)}]")] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.BYTE,
        TokenType.NORMAL,
        TokenType.UNUSED,
    ]
    ends = [found[f"{name}_token_id"] for name in ("bos", "eos", "eot", "eom")]
    assert ends == [1, 2, 2, 7] and found["add_bos_token"] is False
