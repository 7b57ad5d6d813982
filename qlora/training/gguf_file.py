"""A model as one GGUF file, in the layout of llama.cpp's convert_hf_to_gguf.py, and an Ollama Modelfile beside it.

Only architectures and tokenizers whose rules are known here are written: each was loaded by transformers and by
llama.cpp itself, and answered the same (benchmarks/llama_cpp.py). Others are refused with the way that is left.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from qlora.console import fail
from qlora.prompt import Prompt, encode_prompt, show_prompt

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers' -> GGUF's
LLAMA_ROTATION = "llama"  # the architecture in which llama.cpp turns neighbouring numbers, not the two halves
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS % "{1,3}": "llama-bpe", WORDS % "": "qwen2"}  # regex that splits text -> its name in llama.cpp
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LARGEST = 65504.0  # of 16-bit floats
OTHERWISE = "give --merge FOLDER instead, and run llama.cpp's convert_hf_to_gguf.py FOLDER"
F16_FILE = 1  # general.file_type: mostly 16-bit floats


def check_exportable(config, tokenizer) -> None:
    """Raises UserError for a model or tokenizer that would not answer the same as a GGUF file."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    is_sliding = window < config.max_position_embeddings and getattr(config, "use_sliding_window", True)
    kind = describe_tokenizer(tokenizer)
    is_late = kind and not kind.get("add_space_prefix", True) and not begins_with_special(tokenizer)
    has_bias = config.model_type == "llama" and (config.attention_bias or config.mlp_bias)
    for wrong, what in (
        (config.model_type not in ARCHITECTURES, f"the architecture {config.model_type}"),
        (rope not in ("default", "llama3"), f"{rope} positions"),
        (is_sliding, "attention in a sliding window"),
        (has_bias, "a Llama with biases"),
        (not kind, "this kind of tokenizer"),
        (is_late, "a chat template that does not begin with a special token"),
    ):
        if wrong:
            raise fail(f"{what} cannot be exported as GGUF here", "--export-gguf", OTHERWISE)


def begins_with_special(tokenizer) -> bool:
    """Whether the first token of a prompt is a special one."""
    [first, *_] = encode_prompt(tokenizer, [{"role": "user", "content": "Who?"}])
    return first in tokenizer.all_special_ids


def describe_tokenizer(tokenizer) -> dict | None:
    """Which of llama.cpp's tokenizers gives the same tokens: its `model`, and `pre` or `add_space_prefix`.

    None when none does, as far as is known here.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model, before, normalizer = made["model"], made["pre_tokenizer"], made["normalizer"]
    if model["type"] != "BPE":
        return None
    if model["byte_fallback"]:
        return describe_sentencepiece(normalizer, before)
    if before is None:
        return None
    *splits, last = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        return None
    unicode = (normalizer or {}).get("type")  # llama.cpp leaves NFC out, also for Qwen's own files
    if not splits:
        return {"model": "gpt2", "pre": "gpt-2"} if last["use_regex"] and not unicode else None
    if splits[0]["type"] == "Digits" and splits[0]["individual_digits"] and last["use_regex"] and not unicode:
        return {"model": "gpt2", "pre": "smollm"}
    name = SPLITS.get(splits[0].get("pattern", {}).get("Regex")) if splits[0]["type"] == "Split" else None
    fits = {"llama-bpe": unicode is None and model["ignore_merges"], "qwen2": unicode in (None, "NFC")}
    return {"model": "gpt2", "pre": name} if name and fits[name] and not last["use_regex"] else None


def describe_sentencepiece(normalizer: dict | None, before: dict | None) -> dict | None:
    """Llama-2's kind: a space stands before a text and after each special token, or before a text alone.

    A prompt begins with a special token, and so in the second kind, of today's transformers, no space is added.
    """
    steps = [step["type"] for step in (normalizer or {}).get("normalizers", [])]
    if steps == ["Prepend", "Replace"] and before is None:
        return {"model": "llama", "add_space_prefix": True}
    if normalizer is None and before and before["type"] == "Metaspace" and not before["split"]:
        return {"model": "llama", "add_space_prefix": before["prepend_scheme"] == "always"}
    return None


# ------------------------------------------------------------------------------- weights and words


def write_gguf(path: Path, model, tokenizer) -> None:
    """Writes weights (16 bit; vectors in 32), tokenizer, chat template and end tokens of a model as one file.

    Tensors are converted one at a time. Raises UserError for weights that 16-bit floats do not hold.
    """
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type])
    try:
        add_sizes(writer, config, path.stem)
        add_tokenizer(writer, config.vocab_size, tokenizer, model.generation_config.eos_token_id)
        for name, tensor in list_tensors(model):
            kind = "float16" if tensor.dim() > 1 else "float32"
            writer.add_tensor_info(name, tuple(tensor.shape), as_numpy(tensor[:0], kind).dtype, nbytes(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in list_tensors(model):
            if tensor.dim() > 1 and tensor.abs().max() > LARGEST:
                raise fail(f"{name} has numbers that 16 bit do not hold", "--export-gguf", OTHERWISE)
            writer.write_tensor_data(as_numpy(tensor, "float16" if tensor.dim() > 1 else "float32"))
    finally:
        writer.close()


def load_gguf(path: Path, config, device):
    """The model of the file, as transformers reads it, in the type of the config."""
    from transformers import AutoModelForCausalLM

    # Of Llama-3's scaling transformers reads nothing in the file. A Mistral without a window is a Llama there.
    known = {} if config.model_type == "mistral" else {"config": config}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=config.dtype, device_map={"": device}, **known
        )
    return model.eval()


def nbytes(tensor) -> int:
    return tensor.numel() * (2 if tensor.dim() > 1 else 4)


def as_numpy(tensor, kind: str):
    return tensor.detach().float().cpu().numpy().astype(kind)


def list_tensors(model) -> Iterator[tuple[str, object]]:
    """GGUF's names and the weights, of which a tied head is left out."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    name = ARCHITECTURES[config.model_type]
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    if factors := rope_factors(config):
        import torch

        yield "rope_freqs.weight", torch.tensor(factors)
    for key, weight in model.named_parameters():
        if name == LLAMA_ROTATION and (found := re.search(r"\.(q|k)_proj\.weight$", key)):
            weight = interleave(weight, config.num_attention_heads if found[1] == "q" else config.num_key_value_heads)
        yield names.get_name(key, try_suffixes=(".weight", ".bias")), weight.detach()


