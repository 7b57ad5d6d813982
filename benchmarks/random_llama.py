"""Llamas of random weights in 4-bit, as folders that `load_base_model` loads; speed and memory are those of real ones.

Each matrix is made on the device and quantised at once, so that the 13 GB of Llama-2-7B in 16 bit never exist, neither
in memory nor on disk (4 GB).
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from qlora import machine
from qlora.model import base_model

PROJECT = Path(__file__).resolve().parent.parent

LLAMA2_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SEED, STD = 0, 0.02  # the standard deviation that Llamas are initialised with
SHAPES = {  # what LlamaConfig takes
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}


def write_llama(folder: Path, shape: str, texts: Iterable[str], device: str) -> None:
    """Writes config, tokenizer (of these texts) and weights of one of SHAPES, one safetensors file per layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    sizes = SHAPES[shape]
    tokenizer = make_tokenizer(texts, min(sizes["vocab_size"], 8000), sizes["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    outline = base_model.outline_model(str(folder))
    quantisation = base_model.quantization_config(str(folder))
    kept = quantisation.llm_int8_skip_modules or ["lm_head"]
    generator = torch.Generator(device).manual_seed(SEED)
    files, size = {}, 0
    for layer, weights in groupby(outline.named_parameters(), key=lambda weight: weight[0].split(".")[:3]):
        tensors = {}
        for name, weight in weights:
            packs = name.endswith("_proj.weight") and not any(part in name for part in kept)
            made = random_weight(weight.shape, generator)
            tensors |= pack_weight(name, made) if packs else {name: made}
        file = f"{'.'.join(layer)}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / file)
        files |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.quantization_config = quantisation.to_dict()
    config.save_pretrained(folder)


def random_weight(shape, generator):
    """Normally distributed in the type that the device computes in; norms are ones."""
    import torch

    weight = torch.empty(shape, dtype=machine.compute_dtype(), device=generator.device)
    return weight.normal_(std=STD, generator=generator) if len(shape) > 1 else weight.fill_(1)


def pack_weight(name: str, weight) -> dict:
    """The tensors that stand for a weight in NF4 with double quantisation, as bitsandbytes saves it."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def make_tokenizer(
    texts: Iterable[str], size: int, longest: int, named: dict[str, str] = LLAMA2_TOKENS, others: Iterable[str] = ()
):
    """A BPE tokenizer with these special tokens. Like Llama-2's, it has no chat template and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = list(dict.fromkeys([*named.values(), *others])), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **named)
