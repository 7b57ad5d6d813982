"""Base models that were quantised once, kept in the data folder: the next start loads them in the same bits.

DATA/quantised/NAME-KEY/    as save_pretrained writes a 4-bit model, and origin.json; whole or absent
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

from qlora import settings
from qlora.console import note

LIBRARIES = ("bitsandbytes", "transformers", "torch")  # another version may quantise to other bits
ORIGIN = "origin.json"
SMALL = 1e8  # bytes of a model that is quantised faster than it is found here


def folder_for(source: str, quantisation) -> Path | None:
    """Where the base model is kept in that quantisation; None when it comes in 4-bit itself.

    The name has a digest of what the bits depend on: files or commit, quantisation, library versions.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        return None
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    parts = [describe_files(source, config), quantisation.to_json_string(), versions]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return settings.data_folder() / "quantised" / f"{Path(source).name}-{digest[:16]}"


def describe_files(source: str, config) -> list | str:
    """What tells two versions of a base model apart: names, sizes and times of its files, or the hub's commit."""
    if not Path(source).is_dir():
        return f"{source} {config._commit_hash}"
    files = sorted(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".json"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def keep(model, folder: Path, source: str) -> None:
    """Writes the model beside `folder` and renames it, so that it is whole or absent; drops what it replaces.

    Of several processes the first does it. Without the disk space, or the right to write there, it is told and left.
    """
    if settings.process_rank() > 0 or not getattr(model, "is_loaded_in_4bit", False):
        return
    size = model.get_memory_footprint()
    if size < SMALL:
        return
    try:
        folder.parent.mkdir(exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 2 * size:
            raise OSError("too little disk")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as made:
            model.save_pretrained(made)
            origin = {"source": source, "dtype": str(model.dtype)}
            drop_older(folder.parent, origin)
            (Path(made) / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
            put_in_place(made, folder)
    except OSError as error:
        note(f"The 4-bit model is not kept, and quantised again the next time: {error}")
        return
    note(f"Kept in 4-bit for the next start: {folder}, {size / 1e9:.1f} GB (--no-cache: do not)")


def put_in_place(made: str, folder: Path) -> None:
    """Renames a TemporaryDirectory, unless another process was first."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise
    else:
        os.mkdir(made)  # TemporaryDirectory removes it


def drop_older(parent: Path, origin: dict) -> None:
    """Removes what was kept of the same base model before it, or a library, changed."""
    for path in parent.glob(f"*/{ORIGIN}"):
        if json.loads(path.read_text(encoding="utf-8")) == origin:
            shutil.rmtree(path.parent)