def interleave(weight, heads: int):
    """The rows of each head with its two halves in turn: transformers rotates halves, llama.cpp neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rope_factors(config) -> list[float]:
    """By what Llama-3's scaling divides each frequency (transformers, modeling_rope_utils.py); none for others."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return []
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    old, size = rope["original_max_position_embeddings"], head_size(config)
    factors = []
    for n in range(0, size, 2):
        turns = old / (2 * math.pi * rope["rope_theta"] ** (n / size))  # of this frequency in the old window
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_sizes(writer, config, name: str) -> None:
    """Adds the shape of the model, and by what its positions turn."""
    writer.add_name(name)
    writer.add_file_type(F16_FILE)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer, size: int, tokenizer, ends: int | list[int] | None) -> None:
    """Its `size` tokens, how text is split, the chat template, and the tokens that end an answer.

    The template writes BOS itself, so none is added.
    """
    kind = describe_tokenizer(tokenizer)
    writer.add_tokenizer_model(kind["model"])
    writer.add_tokenizer_pre(kind.get("pre", "default"))
    tokens, types = list_tokens(tokenizer, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]
    if kind["model"] == "llama":
        # SentencePiece joins the pair with the best score first; here that is the first merge.
        rank = {a + b: n for n, (a, b) in reversed([*enumerate(merges)])}
        writer.add_token_scores([-float(rank.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(kind["add_space_prefix"])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None and number < size:
            add(number)
    first, *others = end_tokens(tokenizer, ends)
    writer.add_eos_token_id(first)
    writer.add_eot_token_id(first)
    if others:
        writer.add_eom_token_id(others[0])


def end_tokens(tokenizer, ends: int | list[int] | None) -> list[int]:
    """The token that ends a turn, then the others that the model knows (Llama-3 has three)."""
    known = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(n for n in (tokenizer.eos_token_id, *known) if n is not None))


def list_tokens(tokenizer, size: int) -> tuple[list[str], list[int]]:
    """The text and GGUF's type of each token id."""
    from gguf import TokenType

    tokens, types = [], []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))):
        added = tokenizer.added_tokens_decoder.get(number)
        if BYTE.fullmatch(token or ""):
            kind = TokenType.BYTE
        elif added:
            kind = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        else:
            kind = TokenType.NORMAL
        if number == tokenizer.unk_token_id and kind == TokenType.CONTROL and not added.content.startswith("<|"):
            kind = TokenType.UNKNOWN
        tokens.append(token or f"[PAD{number}]")
        types.append(kind)
    more = range(len(tokens), size)
    return [*tokens, *(f"[PAD{n}]" for n in more)], [*types, *([TokenType.UNUSED] * len(more))]


# ------------------------------------------------------------------------------- Ollama

RULES, ASKED = "\ue000RULES\ue000", "\ue000ASKED\ue000"  # private characters, which no template has


def write_modelfile(path: Path, gguf: Path, tokenizer, prompt: Prompt, ends: list[int]) -> None:
    """How Ollama asks the model: our prompt of one turn, its rules, every end token, and no sampling."""
    messages = [{"role": "system", "content": RULES}, {"role": "user", "content": ASKED}]
    shown = show_prompt(tokenizer, prompt.place_rules(messages))
    template = shown.replace("{{", '{{ "{{" }}').replace(RULES, "{{ .System }}").replace(ASKED, "{{ .Prompt }}")
    example = prompt.context.format(context="[1] the first passage\n\n[2] the second", instruction="your question")
    lines = [
        f"# ollama create {gguf.stem} -f {path.name}",
        "# One question at a time. A question with its passages is written so:",
        *(f"#     {line}".rstrip() for line in example.splitlines()),
        f"FROM ./{gguf.name}",
        f'TEMPLATE """{template}{{{{ .Response }}}}"""',
        f'SYSTEM """{prompt.rules}"""',
        *(f"PARAMETER stop {json.dumps(token)}" for token in tokenizer.convert_ids_to_tokens(ends)),
        "PARAMETER temperature 0",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
