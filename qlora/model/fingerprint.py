"""A base model's fingerprint: it is known by its weights and its config, not by the path that it was typed with."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from qlora import settings
from qlora.console import fail
from qlora.presets import EMBEDDED

SAMPLE = 4096  # bytes from the middle of every tensor: training changes them all, and 7B are read in a second
VOLATILE = ("transformers_version", "_name_or_path")  # of config.json: they say who wrote it


def local_folder(name: str) -> Path | None:
    """Where the base model's files are on this machine; None for a hub's that was not downloaded."""
    if name == EMBEDDED:
        folder = settings.data_folder() / "models" / EMBEDDED
        return folder if folder.is_dir() else None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path that does not exist
        return None
    return Path(config).parent if isinstance(config, str) else None


def fingerprint_model(name: str) -> str | None:
    """sha256 of the config, and of name, type, shape and a sample of every tensor, however the files are split.

    None where the model is not on this machine. Raises UserError for damaged files.
    """
    folder = local_folder(name)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in VOLATILE}
        tensors = sorted(tensor for file in weight_files(folder) for tensor in read_tensors(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"damaged base model ({error})", str(folder), "copy or download it again") from error
    return hashlib.sha256(json.dumps([kept, tensors], sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else []


def read_tensors(file: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) of every tensor of a file (github.com/huggingface/safetensors, "Format")."""
    with file.open("rb") as weights:
        length = int.from_bytes(weights.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is cut off")
        for name, tensor in json.loads(weights.read(length)).items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            weights.seek(8 + length + max(begin, (begin + end - SAMPLE) // 2))
            if len(sample := weights.read(min(SAMPLE, end - begin))) < min(SAMPLE, end - begin):
                raise ValueError(f"{file.name} is cut off")
            kind = repr((tensor["dtype"], tensor["shape"])).encode()
            yield name, hashlib.sha256(kind + sample).hexdigest()
