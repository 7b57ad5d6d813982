"""Quantised base models, kept in the data folder, so that the next start loads the same bits.

DATA/quantised/NAME-KEY/    as save_pretrained writes a 4-bit model, and origin.json; whole or absent
"""

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

from qlora import settings
from qlora.console import note
from qlora.machine import making, remove_folder
from qlora.model.fingerprint import fingerprint_model

LIBRARIES = ("bitsandbytes", "transformers", "torch")  # another version may quantise to other bits
ORIGIN = "origin.json"
SMALL = 1e8  # bytes of a model below which quantising is faster than looking here


def folder_for(source: str, quantisation) -> Path | None:
    """The folder for the base model in this quantisation; None when it is published in 4-bit.

    Its name has a digest of what the bits depend on: weights or commit, quantisation, library versions.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        return None
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    parts = [describe_files(source, config), quantisation.to_json_string(), versions]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return settings.data_folder() / "quantised" / f"{Path(source).name}-{digest[:16]}"


def describe_files(source: str, config) -> str:
    """A text that differs between versions of a model: its fingerprint, or the hub's commit."""
    return fingerprint_model(source) if Path(source).is_dir() else f"{source} {config._commit_hash}"


def keep(model, folder: Path, source: str) -> None:
    """Writes the model, whole or not at all, and drops what it replaces.

    Only the first of several processes does it. Too little disk or a missing right is reported, and nothing is kept.
    """
    from safetensors import SafetensorError

    if settings.process_rank() > 0 or not getattr(model, "is_loaded_in_4bit", False):
        return
    size = model.get_memory_footprint()
    if size < SMALL:
        return
    try:
        folder.parent.mkdir(exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 2 * size:
            raise OSError("too little disk")
        with making(folder) as made:
            model.save_pretrained(made)
            origin = {"source": source, "dtype": str(model.dtype)}
            drop_older(folder.parent, origin)
            (made / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        note(f"The 4-bit model is not kept, so the next start quantises again: {error}")
        return
    note(f"Kept in 4-bit for the next start: {folder}, {size / 1e9:.1f} GB (--no-cache keeps none)")


def drop_older(parent: Path, origin: dict) -> None:
    """Removes what was kept of the same base model before the model or a library changed."""
    for path in parent.glob(f"[!.]*/{ORIGIN}"):
        if json.loads(path.read_text(encoding="utf-8")) == origin:
            remove_folder(path.parent)
