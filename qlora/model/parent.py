"""The adapter that a run goes on from: ours, or any in PEFT's format whose base model is here.

    parent = read_parent("adapters/squad")
    load_weights(add_lora(base, parent.lora, seed=0), parent)

A higher rank than the parent's begins as the same function: the rows that B gains are zero.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qlora.console import Problems, fail, shorten_text
from qlora.model import adapter
from qlora.model.lora import Lora
from qlora.prompt import Prompt

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CONFIG, "adapter_model.bin", "prompt.json", "run.json", "chat_template.jinja", "tokenizer*")
UNKNOWN = ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "layers_to_transform")


@dataclass(frozen=True)
class Parent:
    """A saved adapter: how it was named, where it is, its shape, and the base model to load on this machine.

    `prompt` and `run` are those of our own adapters; None and empty for others.
    """

    name: str
    folder: Path
    lora: Lora
    base_model: str
    prompt: Prompt | None
    run: dict

    @property
    def line(self) -> list[dict]:
        """The adapter and those that it went on from, the youngest first, as run.json keeps them."""
        rows = self.run.get("dataset", {})
        own = {"adapter": self.name, "sha256_of_weights": adapter.digest_weights(self.folder)}
        own |= {name: rows[name] for name in ("source", "sha256_of_rows") if name in rows}
        return [own, *self.run.get("parents", [])]


def read_parent(name: str, base_model: str | None = None) -> Parent:
    """The adapter in a folder or on the hub. Raises UserError for one that cannot be trained further:

    files missing or damaged, weights in a .bin file, not LoRA, parts that this script does not train, or another base
    model.
    """
    folder = Path(name).expanduser()
    folder = folder if folder.exists() or name.startswith((".", "/", "~")) else fetch(name)
    if not (folder / CONFIG).is_file():
        raise fail(f"no adapter there ({CONFIG} is missing)", name, "give a folder that training wrote, or a hub id")
    if not (folder / WEIGHTS).is_file():
        unsafe = (
            "its weights are in a .bin file, which may hold code" if (folder / "adapter_model.bin").is_file() else ""
        )
        what = unsafe or f"incomplete adapter: {WEIGHTS} missing"
        raise fail(what, name, "load it with PEFT where you trust it, and save_pretrained it again")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        lora = read_shape(config, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"damaged adapter ({error})", name, "copy the whole folder again") from error
    if (folder / "run.json").is_file():
        ours = adapter.read_adapter(folder, base_model)
        return Parent(name, folder, lora, ours.base_model, ours.prompt, ours.run)
    base = base_model or config.get("base_model_name_or_path")
    if not base:
        raise fail("the adapter does not say what its base model is", name, "name it with --base-model")
    return Parent(name, folder, lora, base, None, {})


@cache
def fetch(name: str) -> Path:
    """The folder of an adapter of the hub, without pictures and checkpoints."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "check the folder, or the name and the network (gated? set HF_TOKEN)"
        raise fail(f"no adapter {name} ({shorten_text(said)})", "--start-from", fix) from error


def read_shape(config: dict, name: str) -> Lora:
    """The shape in PEFT's configuration. Raises UserError for what is not plain LoRA on linear layers."""
    problems = Problems()
    if config["peft_type"] != "LORA":
        problems.add(f"the adapter is {config['peft_type']}, not LoRA", name, "give a LoRA adapter")
    for key in UNKNOWN:
        if config.get(key):
            problems.add(f"the adapter has {key}, which is not trained here", name, "give one without it")
    problems.raise_if_any()
    return Lora(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=config["target_modules"],
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )


def grow(lora: Lora, rank: int) -> Lora:
    """The shape with a higher rank and the same scale, alpha / rank (or alpha / sqrt(rank))."""
    factor = math.sqrt(rank / lora.rank) if lora.rslora else rank / lora.rank
    alpha = lora.alpha * factor
    return replace(lora, rank=rank, alpha=int(alpha) if alpha == int(alpha) else alpha)


def load_weights(model, parent: Parent) -> None:
    """Copies the parent's weights into a model with LoRA of its rank or a higher one, where B begins at zero.

    Raises UserError when they do not fit.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where, fix = parent.name, "the adapter is for another base model, or damaged: copy the whole folder again"
    try:
        saved = load_file(parent.folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise fail(f"damaged weights ({error})", where, fix) from error
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if different := sorted(state.keys() ^ saved.keys()):
        raise fail(f"{len(different)} weights are not those of the model ({different[0]})", where, fix)
    ranks = parent.lora.rank, model.peft_config["default"].r
    for name, weight in state.items():
        shape = saved[name].shape
        sizes = zip(shape, weight.shape, strict=False)
        if len(shape) != weight.dim() or not all(had == has or (had, has) == ranks for had, has in sizes):
            raise fail(f"{name} is {tuple(shape)}, not {tuple(weight.shape)}", where, fix)
        weight[tuple(slice(size) for size in shape)].copy_(saved[name])
