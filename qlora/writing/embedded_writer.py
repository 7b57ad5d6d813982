"""The embedded writer: the embedded model, trained on the sample's rows and on the same turned around, at first use.

It lies in the data folder. No weights are shipped: training takes minutes, and nothing has to be trusted.
"""

import subprocess
import sys
from pathlib import Path

from qlora import presets, settings
from qlora.console import fail, note
from qlora.machine import claiming
from qlora.retrieval.languages import NAMES

NAME = "embedded"
ROWS = presets.SAMPLE_DATA / "train.jsonl"
LANGUAGE = "en"  # of those rows
VERSION = 1  # raised when rows or recipe change, so that it is trained again


def folder() -> Path:
    """Where the adapter of the embedded writer is, or will be."""
    return settings.data_folder() / "writers" / f"{presets.EMBEDDED}-{VERSION}"


def find() -> Path:
    """Its folder. Raises UserError when it is not trained yet."""
    if not (folder() / "run.json").is_file():
        fix = "write rows with it first: python rag_qlora.py write --collection NAME"
        raise fail("the embedded writer is not trained yet", NAME, fix)
    return folder()


def check_language(code: str | None) -> None:
    """Raises UserError for a collection in a language that the embedded writer does not write."""
    if code not in (None, LANGUAGE):
        what = f"the embedded writer writes English, the collection is in {NAMES.get(code, code)}"
        raise fail(
            what, "--writer embedded", "name a server with --base-url, or an adapter that was trained on such rows"
        )


def prepare() -> Path:
    """The folder of the embedded writer, which is trained where it is missing.

    A training that was stopped is continued. Raises UserError when it fails.
    """
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    with claiming(place.with_name(f"{place.name}-training")):
        if not (place / "run.json").is_file():
            note("Training the embedded writer on the sample's rows (once; about 10 minutes, longer without bf16)")
            command = [sys.executable, str(settings.PROJECT / "instruct_train_qlora.py"), "--preset", "laptop"]
            command += ["--base-model", presets.EMBEDDED, "--dataset", str(ROWS), "--writer", "--eval-answers", "0"]
            done = subprocess.run([*command, "--output", str(place), "--resume"], stdout=subprocess.DEVNULL)
            if done.returncode:
                raise fail("the embedded writer could not be trained", str(place), "see the lines above")
    return place
